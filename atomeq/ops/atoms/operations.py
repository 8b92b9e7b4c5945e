"""Operations on the features of each atom by itself; no other atom and no edge comes in.

Kernels serve weights that are not trained: they have the value and the gradient by the features.
Where a weight wants a gradient plain torch computes, with derivatives of any order, and a second
derivative by the features is plain torch's too.
"""

from jaxtyping import Float
from torch import Tensor

from atomeq.ops.atoms import examples, reference, registered
from atomeq.ops.atoms.reference import Linear
from atomeq.ops.dispatch import operation
from atomeq.ops.specification import Size, size_of
from atomeq.typing import NodeFeatures


def _verified_norm(
    x: NodeFeatures, weight: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-5
) -> Size:
    _check_rows(x, len(weight))
    _check("weight", weight, len(weight), x.shape[2])
    _check("bias", bias, x.shape[2])
    return size_of(x, x.shape[0], lmax=len(weight) - 1, channels=x.shape[2])


@operation(_verified_norm, by_kernels=registered.rms_norm, example=examples.norm)
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
    return reference.rms_norm(x, weight, bias, epsilon)


def _verified_update(x: NodeFeatures, first: Linear, gates: Linear, second: Linear) -> Size:
    n_degrees, hidden, channels = first[0].shape
    c_out = second[0].shape[1]
    _check_rows(x, n_degrees)
    _check("weight of the first map", first[0], n_degrees, hidden, x.shape[2])
    _check("bias of the first map", first[1], hidden)
    _check("weight of the gates", gates[0], (n_degrees - 1) * hidden, channels)
    _check("bias of the gates", gates[1], (n_degrees - 1) * hidden)
    _check("weight of the second map", second[0], n_degrees, c_out, hidden)
    _check("bias of the second map", second[1], c_out)
    return size_of(x, x.shape[0], lmax=n_degrees - 1, channels=hidden)


@operation(_verified_update, by_kernels=registered.gated_update, example=examples.update)
def gated_update(
    x: NodeFeatures, first: Linear, gates: Linear, second: Linear
) -> Float[Tensor, "n_atoms n_sph c_out"]:
    """Apply a linear map for each degree, a gate, and a linear map for each degree.

    The gate is SiLU on l = 0, and on l > 0 the sigmoid of a linear map of the l = 0 of ``x``.

    Args:
        x: Features, (n_atoms, n_sph, channels), lmax > 0.
        first: Weight (lmax + 1, hidden, channels), and bias on l = 0, (hidden,) or None.
        gates: Weight (lmax * hidden, channels) and bias (lmax * hidden,) or None.
        second: Weight (lmax + 1, c_out, hidden), and bias on l = 0, (c_out,) or None.

    Returns:
        (n_atoms, n_sph, c_out).

    Raises:
        ValueError: If the shapes do not fit together.
    """
    return reference.gated_update(x, first, gates, second)


def _check(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {shape}")


def _check_rows(x: Tensor, n_degrees: int) -> None:
    if x.ndim != 3 or x.shape[1] != n_degrees**2:
        raise ValueError(f"x is {tuple(x.shape)}; {n_degrees} degrees have {n_degrees**2} rows")
