"""The symmetric contraction: published couplings, independence, equivariance, two derivatives."""

import json
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atomeq.ops.coupling.symmetric_contraction import symmetric_contraction
from atomeq.ops.coupling.symmetric_contraction_basis import (
    SymmetricForm,
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


def call_of(form, *, n_atoms=4, n_species=3, channels=3, dtype=torch.float64):
    """Features, weights and species of a form; the species are mixed."""
    torch.manual_seed(3)
    x = torch.randn(n_atoms, form.n_components, channels, dtype=dtype, requires_grad=True)
    weights = torch.randn(n_species, form.n_columns, channels, dtype=dtype, requires_grad=True)
    return x, weights, torch.arange(n_atoms).remainder(n_species).flip(0)


def contract(x, weights, species, form):
    return symmetric_contraction(x, weights, species, degrees=form.degrees, order=form.order)


def naive(x, weights, species, form):
    """The definition, term by term."""
    rows = [torch.zeros_like(x[:, 0]) for _ in range(form.n_rows)]
    for monomial, column, row, coefficient in form.terms():
        product = coefficient * weights[species][:, column]
        for i in monomial:
            product = product * x[:, i]
        rows[row] = rows[row] + product
    return torch.stack(rows, dim=1)


def derivatives(function, x, weights, species, form):
    """Value, gradients, and gradients of a function of the gradients."""
    torch.manual_seed(4)
    value = function(x, weights, species, form)
    slopes = torch.autograd.grad(value, (x, weights), torch.randn_like(value), create_graph=True)
    moved = sum((slope * torch.randn_like(slope)).sum() for slope in slopes)
    return [value, *slopes, *torch.autograd.grad(moved, (x, weights))]


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
    form = SymmetricForm(lmax, (l,), order)
    start = sum(published_columns(lmax, l, n).shape[2] for n in range(1, order))
    all_of_them = torch.eye(start + columns.shape[2], dtype=torch.float64)[None]
    again = basis @ reduce_weights(all_of_them, form)[0, -basis.shape[2] :, start:]
    torch.testing.assert_close(again, columns, rtol=0, atol=1e-12)


def test_it_turns_with_its_features_and_mirrors_are_told():
    form = SymmetricForm(2, (0, 1, 2), 3)
    _, weights, species = call_of(form)
    vectors = torch.randn(4, 5, 3, dtype=torch.float64)
    mixing = torch.randn(4, 5, 3, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q

    def contracted(vectors):
        x = torch.einsum("nes,nec->nsc", spherical_harmonics(vectors, 2), mixing)
        return contract(x, weights, species, form).split([1, 3, 5], dim=1)

    before = contracted(vectors)
    for turn in (rotation, -rotation):
        after = contracted(vectors @ turn.T)
        torch.testing.assert_close(after[0], before[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after[1], turn @ before[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after[2].norm(dim=1), before[2].norm(dim=1))


def test_it_is_its_definition():
    form = SymmetricForm(2, (0, 1), 3)
    call = call_of(form)
    torch.testing.assert_close(contract(*call, form), naive(*call, form), rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives():
    form = SymmetricForm(1, (0, 1), 3)
    x, weights, species = call_of(form, n_atoms=2, n_species=2, channels=2)

    def of(x, weights):
        return contract(x, weights, species, form)

    assert torch.autograd.gradcheck(of, (x, weights))
    assert torch.autograd.gradgradcheck(of, (x, weights))


def test_wrong_weights_and_features_are_refused():
    form = SymmetricForm(2, (0,), 2)
    x, weights, species = call_of(form)
    with pytest.raises(ValueError, match="5 components"):
        contract(x[:, :5], weights, species, form)
    with pytest.raises(ValueError, match="3 independent couplings"):
        contract(x[:, :4], weights, species, form)
