"""OC20's metrics by hand and against the published implementation's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from atomeq.graph.atom_graph import AtomGraph
from atomeq.training.losses import PotentialLoss
from atomeq.training.oc20_metrics import (
    OC20Errors,
    average_distance_within_threshold,
    mean_distance,
)

FLOAT32 = 1e-6  # relative; the golden numbers were summed in float32
NAMES = {
    "forces_cosine_similarity": "forces_cosine",
    "energy_forces_within_threshold": "efwt",
    "energy_within_threshold": "ewt",
}


def batch(natoms: list[int], energy: list[float], forces: object, **fields: object) -> AtomGraph:
    n_atoms = sum(natoms)
    return AtomGraph(
        torch.zeros(n_atoms, 3),
        torch.ones(n_atoms, dtype=torch.int64),
        natoms=torch.tensor(natoms),
        energy=torch.tensor(energy, dtype=torch.float64),
        forces=torch.as_tensor(forces, dtype=torch.float64),
        weight=torch.ones(len(natoms)),
        **{name: torch.as_tensor(value) for name, value in fields.items()},
    )


def measured(prediction: dict, *graphs: AtomGraph) -> dict[str, float]:
    metric = OC20Errors()
    for graph in graphs:
        metric.update(prediction, graph)
    return {name: float(value) for name, value in metric.compute().items()}


def test_metrics_are_the_published_ones(formats_folder: Path):
    golden = json.loads((formats_folder / "metrics_golden.json").read_text())
    graph = batch(golden["natoms"], golden["energy"], golden["forces"])
    results = measured(
        {
            "energy": torch.tensor(golden["pred_energy"], dtype=torch.float64),
            "forces": torch.tensor(golden["pred_forces"]),
        },
        graph,
    )
    for task in ("s2ef", "is2re"):
        for name, expected in golden[task].items():
            value = results[NAMES.get(name, name)]
            assert value == pytest.approx(expected["metric"], rel=FLOAT32), name


@pytest.fixture
def graph() -> AtomGraph:
    """Two structures of two atoms; the first atom of each is fixed."""
    return batch(
        [2, 2],
        [1.0, 2.0],
        [[9.0, 0, 0], [1.0, 0, 0], [0, 9.0, 0], [0, 2.0, 0]],
        fixed=[True, False, True, False],
    )


@pytest.fixture
def prediction() -> dict:
    return {
        "energy": torch.tensor([1.01, 2.5]),
        "forces": torch.tensor([[0.0, 0, 0], [1.02, 0, 0], [0, 0, 0], [0, 0, 1.0]]),
    }


def test_fixed_atoms_do_not_count(graph: AtomGraph, prediction: dict):
    results = measured(prediction, graph)
    assert results["energy_mae"] == pytest.approx((0.01 + 0.5) / 2, rel=1e-5)
    assert results["ewt"] == 0.5
    assert results["forces_mae"] == pytest.approx((0.02 + 2.0 + 1.0) / 6, rel=1e-5)
    assert results["forces_cosine"] == pytest.approx(0.5)
    assert results["forces_magnitude_error"] == pytest.approx((0.02 + 1.0) / 2, rel=1e-5)
    assert results["efwt"] == 0.5
    everything = measured(prediction, graph.replace(fixed=None))
    assert everything["efwt"] == 0.0


def test_metrics_do_not_depend_on_batches(graph: AtomGraph, prediction: dict):
    together = measured(prediction, graph)
    metric = OC20Errors()
    for k, single in enumerate(graph.to_list()):
        part = {
            "energy": prediction["energy"][k : k + 1],
            "forces": prediction["forces"][2 * k : 2 * k + 2],
        }
        metric.update(part, single)
    for name, value in metric.compute().items():
        assert float(value) == pytest.approx(together[name], rel=1e-12)


def test_unknown_labels_do_not_count(graph: AtomGraph, prediction: dict):
    nan = float("nan")
    forces = graph.forces.clone()
    forces[3] = nan
    partly = graph.replace(energy=torch.tensor([nan, 2.0]), forces=forces)
    results = measured(prediction, partly)
    assert results["energy_mae"] == pytest.approx(0.5)
    assert results["forces_mae"] == pytest.approx(0.02 / 3, rel=1e-4)
    assert "efwt" not in results  # no structure has both
    without = graph.replace(energy=None, forces=None)
    assert measured(prediction, without) == {}


def test_energies_alone_are_measured(graph: AtomGraph, prediction: dict):
    results = measured({"energy": prediction["energy"]}, graph)
    assert set(results) == {"energy_mae", "energy_mse", "ewt"}


def test_published_loss_by_hand(graph: AtomGraph, prediction: dict):
    loss = PotentialLoss(
        energy=2.0, forces=100.0, kind="l2mae", energy_per="structure", free_atoms_only=True
    )
    terms = loss(prediction, graph)
    assert float(terms["energy"]) == pytest.approx((0.01 + 0.5) / 2, rel=1e-5)
    assert float(terms["forces"]) == pytest.approx((0.02 + 5**0.5) / 2, rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(float(2 * terms["energy"] + 100 * terms["forces"]))


def test_published_loss_has_a_gradient_where_a_force_is_right(graph: AtomGraph):
    forces = graph.forces.clone().requires_grad_()
    loss = PotentialLoss(energy=0.0, forces=1.0, kind="l2mae", free_atoms_only=True)
    loss({"forces": forces}, graph)["loss"].backward()
    assert forces.grad is not None
    assert torch.isfinite(forces.grad).all()


def test_fixed_atoms_do_not_train(graph: AtomGraph, prediction: dict):
    forces = prediction["forces"].clone().requires_grad_()
    loss = PotentialLoss(energy=0.0, forces=1.0, free_atoms_only=True)
    loss({"forces": forces}, graph)["loss"].backward()
    assert forces.grad is not None
    assert not forces.grad[graph["fixed"]].any()
    assert forces.grad[~graph["fixed"]].any()


def test_distances_are_to_the_nearest_image():
    cell = np.array([[4.0, 0, 0], [2.0, 3.0, 0], [0, 0, 9.0]])
    reference = np.random.default_rng(0).uniform(0, 3, (5, 3))
    moved = reference + [0.3, 0, 0] + np.array([1, -2, 1]) @ cell
    assert mean_distance(moved, reference, cell) == pytest.approx(0.3)


def test_adwt_by_hand():
    assert average_distance_within_threshold([0.0, 1.0]) == 0.5
    assert average_distance_within_threshold([0.2545]) == pytest.approx(245 / 490)
    with pytest.raises(ValueError, match="no systems"):
        average_distance_within_threshold([])
