"""A potential that gives NaN or infinity is refused by name, with the structure it gave it for."""

from pathlib import Path

import pytest
import torch
from ase.build import bulk
from ase.io import write
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.run import relax
from atomeq.potential.checkpoint import CheckpointError, load_potential, save_potential
from atomeq.potential.committee import NotFiniteError
from atomeq.potential.potential import Potential

BROKEN = r"Cu4.*potential 'EGNN' gives NaN or infinite"


def broken(value: float, *, only_aluminium: bool = False) -> Potential:
    """A potential whose weights are finite or not, and whose results are not."""
    potential = small_potential(torch.float32)
    rows = slice(13, 14) if only_aluminium else slice(None)
    potential.model.embedding.weight.data[rows] = value
    return potential


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_the_calculator_names_structure_and_potential(value: float):
    atoms = bulk("Cu", cubic=True)
    atoms.calc = AtomeqCalculator(broken(value))
    for ask in (atoms.get_potential_energy, atoms.get_forces, atoms.get_stress):
        with pytest.raises(NotFiniteError, match=BROKEN):
            ask()
    assert not atoms.calc.results


def test_a_batch_and_a_committee_name_the_one():
    calculator = AtomeqCalculator([small_potential(), broken(float("nan"), only_aluminium=True)])
    fine = [bulk("Cu")] * 3
    assert len(calculator.evaluate(fine)) == 3
    with pytest.raises(NotFiniteError, match=r"structure 2 \(Al\)") as caught:
        calculator.evaluate([*fine[:2], bulk("Al")], max_edges=1)
    assert caught.value.index == 2


def test_dynamics_refuse_what_never_gave_a_number_and_isolate_what_did():
    structures = [bulk("Cu", cubic=True), bulk("Cu", cubic=True)]
    with pytest.raises(NotFiniteError, match=BROKEN):
        list(relax(structures, broken(float("nan")), max_steps=2))
    evaluate = Evaluator(broken(float("nan"), only_aluminium=True))
    outcomes = list(relax([bulk("Cu"), bulk("Al")], evaluate, max_steps=1))
    assert sorted(one.status == "failed" for one in outcomes) == [False, True]


@pytest.mark.parametrize("verb", ["single-point", "relax", "md --steps 3"])
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_every_verb_exits_with_2(verb: str, value: float, tmp_path: Path, capsys):
    folder = save_potential(broken(value), tmp_path / "broken")
    write(tmp_path / "cu.extxyz", bulk("Cu", cubic=True))
    words = [*verb.split(), str(tmp_path / "cu.extxyz"), "--potential", str(folder)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "out.extxyz")])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert str(folder) in lines[-1]
    assert "NaN or infini" in lines[-1]
    assert not (tmp_path / "out.extxyz").exists()


def test_weights_that_are_no_numbers_are_not_loaded(tmp_path: Path):
    save_potential(broken(float("nan")), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.embedding\.weight holds NaN"):
        load_potential(tmp_path)
