"""A large structure is computed some atoms at a time: the same numbers, in less memory."""

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from atomeq.models.escn import ESCN
from atomeq.potential import blocks
from atomeq.potential.checkpoint import scatter_weights
from atomeq.potential.derivatives import force_constants
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.repulsion import ZBL

EXACT = 1e-12  # relative, of sums in another order in float64
AT_ONCE = 40  # edges; some atoms here have 18


@pytest.fixture
def potential():
    model = ESCN(
        4.0, lmax=1, mmax=1, num_layers=2, sphere_channels=4, hidden_channels=4, edge_channels=4,
        num_radial=3,
    )  # fmt: skip
    references = AtomicReferences({1: -0.5, 8: -2.0, 29: -3.0}, scale=1.7)
    potential = Potential(model.double(), references, terms=[ZBL(1.2)]).double()
    scatter_weights(potential)
    return potential.requires_grad_(False).eval()


@pytest.fixture
def graph(potential):
    """Two crystals, one of them smaller than the cutoff, a molecule, and an atom alone."""
    crystals = [bulk("Cu", cubic=True).repeat((2, 2, 1)), bulk("Cu")]
    box = molecule("H2O", cell=[20, 20, 20]) + Atoms("O", [[10, 10, 10]])
    for k, atoms in enumerate([*crystals, box]):
        atoms.rattle(0.1, seed=k)
    return potential.build_graph([*crystals, box])


@pytest.fixture
def sizes(monkeypatch):
    """Return the edges of each block that is computed, in the order of computation."""
    seen: list[int] = []
    run = blocks.Block.run

    def counted(block, *given):
        seen.append(block.graph.n_edges)
        return run(block, *given)

    monkeypatch.setattr(blocks.Block, "run", counted)
    monkeypatch.setattr(blocks, "_EDGES", AT_ONCE)
    return seen


def whole(monkeypatch, evaluate):
    """Return what it gives without blocks."""
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "divisible", lambda *_: False)
        patch.setattr("atomeq.potential.potential.divisible", lambda *_: False)
        return evaluate()


def same(found, wanted):
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=EXACT, atol=EXACT, msg=key)


def test_blocks_give_the_numbers_of_the_whole(potential, graph, sizes, monkeypatch):
    wanted = whole(monkeypatch, lambda: potential(graph, ("energy", "energies", "forces")))
    assert not sizes
    same(potential(graph, ("energy", "energies", "forces")), wanted)
    assert sum(sizes) == 5 * graph.n_edges  # three stages, computed twice but for the last
    most = int(torch.bincount(graph.edge_index[1]).max())
    assert max(sizes) < AT_ONCE + most < graph.n_edges / 4


def test_blocks_give_stress(potential, graph, sizes, monkeypatch):
    crystals = graph.take(torch.tensor([0, 1]))
    wanted = whole(monkeypatch, lambda: potential(crystals, ("forces", "stress")))
    same(potential(crystals, ("forces", "stress")), wanted)
    assert sizes


def test_energies_alone_are_computed_in_blocks_too(potential, graph, sizes, monkeypatch):
    with torch.no_grad():
        wanted = whole(monkeypatch, lambda: potential(graph, ("energies",)))
        same(potential(graph, ("energies",)), wanted)
    assert sum(sizes) == 3 * graph.n_edges  # once each stage


def test_any_sum_of_energies_is_differentiated(potential, graph, sizes):
    weights = torch.linspace(-1, 2, graph.n_atoms, dtype=torch.float64)

    def gradient(energies_of):
        pos = graph.pos.clone().requires_grad_()
        energies = energies_of(graph.replace(pos=pos))
        return torch.autograd.grad((weights * energies).sum(), pos)[0]

    found = gradient(lambda given: blocks.energies_in_blocks(potential.model, given))
    assert sizes
    wanted = gradient(lambda given: potential.model(given)["energies"])
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)


def test_what_is_differentiated_twice_is_computed_whole(potential, graph, sizes):
    forces = potential(graph, create_graph=True)["forces"]
    assert forces.requires_grad
    hessian = force_constants(potential, graph.graph(0), max_edges=1000)
    assert hessian.any()
    assert not sizes


def test_edges_that_are_not_in_order_are_computed_whole(potential, graph, sizes, monkeypatch):
    wanted = whole(monkeypatch, lambda: potential(graph))
    shuffled = torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(0))
    mixed = graph.replace(
        edge_index=graph.edge_index[:, shuffled], cell_offsets=graph.cell_offsets[shuffled]
    )
    same(potential(mixed), wanted)
    assert not sizes
