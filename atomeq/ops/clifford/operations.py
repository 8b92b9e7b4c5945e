"""The geometric product of multivectors, by its non-zero terms."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.clifford import registered
from atomeq.ops.clifford.algebra import (
    Algebra,
    Sharing,
    algebra_of,
    right_blades,
    term_paths,
    term_signs,
)
from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.specification import Size
from atomeq.ops.tables import table_like

Multivectors = Float[Tensor, "*batch n_blades channels"]


def _verified(
    x: Tensor, y: Tensor, weights: Tensor | None, signature: tuple[int, int], sharing: Sharing
) -> Size:
    algebra = algebra_of(signature, sharing)
    if x.shape != y.shape or x.shape[-2:-1] != (algebra.n_blades,):
        raise ValueError(
            f"x is {tuple(x.shape)} and y {tuple(y.shape)}; both are (*, {algebra.n_blades}, "
            f"channels) in Cl{tuple(signature)}"
        )
    expected = (algebra.n_paths, x.shape[-1])
    if weights is not None and tuple(weights.shape) != expected:
        raise ValueError(f"weights are {tuple(weights.shape)}, not {expected}, (paths, channels)")
    dtypes = {tensor.dtype for tensor in (x, y, weights) if tensor is not None}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x, y and the weights are {dtypes}; cast them to one dtype")
    rows, channels = math.prod(x.shape[:-2]), x.shape[-1]
    return size_of(x, rows, lmax=algebra.dimension, channels=channels, mode="uuu")


def _by_kernels(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    signature: tuple[int, int],
    sharing: Sharing,
    kernels: str,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, y.dtype)
    dtype = dtype if weights is None else torch.promote_types(dtype, weights.dtype)
    flat = [tensor.to(dtype).reshape(-1, *x.shape[-2:]) for tensor in (x, y)]
    given = weights if weights is None else weights.to(dtype)
    code = registered.code_of(algebra_of(signature, sharing))
    return registered.clifford_product(*flat, given, "output", code, kernels).view(x.shape)


@operation(_verified, by_kernels=_by_kernels)
def geometric_product(
    x: Multivectors,
    y: Multivectors,
    weights: Float[Tensor, "n_paths channels"] | None = None,
    *,
    signature: tuple[int, int] = (3, 0),
    sharing: Sharing = "grade",
) -> Multivectors:
    """Multiply multivectors channel by channel, each path of grades by its weight.

    Args:
        x: Left factors, (*, 2^n, channels), blades in the order of
            :func:`~atomeq.ops.clifford.algebra.blades`.
        y: Right factors, of the same shape.
        weights: Of the paths, (n_paths, channels); None for weights of 1, the product itself.
        signature: How many unit vectors square to 1 and to -1; n of them.
        sharing: Which paths have one weight, see :class:`~atomeq.ops.clifford.algebra.Algebra`.

    Returns:
        (*, 2^n, channels).

    Raises:
        ValueError: Shapes do not fit together, or there is no such algebra.
        TypeError: Dtypes differ.

    Example:
        Two vectors multiply to their inner product and the bivector of their plane:

        >>> import torch
        >>> x, y = torch.zeros(2, 8, 1)
        >>> x[1], y[1:3, 0] = 2.0, torch.tensor([3.0, 1.0])
        >>> geometric_product(x, y)[:, 0]
        tensor([6., 0., 0., 0., 2., 0., 0., 0.])
    """
    algebra = algebra_of(signature, sharing)
    right = table_like(right_blades, algebra, like=x)  # (outputs, left blades)
    factors = table_like(term_signs, algebra, like=x)[..., None]
    if weights is not None:
        factors = factors * weights[table_like(term_paths, algebra, like=x)]
    partners = y.index_select(-2, right.flatten()).unflatten(-2, right.shape)
    return (x.unsqueeze(-3) * partners * factors).sum(dim=-2)


def number_of_paths(signature: tuple[int, int], sharing: Sharing = "grade") -> int:
    """Return how many weights a product has in each channel.

    Raises:
        ValueError: There is no such algebra.
    """
    algebra: Algebra = algebra_of(signature, sharing)
    return algebra.n_paths
