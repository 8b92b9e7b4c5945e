"""Operations on the features of each atom by itself; no other atom and no edge comes in.

Kernels serve weights that are not trained: they have the value and the gradient by the features.
Where a weight wants a gradient plain torch computes, with derivatives of any order, and a second
derivative by the features is plain torch's too.
"""

import math
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.registration import differentiable_gradient, kernel
from atomeq.ops.self_check import Example, random
from atomeq.ops.specification import Size
from atomeq.ops.sphere.gaunt import gaunt_product, grid_values, pointwise_product
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import NodeFeatures

Linear = tuple[Tensor, Tensor | None]  # weight and bias
Products = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _verified_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Size:
    _check_rows(x, len(weight))
    _check("weight", weight, len(weight), x.shape[2])
    _check("bias", bias, x.shape[2])
    return size_of(x, x.shape[0], lmax=len(weight) - 1, channels=x.shape[2])


def _example_norm(size: Size) -> Example:
    """Return the features of some atoms; the weights of a normalisation are fixed."""
    x, weight = (
        random(size, n, rows, size.channels)
        for n, rows in ((5, (size.lmax + 1) ** 2), (1, size.lmax + 1))
    )
    bias = random(size, size.channels)
    return [x], lambda operation, x: operation(x, weight[0], bias)


def _norm_by_kernels(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, kernels: str
) -> Tensor:
    if _trained(weight, bias):
        return _rms_norm(x, weight, bias, epsilon)
    return atom_norm(x, weight, bias, epsilon, kernels)


@operation(_verified_norm, by_kernels=_norm_by_kernels, example=_example_norm)
def rms_norm(
    x: NodeFeatures,
    weight: Float[Tensor, "degrees channels"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> NodeFeatures:
    """Divide all coefficients of an atom by one rotation-invariant root mean square.

    Each degree counts alike, however many orders it has.

    Args:
        x: Features, (n_atoms, n_sph, channels).
        weight: Factor of each degree and channel, (lmax + 1, channels).
        bias: Added to l = 0, of which the channel mean is then removed first, (channels,).
        epsilon: Keeps atoms without features finite.

    Returns:
        (n_atoms, n_sph, channels).

    Raises:
        ValueError: If the shapes do not fit together.
    """
    return _rms_norm(x, weight, bias, epsilon)


def _verified_update(
    x: NodeFeatures, first: Linear, gates: Linear, second: Linear, products: Products | None
) -> Size:
    n_degrees, hidden, channels = first[0].shape
    c_out = second[0].shape[1]
    _check_rows(x, n_degrees)
    _check("weight of the first map", first[0], n_degrees, hidden, x.shape[2])
    _check("bias of the first map", first[1], hidden)
    _check("weight of the gates", gates[0], (n_degrees - 1) * hidden, channels)
    _check("bias of the gates", gates[1], (n_degrees - 1) * hidden)
    _check("weight of the second map", second[0], n_degrees, c_out, hidden)
    _check("bias of the second map", second[1], c_out)
    if products is not None:
        inside = products[0][0].shape[1]
        for name, (weight, bias), n, n_in in zip(
            ("first", "second", "third"),
            *(products, (inside, inside, c_out), (x.shape[2], x.shape[2], inside)),
            strict=True,
        ):
            _check(f"weight of the {name} map of products", weight, n_degrees, n, n_in)
            _check(f"bias of the {name} map of products", bias, n)
    return size_of(x, x.shape[0], lmax=n_degrees - 1, channels=hidden)


def _example_update(size: Size) -> Example:
    """Return the features of some atoms; the weights of an update are fixed."""
    hidden, n_degrees = size.channels, size.lmax + 1
    channels, c_out = hidden + 3, hidden + 1
    x = random(size, 5, n_degrees**2, channels)
    first = random(size, n_degrees, hidden, channels), random(size, hidden)
    gates = random(size, size.lmax * hidden, channels), random(size, size.lmax * hidden)
    second = random(size, n_degrees, c_out, hidden), random(size, c_out)
    return [x], lambda operation, x: operation(x, first, gates, second)


def _update_by_kernels(
    x: Tensor,
    first: Linear,
    gates: Linear,
    second: Linear,
    products: Products | None,
    kernels: str,
) -> Tensor:
    if products is not None and kernels != "cpu":  # they have the product on the sphere itself
        left, right, out = products
        factors = so3_linear(x, *left), so3_linear(x, *right)
        product = so3_linear(gaunt_product(*factors, len(first[0]) - 1), *out)
        return _update_by_kernels(x, first, gates, second, None, kernels) + product
    weights, inside = (*first, *gates, *second), [part for one in products or () for part in one]
    if _trained(*weights, *inside):
        return _gated_update(x, first, gates, second, products)
    inside += [_points(x)] if inside else []
    return atom_update(x, *weights, inside, kernels)


@operation(_verified_update, by_kernels=_update_by_kernels, example=_example_update)
def gated_update(
    x: NodeFeatures,
    first: Linear,
    gates: Linear,
    second: Linear,
    *,
    products: Products | None = None,
) -> Float[Tensor, "n_atoms n_sph c_out"]:
    """Apply a linear map for each degree, a gate, and a linear map for each degree.

    The gate is SiLU on l = 0, and on l > 0 the sigmoid of a linear map of the l = 0 of ``x``.
    Products on the sphere of two linear maps of ``x`` may be added, after a third map.

    Args:
        x: Features, (n_atoms, n_sph, channels), lmax > 0.
        first: Weight (lmax + 1, hidden, channels), and bias on l = 0, (hidden,) or None.
        gates: Weight (lmax * hidden, channels) and bias (lmax * hidden,) or None.
        second: Weight (lmax + 1, c_out, hidden), and bias on l = 0, (c_out,) or None.
        products: Weights and biases like these of the two maps whose values are multiplied point
            by point (:func:`~atomeq.ops.sphere.gaunt.gaunt_product`), and of that of the product.

    Returns:
        (n_atoms, n_sph, c_out).

    Raises:
        ValueError: If the shapes do not fit together.
    """
    return _gated_update(x, first, gates, second, products)


def _check(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {shape}")


def _check_rows(x: Tensor, n_degrees: int) -> None:
    if x.ndim != 3 or x.shape[1] != n_degrees**2:
        raise ValueError(f"x is {tuple(x.shape)}; {n_degrees} degrees have {n_degrees**2} rows")


def _rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    if bias is not None:
        scalars, higher = x.split([1, x.shape[1] - 1], dim=1)
        scalars = scalars - scalars.mean(dim=2, keepdim=True)
        x = torch.cat([scalars, higher], dim=1)
    lmax = len(weight) - 1
    mean_square = ((x * x).mean(dim=2) / table_like(_orders, lmax, like=x)).sum(dim=1) / len(weight)
    scale = torch.rsqrt(mean_square + epsilon)[:, None, None]
    x = x * scale * weight.index_select(0, table_like(_degrees, lmax, like=weight))
    return x if bias is None else x + pad(bias[None], (0, 0, 0, x.shape[1] - 1))


@constant_table
def _degrees(lmax: int) -> Tensor:
    """Return the degree of each coefficient, (n_sph,)."""
    return torch.tensor([math.isqrt(row) for row in range((lmax + 1) ** 2)])


@constant_table
def _orders(lmax: int) -> Tensor:
    """Return how many orders the degree of each coefficient has, (n_sph,)."""
    return 2.0 * _degrees(lmax) + 1.0


def so3_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map channels by one matrix per degree.

    Args:
        x: (n_atoms, n_sph, in_channels).
        weight: (lmax + 1, out_channels, in_channels).
        bias: Added to l = 0, (out_channels,).

    Returns:
        (n_atoms, n_sph, out_channels).
    """
    # split, not slices: the backward of a slice fills a tensor of zeros, that of split is a cat
    degrees = x.split([2 * l + 1 for l in range(len(weight))], dim=1)
    blocks = [
        block @ matrix.transpose(0, 1)
        for block, matrix in zip(degrees, weight.unbind(0), strict=True)
    ]
    if bias is not None:
        blocks[0] = blocks[0] + bias
    return torch.cat(blocks, dim=1)


def _gated_update(
    x: Tensor, first: Linear, gates: Linear, second: Linear, products: Products | None
) -> Tensor:
    rows = so3_linear(x, *first)
    scalars, *higher = rows.split([2 * l + 1 for l in range(len(first[0]))], dim=1)
    opened = torch.sigmoid(linear(x[:, 0], *gates)).unflatten(1, (len(first[0]) - 1, -1))
    gated = [part * gate[:, None] for part, gate in zip(higher, opened.unbind(1), strict=True)]
    updated = so3_linear(torch.cat([silu(scalars), *gated], dim=1), *second)
    return updated if products is None else updated + _product(x, *products)


def _product(x: Tensor, left: Linear, right: Linear, out: Linear) -> Tensor:
    factors, tables = (so3_linear(x, *left), so3_linear(x, *right)), [_points(x)] * 3
    return so3_linear(pointwise_product(*factors, *tables), *out)


def _points(x: Tensor) -> Tensor:
    """Return the harmonics of x at points of the sphere that integrate the product of three."""
    lmax = math.isqrt(x.shape[1]) - 1
    return table_like(grid_values, lmax, 3 * lmax, like=x)


def _trained(*weights: Tensor | None) -> bool:
    """Whether a weight is trained, be there a gradient now or not: one value has one way."""
    return any([weight is not None and weight.requires_grad for weight in weights])


def _like_x(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.x)


def _norm_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    given = saved.weight, saved.bias, saved.epsilon
    if torch.is_grad_enabled():
        return {"x": differentiable_gradient(lambda x: _rms_norm(x, *given), saved.x, grad)}
    centred = saved.bias is not None
    found = atom_norm_gradient(saved.x, saved.weight, grad, centred, saved.epsilon, saved.kernels)
    return {"x": found}


@kernel(outputs=_like_x, gradient=_norm_gradient)
def atom_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, kernels: str
) -> Tensor:
    """Return the normalised features."""
    ...


@kernel(outputs=_like_x)
def atom_norm_gradient(
    x: Tensor, weight: Tensor, grad: Tensor, centred: bool, epsilon: float, kernels: str
) -> Tensor:
    """Return the gradient by the features; ``centred`` where the mean of l = 0 is removed."""
    ...


def _fake_update(call: SimpleNamespace) -> Tensor:
    return call.x.new_empty(*call.x.shape[:2], call.second.shape[1])


def _update_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    first, gates = (saved.first, saved.first_bias), (saved.gates, saved.gates_bias)
    if torch.is_grad_enabled():
        given = first, gates, (saved.second, saved.second_bias), _maps_of(saved.products)
        return {"x": differentiable_gradient(lambda x: _gated_update(x, *given), saved.x, grad)}
    given = *first, *gates, saved.second, saved.products, grad, saved.kernels
    return {"x": atom_update_gradient(saved.x, *given)}


def _maps_of(products: list[Tensor]) -> Products | None:
    if not products:
        return None
    left, left_bias, right, right_bias, out, out_bias, _ = products
    return (left, left_bias), (right, right_bias), (out, out_bias)


@kernel(outputs=_fake_update, gradient=_update_gradient)
def atom_update(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    gates: Tensor,
    gates_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    products: list[Tensor],
    kernels: str,
) -> Tensor:
    """Return the update, (n_atoms, n_sph, c_out).

    ``products`` is empty, or has weight and bias of three maps and a table of the sphere's points.
    """
    ...


@kernel(outputs=_like_x)
def atom_update_gradient(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    gates: Tensor,
    gates_bias: Tensor | None,
    second: Tensor,
    products: list[Tensor],
    grad: Tensor,
    kernels: str,
) -> Tensor:
    """Return the gradient of the update by the features."""
    ...
