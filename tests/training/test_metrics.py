"""Errors over a set do not depend on its batches."""

import pytest
import torch

from atomeq.graph.atom_graph import AtomGraph
from atomeq.training.metrics import PotentialErrors
from atomeq.units import GPA

EXACT = 1e-12  # sums are in float64


def single(n_atoms: int, seed: int) -> tuple[AtomGraph, dict]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    graph = AtomGraph(
        random(n_atoms, 3),
        torch.full((n_atoms,), 29),
        energy=random(1),
        forces=random(n_atoms, 3),
        stress=random(1, 3, 3),
    )
    prediction = {"energy": random(1), "forces": random(n_atoms, 3), "stress": random(1, 3, 3)}
    return graph, prediction


def joined(pairs: list[tuple[AtomGraph, dict]]) -> tuple[dict, AtomGraph]:
    graph = AtomGraph.concatenate([graph for graph, _ in pairs])
    return {key: torch.cat([p[key] for _, p in pairs]) for key in pairs[0][1]}, graph


@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_errors_do_not_depend_on_batches(sizes: list[int]):
    pairs = [single(n_atoms=1 + k, seed=k) for k in range(5)]
    metric = PotentialErrors()
    start = 0
    for size in sizes:
        metric.update(*joined(pairs[start : start + size]))
        start += size
    errors = metric.compute()

    prediction, graph = joined(pairs)
    energy = prediction["energy"] - graph.energy
    forces = prediction["forces"] - graph.forces
    stress = (prediction["stress"] - graph.stress) / GPA
    expected = {
        "energy_mae": energy.abs().mean(),
        "energy_rmse": energy.square().mean().sqrt(),
        "energy_per_atom_mae": 1e3 * (energy / graph.natoms).abs().mean(),
        "energy_per_atom_rmse": 1e3 * (energy / graph.natoms).square().mean().sqrt(),
        "forces_mae": 1e3 * forces.abs().mean(),
        "forces_rmse": 1e3 * forces.square().mean().sqrt(),
        "stress_mae": stress.abs().mean(),
        "stress_rmse": stress.square().mean().sqrt(),
    }
    assert errors.keys() == expected.keys()
    for name, value in expected.items():
        assert float(errors[name]) == pytest.approx(float(value), rel=EXACT), name


def test_unknown_labels_are_left_out():
    graph, prediction = single(2, seed=0)
    forces = graph.forces.clone()
    forces[0] = float("nan")
    graph = graph.replace(forces=forces, stress=None)
    metric = PotentialErrors()
    metric.update(prediction, graph)
    errors = metric.compute()
    expected = 1e3 * (prediction["forces"] - graph.forces)[1].abs().mean()
    assert float(errors["forces_mae"]) == pytest.approx(float(expected), rel=EXACT)
    assert "stress_mae" not in errors


def test_reset_forgets():
    metric = PotentialErrors()
    metric.update(*reversed(single(2, seed=0)))
    metric.reset()
    assert not any(bool(getattr(metric, name)) for name in metric._defaults)
