"""EquiHGNN's own promises: no molecule knows its batch, small ones are fine, checkpoints nest."""

from functools import partial
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from lightning.pytorch import Callback, Trainer
from published.equihgnn import Molecules, PublishedEquiHGNN
from scipy.spatial.transform import Rotation

from atomeq.data.datamodule import AtomisticDataModule
from atomeq.graph.builders import HyperGraph, RadiusGraph
from atomeq.graph.hyperedges import INFO_KEY, fix_topology
from atomeq.models.base import AtomisticModel
from atomeq.models.egnn import EGNN
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.equihgnn import EquiHGNN
from atomeq.models.escn import ESCN
from atomeq.models.faenet import FAENet
from atomeq.models.frame_averaged import FrameAveraged
from atomeq.models.segno import SEGNO
from atomeq.potential.checkpoint import load_potential, save_potential
from atomeq.potential.potential import Potential
from atomeq.training.task import AtomisticTask

SMALL = ["H", "H2", "H2O", "CH4", "C6H6", "CH3CONH2"]


def small_encoder(name: str) -> AtomisticModel | None:
    makers = {
        "egnn": lambda: EGNN(4.0, num_layers=2, hidden_channels=8),
        "escn": lambda: ESCN(4.0, num_layers=1, sphere_channels=8, hidden_channels=8),
        "segno": lambda: SEGNO(4.0, hidden_channels=8),
        "equiformer_v2": lambda: EquiformerV2(
            4.0,
            lmax=1,
            mmax=1,
            num_layers=1,
            sphere_channels=8,
            attn_hidden_channels=8,
            num_heads=2,
            attn_alpha_channels=4,
            attn_value_channels=4,
            ffn_hidden_channels=8,
            edge_channels=8,
        ),
        "faenet": lambda: FrameAveraged(
            FAENet(
                4.0,
                hidden_channels=24,
                num_filters=8,
                num_interactions=1,
                num_gaussians=8,
                pg_channels=4,
            )
        ),
        "none": lambda: None,
    }
    return makers[name]()


def generic_potential(encoder: str = "egnn", **options) -> Potential:
    """A potential without the zeros of its initialisation, in float64."""
    torch.manual_seed(0)
    model = EquiHGNN(small_encoder(encoder), num_layers=2, hidden_channels=8, **options)
    potential = Potential(model).double().eval()
    for parameter in potential.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return potential


def compute(potential: Potential, structures) -> dict[str, np.ndarray]:
    results = potential(potential.build_graph(structures), ("energy", "forces"))
    return {key: value.detach().numpy() for key, value in results.items()}


@pytest.mark.parametrize("encoder", ["egnn", "escn", "segno", "faenet", "equiformer_v2"])
@pytest.mark.parametrize("layer", ["mhnn", "mhnns", "mhnnm"])
def test_batch_equals_single(layer: str, encoder: str):
    potential = generic_potential(encoder, layer=layer)
    structures = [molecule(name) for name in SMALL]
    together = compute(potential, structures)
    apart = [compute(potential, structure) for structure in structures]
    for key in ("energy", "forces"):
        expected = np.concatenate([result[key] for result in apart])
        np.testing.assert_allclose(together[key], expected, rtol=0, atol=1e-12)


def labelled_molecules(path: Path) -> Path:
    """Molecules of several sizes with energies and forces of EMT."""
    frames = []
    for k, name in enumerate(["H2O", "CH4", "CH3OH", "NH3", "C2H4", "HCN"]):
        atoms = molecule(name)
        atoms.rattle(0.05, seed=k)
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    ase.io.write(path, frames)
    return path


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own use of PyTorch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("encoder", ["egnn", "segno", "faenet", "escn", "equiformer_v2"])
def test_fit_steps_reach_encoder_and_hypergraph(tmp_path: Path, encoder: str):
    """Energies and forces of a batch of molecules train every weight that the energy stands on."""
    torch.manual_seed(0)
    model = EquiHGNN(small_encoder(encoder), num_layers=2, hidden_channels=8)
    task = AtomisticTask(model, optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0))
    data = AtomisticDataModule(train=labelled_molecules(tmp_path / "set.extxyz"), max_structures=6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = LossRecorder()
    trainer = Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=losses,
    )
    trainer.fit(task, datamodule=data)
    assert losses.values[-1] < 0.9 * losses.values[0]
    graph = task.potential.build_graph([molecule("CH3OH"), molecule("H2O")])
    task.potential(graph, ("energy",))["energy"].sum().backward()
    used = [name for name, p in model.named_parameters() if p.grad is not None]
    assert {"encoder", "projection", "convolutions", "energy"} <= {n.split(".")[0] for n in used}
    unmoved = [n for n in used if torch.equal(before[n], dict(model.named_parameters())[n])]
    assert not unmoved


class LossRecorder(Callback):
    """Keeps the training loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def test_a_graph_without_geometry_sees_the_topology_alone():
    potential = generic_potential("none")
    left, right = molecule("CH3CH2OH"), molecule("CH3OCH3")
    moved = left.copy()
    moved.rattle(0.05, seed=0)
    values = [
        float(potential(potential.build_graph(atoms), ("energy",))["energy"].detach())
        for atoms in (left, moved, right)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    assert abs(values[0] - values[2]) > 1e-6


@pytest.mark.parametrize("layer", ["mhnn", "mhnns", "mhnnm"])
def test_hyperedges_count(layer: str):
    """The same atoms with and without their topology have different energies."""
    potential = generic_potential(layer=layer, perceive=False)
    bare, fixed = molecule("C6H6"), molecule("C6H6")
    fix_topology(fixed)
    energies = compute(potential, [bare, fixed])["energy"]
    assert abs(energies[0] - energies[1]) > 1e-6


@pytest.mark.parametrize("encoder", ["egnn", "segno", "escn", "faenet", "equiformer_v2"])
def test_laws_hold_with_hyperedges(encoder: str):
    potential = generic_potential(encoder)
    atoms = molecule("CH3CONH2")
    atoms.rattle(0.03, seed=0)
    fix_topology(atoms)
    before = compute(potential, atoms)
    turned = atoms.copy()
    matrix = Rotation.from_rotvec([0.3, 1.0, -0.4]).as_matrix()
    turned.positions = turned.positions @ matrix.T
    after = compute(potential, turned)
    np.testing.assert_allclose(after["energy"], before["energy"], rtol=0, atol=1e-11)
    np.testing.assert_allclose(after["forces"], before["forces"] @ matrix.T, rtol=0, atol=1e-11)
    order = np.random.default_rng(0).permutation(len(atoms))
    shuffled = atoms[order]
    fix_topology(shuffled)
    after = compute(potential, shuffled)
    np.testing.assert_allclose(after["energy"], before["energy"], rtol=0, atol=1e-11)
    np.testing.assert_allclose(after["forces"], before["forces"][order], rtol=0, atol=1e-11)
    ends = []
    for step in (1e-4, -1e-4):
        moved = atoms.copy()
        moved.positions[1, 0] += step
        ends.append(compute(potential, moved)["energy"][0])
    difference = -(ends[0] - ends[1]) / 2e-4
    assert before["forces"][1, 0] == pytest.approx(difference, abs=1e-6)


def test_fixed_topology_survives_a_broken_bond():
    """Perceived anew the energy jumps as the bond breaks; fixed at the start it does not."""
    perceived = generic_potential()
    atoms = molecule("H2O")
    fix_topology(atoms)
    jumps = {}
    for fixed in (True, False):
        energies = []
        for stretch in np.linspace(0.2, 0.5, 31):
            moved = atoms.copy()
            if not fixed:
                del moved.info[INFO_KEY]
            moved.positions[1] += stretch * (atoms.positions[1] - atoms.positions[0])
            energies.append(compute(perceived, moved)["energy"][0])
        jumps[fixed] = np.abs(np.diff(energies, 2)).max()
    assert jumps[True] < 1e-2 * jumps[False]


@pytest.mark.parametrize("encoder", ["egnn", "faenet", "equiformer_v2", "none"])
def test_checkpoint_keeps_the_encoder(tmp_path, encoder: str):
    potential = generic_potential(encoder)
    save_potential(potential, tmp_path / "saved")
    loaded = load_potential(tmp_path / "saved")
    assert loaded.model.config() == potential.model.config()
    graph = potential.build_graph(molecule("CH3OH"))
    ours, theirs = (p(graph, ("energy",))["energy"] for p in (potential, loaded))
    # Not bit for bit: matrix products may round by the alignment of a tensor in memory.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_errors_name_the_way_out():
    model = EquiHGNN(EGNN(4.0, num_layers=1, hidden_channels=8))
    with pytest.raises(ValueError, match=r"no hyperedges.*HyperGraph"):
        model(RadiusGraph(4.0)(molecule("H2O")))


class Mute(AtomisticModel):
    """A model that keeps its features to itself."""

    cutoff = 3.0


def test_an_encoder_must_offer_features():
    with pytest.raises(NotImplementedError, match="Mute does not offer node_features"):
        EquiHGNN(Mute())


def test_encoders_see_no_other_molecule():
    """The published encoder takes a batch for one cloud; ours gives each molecule its own edges."""
    graph = HyperGraph(4.0)([molecule("CH4"), molecule("H2O")])
    source, target = graph.edge_index
    assert torch.equal(graph.batch[source], graph.batch[target])


def test_published_form_bears_molecules_without_large_hyperedges():
    """The reference crashes where the last molecule of a batch has none."""
    model = PublishedEquiHGNN("mhnn", channels=8, output_channels=4).eval()
    x = torch.zeros(5, 9, dtype=torch.int64)
    molecules = Molecules(
        x=x,
        incidence=torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 1]]),
        types=torch.tensor([5, 0]),
        orders=torch.tensor([3, 2]),
        n_hyperedges=torch.tensor([1, 1]),
        batch=torch.tensor([0, 0, 0, 1, 1]),
    )
    assert model(molecules).shape == (2,)


def test_published_encoder_names_its_limit():
    model = PublishedEquiHGNN("mhnns", geometry=True, channels=8)
    with pytest.raises(ValueError, match="at least 16 atoms"):
        model.egnn_layer(torch.zeros(3, 8), torch.rand(3, 3))


def test_one_atom_alone():
    result = compute(generic_potential(), Atoms("O"))
    assert np.isfinite(result["energy"]).all()
    np.testing.assert_array_equal(result["forces"], 0.0)
