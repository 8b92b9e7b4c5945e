"""Networks of length and elements read off tables: as good as computed, of the latest weights."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from structures import RATTLED

from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn import radial_tables
from atomeq.nn.radial_tables import exact_radial_functions
from atomeq.ops.c_compiler import unavailable
from atomeq.ops.dispatch import use_backend
from atomeq.potential.checkpoint import untrained_potential
from atomeq.potential.derivatives import force_constants
from atomeq.potential.potential import Potential
from benchmarks.small_systems import operations_of

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
MODELS = ["escn", "esen", "equiformer_v2", "equiformer_v3", "mace"]

OF_FORCES = 1e-6  # of the largest force, what tables alone may change
OF_HESSIANS = 1e-4  # of the largest second derivative, likewise: polynomials meet in their slopes
SINGLE = 2e-5  # of the largest force: rounding in single precision


def potential_of(model: str, dtype: torch.dtype = torch.float32) -> Potential:
    potential = untrained_potential(CONFIGS / f"{model}.yaml", dtype=dtype)
    return potential.requires_grad_(False).eval()


def graph_of(potential: Potential, *names: str) -> AtomGraph:
    return potential.build_graph([RATTLED[name]() for name in names or ("crystal",)])


def forces_of(potential: Potential, graph: AtomGraph) -> torch.Tensor:
    return potential(graph, ("forces",))["forces"].double()


def used(potential: Potential) -> bool:
    tables = potential.model._tables
    return tables._pairs[1] is not None or bool(tables._made[1])


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("model", MODELS)
def test_tables_change_forces_less_than_rounding_does(model: str, monkeypatch) -> None:
    single, double = potential_of(model), potential_of(model, torch.float64)
    graph = graph_of(single, "crystal", "slab")
    exact = forces_of(double, graph)
    assert off(forces_of(single, graph), exact) < SINGLE
    assert used(single)
    assert not used(double)
    monkeypatch.setattr(radial_tables, "_SERVED", torch.float64)
    assert 0 < off(forces_of(double, graph), exact) < OF_FORCES
    assert used(double)


def test_second_derivatives_by_tables_are_those_of_the_networks(monkeypatch) -> None:
    double = potential_of("escn", torch.float64)
    graph = graph_of(double)
    exact = force_constants(double, graph, max_edges=10**5)
    monkeypatch.setattr(radial_tables, "_SERVED", torch.float64)
    found = force_constants(double, graph, max_edges=10**5)
    assert used(double)
    assert off(found, exact) < OF_HESSIANS


def test_weights_that_change_make_other_tables() -> None:
    potential = potential_of("escn")
    graph = graph_of(potential)
    before = forces_of(potential, graph)
    saved = {name: value.clone() for name, value in potential.state_dict().items()}
    for name in ("model.layers.0.message.radial.0.weight", "model.source_embedding.weight"):
        with torch.no_grad():
            potential.get_parameter(name).mul_(1.5)
        assert off(forces_of(potential, graph), before) > 1e-3
        with exact_radial_functions():
            assert off(forces_of(potential, graph), before) > 1e-3
            exact = forces_of(potential, graph)
        assert off(forces_of(potential, graph), exact) < SINGLE
    potential.load_state_dict(saved)
    assert torch.equal(forces_of(potential, graph), before)


def test_what_is_trained_double_or_asked_to_be_exact_is_computed() -> None:
    for potential in (potential_of("escn").requires_grad_(), potential_of("escn").double()):
        forces_of(potential, graph_of(potential))
        assert not used(potential)
    potential = potential_of("escn")
    graph = graph_of(potential)
    with exact_radial_functions():
        forces_of(potential, graph)
    assert not used(potential)
    with use_backend("reference"):
        forces_of(potential, graph)
    assert not used(potential)


def test_tables_follow_the_dtype() -> None:
    potential = potential_of("escn")
    graph = graph_of(potential)
    before = forces_of(potential, graph)
    exact = forces_of(potential.double(), graph)
    assert off(before, exact) < SINGLE
    assert torch.equal(forces_of(potential.float(), graph), before)


def test_copies_and_files_leave_the_tables_behind() -> None:
    potential = potential_of("escn")
    graph = graph_of(potential)
    forces = forces_of(potential, graph)
    for twin in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert used(potential)
        assert not used(twin)
        assert torch.equal(forces_of(twin, graph), forces)
    assert not any("_tables" in name for name in potential.state_dict())


def test_elements_that_come_later_get_tables_and_too_many_are_computed(monkeypatch) -> None:
    potential = potential_of("escn")
    crystal, both = graph_of(potential, "crystal"), graph_of(potential, "crystal", "slab")
    forces_of(potential, crystal)
    few = potential.model._tables._pairs[1].elements
    with exact_radial_functions():
        exact = forces_of(potential, both)
    assert off(forces_of(potential, both), exact) < SINGLE
    assert few < potential.model._tables._pairs[1].elements
    monkeypatch.setattr(radial_tables, "_LARGEST", 10**6)
    small = potential_of("escn")
    assert torch.equal(forces_of(small, both), exact)
    assert not used(small)


def test_one_crystal_alone_and_in_a_batch_have_the_same_forces() -> None:
    potential = potential_of("escn")
    alone, both = graph_of(potential, "crystal"), graph_of(potential, "crystal", "slab")
    first = forces_of(potential, alone)
    assert off(forces_of(potential, both)[: alone.n_atoms], first) < SINGLE
    assert torch.equal(forces_of(potential, alone), first)


@pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")
def test_few_operations_are_sent_for_energy_and_forces() -> None:
    assert operations_of("escn") <= 110
