"""Tuples of edges, and products of their vectors against inner, cross and triple products."""

import torch

from atomeq.models.geometric_algebra import edge_tuples
from atomeq.nn.multivector_attention import invariants_of, products_of, vectors_of

EXACT = 1e-13


def test_products_of_vectors_are_inner_cross_and_triple_products() -> None:
    a, b, c = torch.randn(3, 5, 3, dtype=torch.float64)
    points = [torch.nn.functional.pad(x, (1, 4)) for x in (a, b, c)]
    (triple, three), (pair, two), (single, one) = products_of(points, "partial")
    assert (three, two, one) == (3, 2, 1)
    cross = torch.linalg.cross(a, b)
    scalar, area = invariants_of(pair, 2, vector=True).unbind(1)
    assert (scalar - (a * b).sum(1)).abs().max() <= EXACT
    assert (area - cross.norm(dim=1)).abs().max() <= EXACT
    assert (vectors_of(pair, 2) - cross).abs().max() <= EXACT
    volume = invariants_of(triple, 3, vector=True)[:, 1]
    assert (volume - (cross * c).sum(1)).abs().max() <= EXACT
    assert torch.equal(vectors_of(single, 1), a)
    assert len(products_of(points, "full")) == 6
    assert len(products_of(points, "single")) == 1


def test_gradients_are_finite_where_points_are_in_line() -> None:
    a = torch.randn(1, 3, dtype=torch.float64).requires_grad_()
    point = torch.nn.functional.pad(a, (1, 4))
    for floor in (0.0, 1e-2):
        (product, n), *_ = products_of([point, 2 * point], "single")
        invariants = invariants_of(product, n, vector=False, floor=floor)
        assert torch.isfinite(torch.autograd.grad(invariants.sum(), a)[0]).all()


def test_tuples_are_all_edges_of_one_target() -> None:
    target = torch.tensor([2, 0, 2, 2, 0])
    found = {tuple(t) for t in torch.stack(edge_tuples(target, 4, 3), dim=1).tolist()}
    expected = {
        (a, b, c)
        for a in range(5)
        for b in range(5)
        for c in range(5)
        if len({int(target[k]) for k in (a, b, c)}) == 1
    }
    assert found == expected
    assert len(edge_tuples(target, 4, 3)[0]) == len(expected)
