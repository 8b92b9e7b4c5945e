"""Pointwise functions on the sphere as one registered operation closed under derivatives.

With A_i the matrices from coefficients t_i to values on a grid, B that from values to coefficients,
and f the k-th derivative of SiLU (or nothing, k < 0, where t_0 is a factor like the others)

    S_k(t_0, t_1, ...)  =  B [ f^(k)(A_0 t_0) * (A_1 t_1) * ... ].

SiLU on the sphere is S_0(x), a product of two functions S(x, y). If h is the cotangent of S, then

    dS/dt_i = A_i^T [ f^(k)(A_0 t_0) * ... * (B^T h) ]  without the factor i > 0,
    dS/dt_0 = A_0^T [ f^(k+1)(A_0 t_0) * (A_1 t_1) * ... * (B^T h) ],

of the same form: what is kept is the coefficients, never a grid.
"""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.registration import kernels_of, registered
from atomeq.ops.sphere.grid import SphereGrid


def _fake_form(call: SimpleNamespace) -> Tensor:
    n, _, channels = call.factors[0].shape
    return call.factors[0].new_empty(n, call.back.shape[0], channels)


def _form_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, list[Tensor | None]]:
    found: list[Tensor | None] = []
    for place, matrix in enumerate(saved.matrices):
        if f"factors.{place}" not in wanted:
            found.append(None)
            continue
        inside = place == 0 and saved.order >= 0
        rest = [number for number in range(len(saved.factors)) if inside or number != place]
        found.append(
            sphere_form(
                [*(saved.factors[number] for number in rest), grad],
                [*(saved.matrices[number] for number in rest), saved.back.mT],
                matrix.mT,
                saved.order + 1 if inside else saved.order,
                saved.kernels,
            )
        )
    return {"factors": found}


@registered(outputs=_fake_form, gradient=_form_gradient)
def sphere_form(
    factors: list[Tensor], matrices: list[Tensor], back: Tensor, order: int, kernels: str
) -> Tensor:
    """Return S_order of factors (n, rows of each, channels), (n, rows of B, channels).

    ``matrices`` are (n_points, rows of each) and ``back`` is (rows, n_points).
    """
    return kernels_of("sphere", kernels).sphere_form(factors, matrices, back, order)


def sphere_silu(x: Tensor, grid: SphereGrid, *, kernels: str) -> Tensor:
    """Apply SiLU to the values on the points of a grid by some kernels."""
    return sphere_form([x], [grid.to_matrix(like=x)], grid.from_matrix(like=x), 0, kernels)
