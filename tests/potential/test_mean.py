"""A committee's folder is one potential: means, spreads, and the doors that take or refuse it."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.run import relax
from atomeq.potential.checkpoint import load_potential, save_potential
from atomeq.potential.export import export_potential
from atomeq.potential.folders import CheckpointError
from atomeq.potential.mean import MeanPotential, write_committee
from atomeq.potential.potential import Potential
from atomeq.screening.run import screen

KEYS = ("energy", "forces", "energy_uncertainty", "forces_uncertainty")
DIGITS = 1e-12  # float64, relative


def member(shift: float) -> Potential:
    potential = small_potential()
    for parameter in potential.model.parameters():
        parameter.data += shift * parameter.data.flip(0)
    return potential


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("committee")
    for k in range(3):
        save_potential(member(0.1 * k), root / f"seed-{k}")
    write_committee(root, [f"seed-{k}" for k in range(3)])
    return root


def crystal():
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Al"
    atoms.rattle(0.1, seed=0)
    return atoms


def test_results_are_means_and_doubt_is_spread(folder: Path):
    committee = load_potential(folder)
    graph = committee.build_graph([crystal(), crystal()[:3]])
    keys = ("energy", "energies", "forces")
    found = committee(graph, (*keys, "energy_uncertainty", "forces_uncertainty"))
    each = [load_potential(folder / f"seed-{k}")(graph, keys) for k in range(3)]
    for key in keys:
        mean = torch.stack([one[key] for one in each]).mean(dim=0)
        torch.testing.assert_close(found[key], mean, rtol=DIGITS, atol=DIGITS)
    energies = torch.stack([one["energy"] for one in each])
    torch.testing.assert_close(found["energy_uncertainty"], energies.std(dim=0))
    forces = torch.stack([one["forces"] for one in each])
    spread = forces.std(dim=0).square().mean(dim=1).sqrt()
    torch.testing.assert_close(found["forces_uncertainty"], spread)
    assert float(spread.min()) > 0


def test_the_calculator_takes_the_folder_like_any_other(folder: Path):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(folder)
    several = AtomeqCalculator([folder / f"seed-{k}" for k in range(3)])
    np.testing.assert_allclose(
        atoms.get_forces(), several.get_property("forces", atoms), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        atoms.get_stress(), several.get_property("stress", atoms), atol=1e-12
    )
    assert atoms.calc.get_property("energy_uncertainty", atoms) == pytest.approx(
        several.get_property("energy_std", atoms)
    )
    hessian = atoms.calc.get_property("hessian", atoms)
    np.testing.assert_allclose(hessian, several.get_property("hessian", atoms), atol=1e-9)
    assert "extrapolation" not in atoms.calc.implemented_properties
    assert atoms.calc.provenance["sha256"] == load_potential(folder).fingerprint()


def test_a_committee_with_another_rescaling_gives_other_results_under_another_hash(folder: Path):
    members = [load_potential(folder / f"seed-{k}") for k in range(3)]
    plain, same, wider = (
        MeanPotential(members, rescaling).fingerprint()
        for rescaling in (None, {"energy": 1.0}, {"energy": 2.0})
    )
    assert plain == same
    assert plain != wider


def test_relaxations_and_screenings_move_by_the_mean_and_tell_the_spread(folder: Path, tmp_path):
    committee = load_potential(folder)
    graph = Evaluator(committee).prepare([crystal()])
    found = Evaluator(committee)(graph).forces
    torch.testing.assert_close(found, committee(committee.build_graph(crystal()))["forces"])
    (outcome,) = relax([crystal()], Evaluator(committee, max_uncertainty=1e-9), max_steps=2)
    assert outcome.status == "failed"
    assert "uncertain" in outcome.reason
    done = screen(
        [_found(crystal())], str(folder), out=tmp_path / "out", steps=["single_point", "rank"]
    )
    expected = committee(committee.build_graph(crystal()), ("energy_uncertainty",))
    assert done.best[0]["energy_uncertainty"] == pytest.approx(
        float(expected["energy_uncertainty"][0]) / 4,
        rel=1e-6,  # per atom
    )


def _found(atoms):
    from atomeq.screening.sources import Found

    return Found("here#0", atoms)


def test_a_precision_holds_for_every_member(folder: Path):
    committee = load_potential(folder, dtype=torch.float32, precision="high")
    assert isinstance(committee, MeanPotential)
    assert committee.precision == "high"
    assert committee.dtype == torch.float32
    assert {one.dtype for one in committee.members} == {torch.float32}


def test_who_needs_one_potential_is_told_that_this_is_a_committee(folder: Path, tmp_path: Path):
    committee = load_potential(folder)
    with pytest.raises(CheckpointError, match="member by member"):
        save_potential(committee, tmp_path / "copy")
    for potential in (folder, committee):
        with pytest.raises(CheckpointError, match="committee"):
            export_potential(potential, tmp_path / "out.pt2")
    with pytest.raises(ValueError, match="no extrapolation"):
        committee(committee.build_graph(crystal()), ("extrapolation",))


@pytest.mark.parametrize("names", [["seed-0", "../elsewhere"], "seed-0", [".."], ["seed-0"]])
def test_a_committee_is_made_of_folders_in_its_own(folder: Path, tmp_path: Path, names):
    save_potential(small_potential(), tmp_path / "seed-0")
    write_committee(tmp_path, names)
    with pytest.raises(CheckpointError, match=r"committee|members"):
        load_potential(tmp_path)


def test_members_that_see_different_graphs_are_refused():
    with pytest.raises(ValueError, match="different graphs"):
        MeanPotential([small_potential(), small_potential(cutoff=5.0)])


def test_a_spread_is_rescaled_to_hold_what_it_promises(folder: Path, tmp_path: Path, capsys):
    most = 3.0  # σ; errors are spread evenly up to there, and 68.27 % of them lie within 2.05 σ
    ratios = np.random.RandomState(0).permutation(np.linspace(0, most, 240))
    calculator = AtomeqCalculator(folder)
    held_out = [crystal() for _ in range(20)]
    for k, atoms in enumerate(held_out):
        atoms.rattle(0.05, seed=k)
        (told,) = calculator.evaluate([atoms], [*KEYS])
        off = ratios[12 * k : 12 * k + 12].reshape(4, 3) * told["forces_uncertainty"][:, None]
        values = {"energy": told["energy"], "forces": told["forces"] - off}
        values["energy"] += 0.5 * told["energy_uncertainty"]
        atoms.calc = SinglePointCalculator(atoms, **values)
    ase.io.write(tmp_path / "held_out.extxyz", held_out)
    words = ["--held-out", str(tmp_path / "held_out.extxyz"), "--out", str(tmp_path / "out")]
    main(["calibrate", str(folder), *words])
    assert "68.3%" in capsys.readouterr().out
    one, other = load_potential(folder), load_potential(tmp_path / "out")
    graph = one.build_graph(held_out[0])
    before, after = one(graph, KEYS), other(graph, KEYS)
    torch.testing.assert_close(after["forces"], before["forces"])
    for name, expected in (("energy", 0.5), ("forces", 2.05)):
        ratio = after[f"{name}_uncertainty"] / before[f"{name}_uncertainty"]
        torch.testing.assert_close(
            ratio, torch.full_like(ratio, expected), rtol=0.02, atol=0
        )  # labels are stored to eight digits
    with pytest.raises(SystemExit):
        main(["calibrate", str(folder / "seed-0"), *words[:-1], str(tmp_path / "single")])
    assert "--train" in capsys.readouterr().err
    write_committee(tmp_path / "out", ["seed-0", "seed-1"], rescaling={"forces": -1.0})
    with pytest.raises(CheckpointError, match="positive factors"):
        load_potential(tmp_path / "out")
