"""Several heads on one trunk: each structure is of one, and each is a potential once loaded."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from copper_experiment import labelled_copper

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.cli.screen import _absolute
from atomeq.models.egnn import EGNN
from atomeq.models.nequip import NequIP
from atomeq.potential.checkpoint import load_potential, save_potential, scatter_weights
from atomeq.potential.folders import CheckpointError
from atomeq.potential.heads import HeadedPotential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

KEYS = ("energy", "energies", "forces", "stress")


@pytest.fixture(params=["egnn", "nequip"])
def headed(request: pytest.FixtureRequest) -> HeadedPotential:
    """Three heads with weights and zeros of their own."""
    network = (
        EGNN(3.5, num_layers=1, hidden_channels=4)
        if request.param == "egnn"
        else NequIP(3.5, irreps=["4x0e", "4x0e"], radial_channels=[4], elements=[29])
    )
    headed = HeadedPotential(Potential(network.double()), ["pbe", "r2scan", "b-3"])
    scatter_weights(headed)
    for k, name in enumerate(headed.names):
        with headed.using(name):
            headed.references = AtomicReferences({29: -3.0 - k}, scale=10.0)
    return headed.eval()


def test_a_mixed_batch_is_answered_by_each_structures_head(headed, tmp_path: Path):
    save_potential(headed, tmp_path / "of three")
    single = {name: load_potential(f"{tmp_path}/of three@{name}") for name in headed.names}
    structures = labelled_copper(5)
    heads = torch.tensor([2, 0, 1, 0, 2])
    graph = headed.build_graph(structures)
    found = headed(graph.replace(head=heads), KEYS)
    own = [
        single[headed.names[int(head)]](headed.build_graph([atoms]), KEYS)
        for head, atoms in zip(heads, structures, strict=True)
    ]
    for key in KEYS:
        torch.testing.assert_close(found[key], torch.cat([one[key] for one in own]), msg=key)
    energies = [float(one(headed.build_graph(structures[:1]))["energy"]) for one in single.values()]
    assert len({round(energy, 3) for energy in energies}) == 3
    for potential in single.values():
        assert type(potential) is Potential
        assert set(potential.state_dict()) == {
            name for name in headed.state_dict() if not name.startswith("heads.")
        }


def test_a_head_has_to_be_chosen(headed, tmp_path: Path):
    save_potential(headed, tmp_path / "three")
    for name, said in (("three", "has to be chosen"), ("three@lda", "'lda' does not exist")):
        with pytest.raises(CheckpointError, match=f"{said}.* pbe, r2scan, b-3"):
            load_potential(f"{tmp_path}/{name}")
    with headed.using("r2scan") as one:
        save_potential(Potential(one.model, one.references), tmp_path / "one")
    with pytest.raises(CheckpointError, match="has no heads: leave out 'pbe'"):
        load_potential(f"{tmp_path}/one@pbe")
    for names in (["pbe"], ["pbe", "pbe"], ["pbe", "a.b"]):
        with pytest.raises(ValueError, match="two names or more"):
            HeadedPotential(Potential(EGNN(3.5)), names)


def test_a_head_goes_along_to_other_folders(tmp_path: Path, monkeypatch):
    (tmp_path / "three").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _absolute("three@pbe") == f"{tmp_path}/three@pbe"
    assert _absolute("three") == f"{tmp_path}/three"
    assert _absolute("cu-pbe") == "cu-pbe"


@pytest.fixture
def two_levels(tmp_path: Path, experiment: Path) -> Path:
    """The copper experiment with a second level of theory: half of all, and 2 eV per atom."""
    frames = labelled_copper(12)
    ase.io.write(tmp_path / "full.extxyz", frames)
    for atoms in frames:
        results = {key: value / 2 for key, value in atoms.calc.results.items()}
        results["energy"] += 2.0 * len(atoms)
        atoms.calc = SinglePointCalculator(atoms, **results)
    ase.io.write(tmp_path / "half.extxyz", frames)
    document = yaml.safe_load(experiment.read_text())
    document["model"]["heads"] = ["full", "half"]
    files = {name: f"{name}.extxyz" for name in ("full", "half")}
    document["data"]["init_args"] |= {"train": files, "test": files, "split": {"val": 4}}
    experiment.write_text(yaml.safe_dump(document))
    return experiment


def test_heads_are_trained_together_and_chosen_by_name(two_levels: Path, tmp_path: Path, capsys):
    main(["fit", "-c", str(two_levels), "--trainer.max_epochs=20"])
    run = tmp_path / "run"
    best = f"--ckpt_path={run}/checkpoints/best.ckpt"
    main(["test", "-c", str(two_levels), best])
    errors = json.loads((run / "test_errors.json").read_text())
    potentials = {name: load_potential(f"{run}/potential@{name}") for name in ("full", "half")}
    shifts = [float(one.references.shift[29]) for one in potentials.values()]
    assert shifts[1] == pytest.approx(shifts[0] / 2 + 2.0, abs=0.2)
    different = {
        name
        for name, weight in potentials["full"].named_parameters()
        if not torch.equal(weight, potentials["half"].get_parameter(name))
    }
    assert {name.split(".")[1] for name in different} == {"energy"}  # the readout of EGNN
    for name in potentials:
        frames = ase.io.read(tmp_path / f"{name}.extxyz", index=":")
        found = AtomeqCalculator(f"{run}/potential@{name}").evaluate([a.copy() for a in frames])
        missed = [f["forces"] - a.get_forces() for f, a in zip(found, frames, strict=True)]
        mean = 1e3 * np.abs(np.concatenate(missed)).mean()
        assert errors[name]["forces_mae"] == pytest.approx(mean, rel=1e-3)
        # A potential of one head would miss half of the forces of the other.
        known = 1e3 * np.abs(np.concatenate([a.get_forces() for a in frames])).mean()
        assert mean < 0.4 * known

    structure, out = tmp_path / "half.extxyz", tmp_path / "relaxed.extxyz"
    words = ["relax", str(structure), f"--out={out}", "--fmax=100", f"--potential={run}/potential"]
    main([*words, "--head=half"])
    expected = AtomeqCalculator(f"{run}/potential@half").evaluate(ase.io.read(structure, ":1"))
    assert ase.io.read(out, 0).get_potential_energy() == pytest.approx(expected[0]["energy"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--overwrite"])
    assert "the head has to be chosen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--model.heads=null", "model.heads are none"),
        ("--model.heads=[half, full]", "in the same order"),
        ("--data.train=full.extxyz", "data.train has files of none"),
        ("--data.test={third: full.extxyz}", "give all files by the head"),
    ],
)
def test_heads_that_do_not_fit_the_data_are_refused(two_levels, capsys, monkeypatch, word, said):
    monkeypatch.chdir(two_levels.parent)
    verb = "test" if "test" in word else "fit"
    with pytest.raises(SystemExit) as exit_:
        main([verb, "-c", str(two_levels), word])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
