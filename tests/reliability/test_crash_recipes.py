"""A recipe of a screening that expands, nests or holds itself is one line and exit code 2."""

import pytest
from ase.build import bulk
from ase.io import write

from atomeq.cli import main
from atomeq.screening.steps import read_steps

_BOMB = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
_BOMB += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 10)]
RECIPES = {
    "bomb": "\n".join([*_BOMB, "steps: *a9"]),
    "deep": "steps: " + "[" * 3000 + "]" * 3000,
    "itself": "steps:\n  - single_point: &a [*a]",
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_hostile_recipe_is_one_short_line(recipe, tmp_path, capsys):
    write(tmp_path / "cu.extxyz", bulk("Cu"))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    words = f"screen {tmp_path}/cu.extxyz --potential cu-pbe --config {path} --out {tmp_path}/out"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "recipe.yaml is not readable YAML" in told
    assert len(told) < 500
    assert told.count("\n") == 1


def test_honest_aliases_of_a_recipe_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("fine: &fine {fmax: 0.01}\nsteps:\n  - relax: *fine\n  - single_point")
    assert read_steps(path) == [{"relax": {"fmax": 0.01}}, "single_point"]
