"""The symmetric contraction: published couplings, independence, equivariance, two derivatives."""

import json
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atomeq.ops.coupling.symmetric_contraction import symmetric_contraction
from atomeq.ops.coupling.symmetric_contraction_basis import (
    published_columns,
    reduce_weights,
    symmetric_basis,
)
from atomeq.ops.harmonics.operations import spherical_harmonics

GOLDEN = Path(__file__).parents[1] / "golden" / "mace"
ROUNDING = 1e-12  # float64, sums of some thousand terms


def golden_couplings() -> list[tuple[str, int, int, int]]:
    """Name of the golden case, highest degree, degree and order of each coupling."""
    found = []
    for name in json.loads((GOLDEN / "ops.json").read_text())["U"]:
        irreps, wanted, order = name.split(".")
        found.append((name, irreps.count("+"), int(wanted[0]), int(order)))
    return found


def random_weights(lmax, degrees, order, *, n_species=2, channels=3):
    torch.manual_seed(3)
    return {
        l: [
            torch.randn(
                n_species, symmetric_basis(lmax, l, n).shape[2], channels, dtype=torch.float64
            )
            for n in range(1, order + 1)
        ]
        for l in degrees
    }


@pytest.mark.golden
@pytest.mark.parametrize(("name", "lmax", "l", "order"), golden_couplings())
def test_published_columns_are_the_reference_couplings_with_their_signs(name, lmax, l, order):
    """Contracted with one vector in every slot, as the product does."""
    golden = load_file(GOLDEN / "ops_f64.safetensors")
    probe = golden[f"probe.{name.split('.')[0]}.0"]
    index = list(combinations_with_replacement(range(len(probe)), order))
    values = torch.einsum(
        "mpk,p->mk", published_columns(lmax, l, order), probe[torch.tensor(index)].prod(dim=1)
    )
    theirs = golden[f"U_same.{name}"]
    assert values.shape == theirs.shape
    torch.testing.assert_close(values, theirs, rtol=0, atol=ROUNDING * theirs.abs().max().item())


@pytest.mark.parametrize(("name", "lmax", "l", "order"), golden_couplings())
def test_the_basis_is_independent_and_spans_the_couplings(name, lmax, l, order):
    rank = json.loads((GOLDEN / "ops.json").read_text())["U"][name]["rank_of_symmetric_part"]
    basis = symmetric_basis(lmax, l, order)
    assert torch.linalg.matrix_rank(basis.flatten(0, 1)) == basis.shape[2]
    assert rank is None or basis.shape[2] == rank
    columns = published_columns(lmax, l, order)
    weights = torch.eye(columns.shape[2], dtype=torch.float64)[None]
    again = basis @ reduce_weights(weights, lmax, l, order)[0]
    torch.testing.assert_close(again, columns, rtol=0, atol=1e-12)


def test_it_turns_with_its_features_and_mirrors_are_told():
    weights = random_weights(2, (0, 1, 2), 3)
    vectors = torch.randn(4, 5, 3, dtype=torch.float64)
    mixing = torch.randn(4, 5, 3, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q

    def contract(vectors):
        x = torch.einsum("nes,nec->nsc", spherical_harmonics(vectors, 2), mixing)
        return symmetric_contraction(x, weights, torch.tensor([0, 1, 1, 0]))

    before = contract(vectors)
    for turn in (rotation, -rotation):
        after = contract(vectors @ turn.T)
        torch.testing.assert_close(after[0], before[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after[1], turn @ before[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after[2].norm(dim=1), before[2].norm(dim=1))


def test_first_and_second_derivatives():
    weights = random_weights(1, (0, 1), 3, channels=2)
    flat = [w.requires_grad_() for some in weights.values() for w in some]
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def contract(x, *flat):
        given = {0: flat[:3], 1: flat[3:]}
        return tuple(symmetric_contraction(x, given, torch.tensor([0, 1])).values())

    assert torch.autograd.gradcheck(contract, (x, *flat))
    assert torch.autograd.gradgradcheck(contract, (x, *flat))


def test_wrong_weights_and_features_are_refused():
    weights = random_weights(2, (0,), 2)
    with pytest.raises(ValueError, match="5 components"):
        symmetric_contraction(torch.zeros(1, 5, 3), weights, torch.tensor([0]))
    with pytest.raises(ValueError, match="degree 0, order 2 have 3 columns"):
        symmetric_contraction(torch.zeros(1, 4, 3).double(), weights, torch.tensor([0]))
