"""What processes compute of their own atoms adds up to the whole."""

import pytest
import torch
from ase.build import bulk
from small_models import EGNN, SMALL_MODELS, node, wrapped
from small_potential import small_potential
from torch import Tensor

from atomeq.calculators.shares import refuse_shares, share, surroundings
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import build_model, scatter_weights
from atomeq.potential.mean import MeanPotential
from atomeq.potential.potential import Potential
from atomeq.potential.repulsion import ZBL

ROUNDING = 1e-10  # eV, eV/Å


def crystal(potential: Potential) -> AtomGraph:
    atoms = bulk("Cu", cubic=True, a=3.6).repeat((6, 1, 1))
    atoms.symbols[::5] = "Al"
    atoms.rattle(0.05, seed=0)
    return potential.build_graph(atoms)


def added(potential: Potential, graph: AtomGraph, owners: Tensor) -> list[Tensor]:
    parts = [
        share(potential, graph, torch.nonzero(owners == one)[:, 0])
        for one in range(int(owners.max()) + 2)  # the last has no atoms
    ]
    return [torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", ["egnn", "escn", "mace"])
def test_shares_of_three_add_up(name: str) -> None:
    torch.manual_seed(0)
    potential = Potential(build_model(SMALL_MODELS[name]), terms=[ZBL(1.5)])
    potential = potential.double().eval().requires_grad_(False)
    scatter_weights(potential)
    graph = crystal(potential)
    expected = potential(graph, ("energy", "forces", "stress"))
    owners = torch.randint(3, (graph.n_atoms,), generator=torch.Generator().manual_seed(0))
    domains = (graph.pos[:, 0] / graph.cell[0, 0, 0] * 3).floor().clamp(0, 2).long()
    for mine in (owners, domains):
        energy, by_position, by_strain = added(potential, graph, mine)
        torch.testing.assert_close(energy, expected["energy"], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(-by_position, expected["forces"], atol=ROUNDING, rtol=0)
        stress = by_strain / graph.volume()
        torch.testing.assert_close(stress, expected["stress"][0], atol=ROUNDING, rtol=0)


def test_a_part_is_as_deep_as_is_declared_and_no_deeper() -> None:
    potential = small_potential(cutoff=3.0)
    graph = crystal(potential)
    own = torch.tensor([0, 1, 2])
    part, atoms, within = surroundings(graph, own, 2)
    assert within == sorted(within) == [3, within[1], part.n_atoms]
    assert atoms[:3].tolist() == [0, 1, 2]
    assert len(own) < part.n_atoms < graph.n_atoms
    assert part.n_edges < graph.n_edges
    assert bool((part.edge_index[1].diff() >= 0).all())
    potential.requires_grad_(False)
    whole = potential.evaluate(graph)["energies"][own]
    torch.testing.assert_close(potential.evaluate(part)["energies"][:3], whole)
    thinner, _, _ = surroundings(graph, own, 1)
    wrong = potential.evaluate(thinner)["energies"][:3] - whole
    assert float(wrong.abs().max()) > 1e-6


def test_what_cannot_be_divided_is_refused() -> None:
    direct = node("equiformer_v2", "EquiformerV2", num_layers=1, direct_forces=True)
    for model, words in (
        (SMALL_MODELS["faenet"], "declares no receptive depth"),
        (direct, "forces of its own"),
        (wrapped("charged", "Charged", model=EGNN), "told of the electrons"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_shares(Potential(build_model(model)))
    with pytest.raises(ValueError, match="is a MeanPotential"):
        refuse_shares(MeanPotential([small_potential(), small_potential()]))
