"""A saved potential is tested by an experiment, and published errors stand beside its own."""

import json
from pathlib import Path

import ase.io
import pytest
import yaml
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.potential.checkpoint import save_potential
from atomeq.training.task import AtomisticTask

#: GPa; of labels that are the potential's own, less an offset, stored to eight digits.
NOTHING = 1e-4
OFFSET = 0.01  # eV/Å³, or 1.6 GPa
OTHERS = {"source": "somewhere, 2020", "errors": {"Other": {"held_out": {"forces_rmse": 12.34}}}}


@pytest.fixture
def labels(tmp_path: Path, experiment: Path) -> Path:
    """Make the experiment's labels those of a saved potential, its stress off by a constant."""
    folder = save_potential(small_potential(), tmp_path / "own")
    calculator = AtomeqCalculator(folder)
    structures = [bulk("Cu", cubic=True) for _ in range(6)]
    for k, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=k)
        (found,) = calculator.evaluate([atoms], ["energy", "forces", "stress"])
        stress = found["stress"] + OFFSET * (found["stress"] * 0 + [1, 1, 1, 0, 0, 0])
        values = {"energy": found["energy"], "forces": found["forces"], "stress": stress}
        atoms.calc = SinglePointCalculator(atoms, **values)
    ase.io.write(tmp_path / "own.extxyz", structures)
    document = yaml.safe_load(experiment.read_text())
    document["data"]["init_args"]["train"] = str(tmp_path / "own.extxyz")
    document["data"]["init_args"]["split"] = {"val": 2, "test": 3}
    document["model"]["stress_offset"] = OFFSET
    experiment.write_text(yaml.safe_dump(document))
    return folder


def test_a_saved_potential_is_tested_beside_published_errors(
    experiment: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "others.yaml").write_text(yaml.safe_dump(OTHERS))
    with experiment.open("a") as file:
        file.write("published: published/others.yaml\n")
    main(["test", "-c", str(experiment), "--potential", str(labels)])
    told = capsys.readouterr().out
    ours, other, source = (
        next(line for line in told.splitlines() if word in line)
        for word in ("held_out", "Other", "published:")
    )
    assert ours.split()[1] == "measured"
    assert "12.34" in other.split()
    assert source.endswith("somewhere, 2020")
    errors = json.loads((tmp_path / "run" / "test_errors.json").read_text())["held_out"]
    assert errors["forces_rmse"] < NOTHING
    assert errors["stress_rmse"] < NOTHING  # less the offset of the experiment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit"], "model.start_from"),
        (["test", "--ckpt_path", "last"], "in place of ckpt_path"),
        (["test", "--published.errors", '{"A": {"held_out": {"force_rmse": 1.0}}}'], "force_rmse"),
    ],
)
def test_what_a_saved_potential_cannot_be_used_for_is_told(
    experiment: Path, labels: Path, words, message, capsys: pytest.CaptureFixture[str]
):
    verb, *more = words
    with pytest.raises(SystemExit):
        main([verb, "-c", str(experiment), "--potential", str(labels), *more])
    assert message in capsys.readouterr().err


def test_a_potential_is_not_tested_as_a_scalar(labels: Path):
    with pytest.raises(ValueError, match="does not predict what this experiment trains, gap"):
        AtomisticTask(small_potential().model, target="gap").use(labels)
