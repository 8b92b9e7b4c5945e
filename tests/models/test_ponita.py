"""PONITA: what its published grid breaks, and what our directions mend; its modes and refusals."""

import numpy as np
import pytest
import torch
from structures import rattled_molecule

from atomeq.models.ponita import PONITA
from atomeq.models.ponita_published import PositionOrientationNetwork, PublishedPONITA
from atomeq.potential.potential import Potential

SMALL = {"hidden_channels": 8, "basis_channels": 6, "num_layers": 2}
EXACT = 1e-12
PUBLISHED_SIZE = 1_058_437  # parameters, of the reference's experiment on rMD17
TURN = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]


def energies(model, structures) -> np.ndarray:
    potential = Potential(model).double().eval()
    return potential(potential.build_graph(structures), ("energy",))["energy"].detach().numpy()


@pytest.mark.parametrize(("num_ori", "exact"), [(8, False), (9, False), (-1, True), (0, True)])
def test_only_the_published_grid_breaks_rotations(num_ori: int, exact: bool) -> None:
    model = PublishedPONITA(1.9 if num_ori < 0 else 100.0, num_ori=num_ori, **SMALL)
    atoms = rattled_molecule()
    other = atoms.copy()
    other.positions = atoms.positions @ TURN.T
    before, after = energies(model, [atoms, other])
    assert (abs(after - before) < EXACT) == exact
    assert ("rotation" in model.exempt_laws) == (not exact)


def test_the_grid_is_among_the_weights() -> None:
    assert "network.ori_grid" in PublishedPONITA(**SMALL).state_dict()


def test_the_published_size() -> None:
    assert sum(p.numel() for p in PublishedPONITA().parameters()) == PUBLISHED_SIZE


@pytest.mark.parametrize("radius", [None, 3.0])
def test_opposite_directions_share_kernels_and_change_nothing(radius: float | None) -> None:
    """A grid whose order hides the opposites takes the long way."""
    network = PositionOrientationNetwork(2, 1, 1, num_ori=6, radius=radius, **SMALL).double()
    pos = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    edges = torch.combinations(torch.arange(5)).T
    edges = torch.cat([edges, edges.flip(0)], dim=1)
    given = torch.randn(5, 2, dtype=torch.float64), pos, edges
    batch = torch.zeros(5, dtype=torch.long)
    found = []
    for order in (list(range(6)), [0, 1, 3, 4, 5, 2]):
        network.ori_grid = network.ori_grid[order]
        space = network.space(pos, edges, batch)
        assert space.mirrored == (order[2] == 2)
        scalars, vectors = network(*given, batch=batch)
        assert vectors is not None
        loss = scalars.sin().sum() + vectors.cos().sum()
        found.append((scalars, vectors, torch.autograd.grad(loss, pos)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


def test_vectors_turn_along_and_batch() -> None:
    model = PONITA(3.5, direction_cutoff=2.5, **SMALL).double().eval()
    structures = [rattled_molecule(), rattled_molecule()[:5], rattled_molecule()[:1]]
    builder = model.graph_builder()
    apart = torch.cat([model.node_vectors(builder(atoms)) for atoms in structures])
    torch.testing.assert_close(model.node_vectors(builder(structures)), apart, rtol=0, atol=EXACT)
    for atoms in structures:
        atoms.positions = atoms.positions @ TURN.T
    turned = model.node_vectors(builder(structures))
    expected = torch.from_numpy(TURN) @ apart
    torch.testing.assert_close(turned, expected, rtol=0, atol=EXACT)
    assert float(apart.detach().abs().max()) > 1e-3


def test_directions_are_within_the_cutoff() -> None:
    with pytest.raises(ValueError, match="beyond the cutoff"):
        PONITA(3.0, direction_cutoff=4.0)


def test_positions_alone_give_no_vectors() -> None:
    with pytest.raises(ValueError, match="no vectors"):
        PositionOrientationNetwork(1, 1, 1, num_ori=0)
