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
from atomeq.ops.dispatch import use_backend
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


SERVED = [
    pytest.param("reference", SymmetricForm(2, (0, 1, 2), 3), 3),
    pytest.param("cpu", SymmetricForm(3, (0, 1), 3), 37),  # vectors, and channels beside them
    pytest.param("cpu", SymmetricForm(2, (0, 1, 2), 3), 8),
    pytest.param("cpu", SymmetricForm(2, (0,), 4), 3),
    pytest.param("cpu", SymmetricForm(0, (0,), 2), 1),
    pytest.param("triton", SymmetricForm(1, (0, 1), 3), 16, marks=pytest.mark.triton),
    pytest.param("triton", SymmetricForm(2, (1, 0), 2), 16, marks=pytest.mark.triton),
]


@pytest.mark.parametrize("n_atoms", [0, 1, 5])
@pytest.mark.parametrize(("backend", "form", "channels"), SERVED)
def test_it_is_its_definition_and_so_are_two_derivatives(backend, form, channels, n_atoms):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed: pip install atomeq[cuda]")
    call = call_of(form, n_atoms=n_atoms, channels=channels)
    expected = derivatives(naive, *call, form)
    with use_backend(backend):
        found = derivatives(contract, *call, form)
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING * max(scale, 1.0))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_first_second_and_third_derivatives(backend):
    form = SymmetricForm(1, (0, 1), 3)
    x, weights, species = call_of(form, n_atoms=2, n_species=2, channels=2)

    def of(x, weights):
        with use_backend(backend):
            return contract(x, weights, species, form)

    def slopes_of(x, weights):
        return torch.autograd.grad(of(x, weights).square().sum(), (x, weights), create_graph=True)

    assert torch.autograd.gradcheck(of, (x, weights))
    assert torch.autograd.gradgradcheck(of, (x, weights))
    assert torch.autograd.gradgradcheck(slopes_of, (x, weights))


def test_no_gradient_of_weights_is_made_for_forces(monkeypatch):
    from atomeq.ops.coupling.cpu import kernels

    form = SymmetricForm(1, (0,), 2)
    x, weights, species = call_of(form)
    asked = []
    whole = kernels.symmetric_partials

    def watched(call):
        asked.append(tuple(call.arguments.split()))
        return whole(call)

    monkeypatch.setattr(kernels, "symmetric_partials", watched)
    with use_backend("cpu"):
        torch.autograd.grad(contract(x, weights * 2.0, species, form).sum(), x)
    assert asked == [("z",), ("x",)]


def test_threads_share_atoms_and_channels():
    form = SymmetricForm(2, (0, 1), 3)
    call = call_of(form, n_atoms=41, channels=33)
    found = []
    before = torch.get_num_threads()
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        with use_backend("cpu"):
            found.append(derivatives(contract, *call, form))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("species", [3, -1])
def test_species_without_weights_are_refused(backend, species):
    form = SymmetricForm(1, (0,), 2)
    x, weights, _ = call_of(form, n_atoms=1, n_species=3)
    with use_backend(backend), pytest.raises(IndexError):
        contract(x, weights, torch.tensor([species]), form)


def test_wrong_weights_and_features_are_refused():
    form = SymmetricForm(2, (0,), 2)
    x, weights, species = call_of(form)
    with pytest.raises(ValueError, match="5 components"):
        contract(x[:, :5], weights, species, form)
    with pytest.raises(ValueError, match="3 independent couplings"):
        contract(x[:, :4], weights, species, form)
    with pytest.raises(TypeError, match="cast one"):
        contract(x.float(), weights, species, form)
    with pytest.raises(ValueError, match="for 4 atoms"):
        contract(x, weights, species[:3], form)
