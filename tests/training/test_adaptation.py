"""Equivariant adaptation: a network trained on structures as they lie, behind a canonicalizer."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.spatial.transform import Rotation

from atomeq.cli import main
from atomeq.models.faenet import FAENet
from atomeq.models.frame_averaged import Canonicalized
from atomeq.potential.checkpoint import CONFIG_FILE, load_potential, save_potential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.training.losses import PotentialLoss
from atomeq.training.metrics import angles_of

FAENET = {
    "hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 4,
    "pg_channels": 0, "phys_embeds": False,
}  # fmt: skip
SMALL = {"class_path": "FAENet", "init_args": {"cutoff": 3.0, **FAENET}}
BEHIND = {"class_path": "Canonicalized", "init_args": {"model": SMALL, "proper": True}}
FASTER = 1e-6  # float32, of energies in eV


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methanol that always lies alike, and a potential that is not invariant."""
    monkeypatch.chdir(tmp_path)
    structures = [molecule("CH3OH") for _ in range(20)]
    for k, atoms in enumerate(structures):
        atoms.rattle(0.03, seed=k)
        atoms.calc = SinglePointCalculator(atoms, energy=-30.0, forces=np.zeros((6, 3)))
    ase.io.write("data.extxyz", structures)
    torch.manual_seed(0)
    references = AtomicReferences({1: -3.0, 6: -8.0, 8: -7.0})
    save_potential(Potential(FAENet(3.0, **FAENET), references), tmp_path / "small")


def fit(model: dict, **loss: float) -> dict:
    """Adapt the small potential; return what its folder tells."""
    document = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 6, "accelerator": "cpu", "num_sanity_val_steps": 0},
        "model": {
            "start_from": "small",
            "model": model,
            "references": "none",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}},
            "loss": {"energy": 0.0, "forces": 1.0, **loss},
            "rates": {"model": 0.0} if model is BEHIND else {},
        },
        "data": {
            "class_path": "AtomisticDataModule",
            "init_args": {"train": "data.extxyz", "split": {"val": 4}, "max_structures": 8},
        },
        "ema": {"decay": 0.0},
    }
    Path("adapt.yaml").write_text(yaml.safe_dump(document))
    main(["fit", "-c", "adapt.yaml", "--trainer.default_root_dir=run"])
    return yaml.safe_load(Path("run/potential", CONFIG_FILE).read_text())["metadata"]


def test_the_prior_brings_structures_to_the_network_as_they_lie():
    told = fit(BEHIND, orientation=10.0)
    before, after = told["validation_before"], told["validation"]
    assert before["turn_mae"] > 60
    assert after["turn_mae"] < before["turn_mae"] / 3
    start, adapted = load_potential("small"), load_potential("run/potential")
    assert isinstance(adapted.model, Canonicalized)
    for (name, was), now in zip(
        start.model.named_parameters(), adapted.model.model.parameters(), strict=True
    ):
        assert torch.equal(was, now), f"{name} has rate 0"
    atoms = molecule("CH3OH")
    lying = adapted(adapted.build_graph(atoms), ("energy",))["energy"]
    atoms.positions = Rotation.from_rotvec([0.7, -1.3, 0.4]).apply(atoms.positions)
    assert adapted(adapted.build_graph(atoms), ("energy",))["energy"] == pytest.approx(
        lying.item(), abs=FASTER
    )


def test_a_network_that_chooses_no_orientation_has_no_prior(capsys):
    with pytest.raises(SystemExit):
        fit(SMALL, orientation=1.0)
    assert "put it into a Canonicalized model" in capsys.readouterr().err


def test_structures_without_an_orientation_do_not_count():
    potential = Potential(Canonicalized(FAENet(3.0, **FAENET), proper=True)).double()
    graph = potential.build_graph([molecule("CH3OH"), molecule("CO2"), molecule("C6H6")])
    orientation = potential(graph, ("orientation",))["orientation"]
    assert torch.isnan(orientation[1:]).all()
    prior = PotentialLoss(energy=0.0, orientation=2.0)({"orientation": orientation}, graph)
    alone = (orientation[0] - torch.eye(3)).square().mean()
    assert prior["loss"].item() == pytest.approx(2 * alone.item())
    prior["loss"].backward()
    gradients = [p.grad for p in potential.model.vectors.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(one).all() for one in gradients)


def test_a_plane_of_atoms_can_be_shown_tilted():
    """Polar vectors of a plane lie in it, so that frames made of them never tilt it."""
    model = Canonicalized(FAENet(3.0, **FAENET), proper=True).double()
    atoms = molecule("H2CO")
    atoms.positions = Rotation.from_euler("x", 50, degrees=True).apply(atoms.positions)
    atoms.numbers[2] = 9  # no mirror but that plane
    graph = Potential(model).build_graph(atoms)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        prior = (model.orientation(graph) - torch.eye(3)).square().mean()
        prior.backward()
        optimizer.step()
    assert angles_of(model.orientation(graph).detach()) < 10  # of 50
    turn = torch.tensor(Rotation.from_rotvec([0.7, -1.3, 0.4]).as_matrix())
    atoms.positions = atoms.positions @ turn.numpy().T
    again = model.orientation(Potential(model).build_graph(atoms))
    torch.testing.assert_close(again, turn @ model.orientation(graph))


def test_potentials_without_the_last_rotation_load(tmp_path):
    potential = Potential(Canonicalized(FAENet(3.0, **FAENET)))
    save_potential(potential, tmp_path / "new")
    node = yaml.safe_load((tmp_path / "new" / CONFIG_FILE).read_text())
    weights = {k: v for k, v in potential.model.state_dict().items() if k != "rest"}
    arguments, upgraded = Canonicalized.upgrade(1, node["model"]["init_args"], weights)
    assert node["model"]["checkpoint_version"] == 2
    assert arguments == node["model"]["init_args"]
    potential.model.load_state_dict(upgraded)


def test_angles_are_those_of_the_rotations():
    turns = Rotation.from_rotvec([[0, 0, 0], [0, 0, np.pi / 2], [0, np.pi, 0], [0.3, 0.4, 0]])
    found = angles_of(torch.tensor(turns.as_matrix()))
    assert found.tolist() == pytest.approx([0, 90, 180, np.degrees(0.5)], abs=1e-5)
