"""Rotations of spherical-harmonic coefficients, and the frame in which every edge points to +y.

Nothing here reads a data file: a Wigner matrix follows from the harmonics themselves, as
D_l = (4 pi)^-1 integral of Y_l(R p) Y_l(p)^T over the sphere, which an exact quadrature turns into
one matrix product. That is a polynomial in R: no Euler angle, so no singular gradient anywhere.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.edge.frame import EdgeFrame, checked_edges
from atomeq.ops.harmonics.polynomials import harmonic_polynomials
from atomeq.ops.orders import check_orders, m_primary_order, m_primary_rows
from atomeq.ops.registration import kernel
from atomeq.ops.self_check import Example, random
from atomeq.ops.specification import Size
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import EdgeIndex, EdgeVectors

Quaternion = Float[Tensor, "*batch 4"]  # (w, x, y, z), unit length
Rotation = Float[Tensor, "*batch 3 3"]


def build_edge_frame(
    edge_vectors: EdgeVectors,
    edge_index: EdgeIndex,
    *,
    n_atoms: int,
    lmax: int,
    mmax: int,
    rotation: Float[Tensor, "n_edges 3 3"] | None = None,
) -> EdgeFrame:
    """Build the frame; the roll about each edge is free and chosen deterministically.

    Args:
        edge_vectors: r_j - r_i, none of them zero, (n_edges, 3), Å.
        edge_index: Row 0 is the neighbour j, row 1 the centre i, (2, n_edges); any order.
        n_atoms: Number of atoms.
        lmax: Highest degree of the features.
        mmax: Highest order kept in the edge frame, at most lmax.
        rotation: Rotations taking each edge to +y, to fix the roll too; (n_edges, 3, 3).

    Returns:
        What the operations on edges take.

    Raises:
        ValueError: If mmax exceeds lmax or the shapes do not belong together.
        IndexError: If an edge ends at no atom.
    """
    check_orders(lmax, mmax)
    n_edges = edge_vectors.shape[0]
    if edge_vectors.shape != (n_edges, 3) or edge_index.shape != (2, n_edges):
        raise ValueError(
            f"edge_vectors {tuple(edge_vectors.shape)} and edge_index "
            f"{tuple(edge_index.shape)} must be (n_edges, 3) and (2, n_edges)"
        )
    source, target = checked_edges(edge_index, n_atoms, n_atoms).unbind()
    if rotation is not None and rotation.shape != (n_edges, 3, 3):
        raise ValueError(f"rotation is {tuple(rotation.shape)}; expected ({n_edges}, 3, 3)")
    with torch.no_grad():
        if rotation is None:
            wigner = edge_wigner(edge_vectors.detach(), lmax, mmax)
        else:
            full = block_diagonal(wigner_from_matrix(rotation.to(edge_vectors), lmax))
            wigner = full.index_select(1, table_like(m_primary_rows, lmax, mmax, like=full))
    return EdgeFrame(
        source=source,
        target=target,
        vectors=edge_vectors,
        lengths=torch.linalg.vector_norm(edge_vectors, dim=-1),
        wigner=wigner,
        n_atoms=n_atoms,
        lmax=lmax,
        mmax=mmax,
    )


def wigner_matrices(quaternion: Quaternion, lmax: int) -> list[Float[Tensor, "*batch _ _"]]:
    """Return the Wigner matrices D_l of a rotation for l = 0..lmax, with Y(R v) = D(R) Y(v).

    Args:
        quaternion: Unit quaternions (w, x, y, z), (*, 4).
        lmax: Highest degree.

    Returns:
        One tensor (*, 2l + 1, 2l + 1) per degree; differentiable without singularity.
    """
    return wigner_from_matrix(rotation_matrix(quaternion), lmax)


def wigner_from_matrix(rotation: Rotation, lmax: int) -> list[Float[Tensor, "*batch _ _"]]:
    """Return D_l for l = 0..lmax from orthogonal matrices, improper ones included.

    Args:
        rotation: Orthogonal matrices acting on (x, y, z), (*, 3, 3).
        lmax: Highest degree.

    Returns:
        One tensor (*, 2l + 1, 2l + 1) per degree; a polynomial in the matrix elements.
    """
    points = table_like(_quadrature_points, lmax, like=rotation)  # (n_points, 3)
    weighted = table_like(_weighted_harmonics, lmax, like=rotation)  # (n_points, n_sph)
    rotated = points @ rotation.mT  # (*, n_points, 3)
    harmonics = harmonic_polynomials(rotated, lmax)  # (*, n_points, n_sph)
    degrees = [slice(l * l, (l + 1) ** 2) for l in range(lmax + 1)]
    return [harmonics[..., degree].mT @ weighted[:, degree] for degree in degrees]


def rotation_matrix(quaternion: Quaternion) -> Rotation:
    """Return the matrices of unit quaternions (w, x, y, z), (*, 4) -> (*, 3, 3).

    Args:
        quaternion: (*, 4).
    """
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def edge_quaternion(unit_vectors: Float[Tensor, "*batch 3"]) -> Quaternion:
    """Return the rotation that takes each direction to +y, well conditioned everywhere.

    Directions with y >= 0 take the shortest way; the others first make a half turn about x, so
    that no denominator is ever smaller than 1. Both poles are exact.

    Args:
        unit_vectors: (*, 3).

    Returns:
        Unit quaternions (w, x, y, z), (*, 4).
    """
    x, y, z = unit_vectors.unbind(-1)
    upper = y >= 0
    height, depth = torch.where(upper, y, -y), torch.where(upper, z, -z)
    zero = torch.zeros_like(x)
    # The shortest rotation u -> y has q = (1 + u.y, u x y) up to its length; u x y = (-z, 0, x).
    shortest = torch.stack((1 + height, -depth, zero, x), dim=-1)
    # Product with the half turn about x, whose quaternion is (0, 1, 0, 0).
    turned = torch.stack((depth, 1 + height, x, zero), dim=-1)
    quaternion = torch.where(upper.unsqueeze(-1), shortest, turned)
    return quaternion / torch.linalg.vector_norm(quaternion, dim=-1, keepdim=True)


def block_diagonal(
    matrices: list[Float[Tensor, "*batch _ _"]],
) -> Float[Tensor, "*batch n_sph n_sph"]:
    """Join the D_l of l = 0..lmax into one matrix acting on all coefficients.

    Args:
        matrices: D_l, (*, 2l + 1, 2l + 1) each.

    Returns:
        (*, n_sph, n_sph).
    """
    lmax = len(matrices) - 1
    padded = [
        torch.nn.functional.pad(matrix, (l * l, (lmax + 1) ** 2 - (l + 1) ** 2))
        for l, matrix in enumerate(matrices)
    ]
    return torch.cat(padded, dim=-2)


@constant_table
def jd_matrix(l: int) -> Tensor:
    """Return J_l, the matrix of (x, y, z) -> (-y, -x, z) on degree l, (2l + 1, 2l + 1) float64.

    J turns rotations about y into rotations about x: D(R_x(t)) = J X(t) J, J = J^T = J^-1.
    """
    swap = torch.tensor([[0.0, -1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64, device="cpu")
    return wigner_from_matrix(swap, l)[l]


@constant_table
def generators(lmax: int) -> Tensor:
    """Return X_x, X_y, X_z with D(exp(t e_k)) = 1 + t X_k + ..., (3, n_sph, n_sph) float64."""
    n_sph = (lmax + 1) ** 2
    table = torch.zeros(3, n_sph, n_sph, dtype=torch.float64, device="cpu")
    for l in range(lmax + 1):
        about_y = np.diag(np.arange(l, -l - 1, -1.0))[:, ::-1]  # d/dt of X(t) at 0
        jd = jd_matrix(l).numpy()
        about_x = jd @ about_y @ jd
        about_x[np.abs(about_x) < 1e-9] = 0.0  # the zeros of the exact matrix
        about_z = about_x @ about_y - about_y @ about_x
        degree = slice(l * l, (l + 1) ** 2)
        table[:, degree, degree] = torch.from_numpy(np.stack((about_x, about_y, about_z)))
    return table


@constant_table
def flat_generators(lmax: int) -> Tensor:
    """Return the three generators as columns, (n_sph * n_sph, 3) float64."""
    return generators(lmax).flatten(1).T.contiguous()


def _fake_rows(call: SimpleNamespace) -> Tensor:
    n_rows = len(m_primary_order(call.lmax, call.mmax))
    return call.vectors.new_empty(call.vectors.shape[0], n_rows, (call.lmax + 1) ** 2)


@kernel(outputs=_fake_rows)
def wigner_rows(vectors: Tensor, lmax: int, mmax: int, kernels: str) -> Tensor:
    """Return :func:`edge_wigner` by some kernels, which is never differentiated."""
    ...


def _verified(vectors: EdgeVectors, lmax: int, mmax: int) -> Size:
    return size_of(vectors, vectors.shape[0], lmax=lmax, mmax=mmax)


def _example(size: Size) -> Example:
    """Return the vectors of some edges, along the axis one of them."""
    vectors = random(size, 24, 3)
    vectors[0] *= vectors.new_tensor([0.0, 1.0, 0.0])
    return [], lambda operation: operation(vectors, size.lmax, size.mmax)


@operation(_verified, by_kernels=wigner_rows, example=_example)
def edge_wigner(
    vectors: EdgeVectors, lmax: int, mmax: int
) -> Float[Tensor, "n_edges n_rows n_sph"]:
    """Return D of R_x(-beta) R_y(-alpha), which takes the direction (alpha, beta) to +y.

    No angle is ever formed: cosines and sines are ratios of components, exact beside the poles,
    where alpha is any angle. As D = J X(-beta) J X(-alpha), the beta part is linear in cos(k beta)
    and sin(k beta) and the alpha part only mixes the columns m and -m.

    Args:
        vectors: Not zero, (n_edges, 3).
        lmax: Highest degree.
        mmax: Highest order kept.

    Returns:
        Rows |m| <= mmax in m-primary order, (n_edges, n_rows, n_sph).
    """
    unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    x, y, z = unit.unbind(-1)
    polar = torch.hypot(x, z)  # sin(beta)
    pole = polar == 0
    divisor = torch.where(pole, 1.0, polar)
    cos_alpha, sin_alpha = torch.where(pole, 1.0, z / divisor), x / divisor
    beta = torch.cat(_multiple_angles(y, polar, lmax), dim=-1)  # (n_edges, 2 lmax + 2)
    alpha_cos, alpha_sin = _multiple_angles(cos_alpha, sin_alpha, lmax)  # (n_edges, lmax + 1)
    order = table_like(_absolute_orders, lmax, like=y).long()
    sign = table_like(_negated_signs, lmax, like=y)
    tilt, flipped = table_like(tilt_tables, lmax, mmax, like=y).flatten(2)
    shape = (-1, len(m_primary_order(lmax, mmax)), (lmax + 1) ** 2)
    straight = (beta @ tilt).view(shape) * alpha_cos[:, order].unsqueeze(1)
    return straight.addcmul_(
        (beta @ flipped).view(shape), (alpha_sin[:, order] * sign).unsqueeze(1)
    )


def _multiple_angles(cosine: Tensor, sine: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Return cos(k t) and sin(k t) for k = 0..highest from cos(t) and sin(t)."""
    cosines, sines = [torch.ones_like(cosine)], [torch.zeros_like(sine)]
    for _ in range(highest):
        c, s = cosines[-1], sines[-1]
        cosines.append(c * cosine - s * sine)
        sines.append(s * cosine + c * sine)
    return torch.stack(cosines, dim=-1), torch.stack(sines, dim=-1)


@constant_table
def tilt_tables(lmax: int, mmax: int) -> Tensor:
    """Return T with J X(-beta) J = sum_k T[0, k] cos(k beta) + T[0, L+1+k] sin(k beta).

    Rows are in m-primary order; T[1] is T[0] with the columns m and -m exchanged.
    """
    n_sph = (lmax + 1) ** 2
    table = np.zeros((2 * lmax + 2, n_sph, n_sph))
    for l in range(lmax + 1):
        jd = jd_matrix(l).numpy()
        degree = slice(l * l, (l + 1) ** 2)
        for k in range(-l, l + 1):
            # Row k of X(-beta) holds cos(k beta) in column k and sin(k beta) in column -k.
            table[abs(k), degree, degree] += np.outer(jd[:, l + k], jd[l + k])
            sine = np.sign(k) * np.outer(jd[:, l + k], jd[l - k])
            table[lmax + 1 + abs(k), degree, degree] += sine
    table[np.abs(table) < 1e-14] = 0.0
    table = table[:, m_primary_order(lmax, mmax)]
    columns = [l * l + l - m for l in range(lmax + 1) for m in range(-l, l + 1)]
    return torch.from_numpy(np.stack((table, table[:, :, columns]))).contiguous()


@constant_table
def column_orders(lmax: int) -> Tensor:
    """Return the order m of each coefficient, (n_sph,) int32."""
    orders = [m for l in range(lmax + 1) for m in range(-l, l + 1)]
    return torch.from_numpy(np.array(orders, dtype=np.int32))


@constant_table
def _absolute_orders(lmax: int) -> Tensor:
    return column_orders(lmax).abs()


@constant_table
def _negated_signs(lmax: int) -> Tensor:
    return -column_orders(lmax).sign().double()


@constant_table
def _quadrature_points(lmax: int) -> Tensor:
    return _quadrature(lmax)[0]


@constant_table
def _weighted_harmonics(lmax: int) -> Tensor:
    points, weights = _quadrature(lmax)
    return harmonic_polynomials(points, lmax) * weights[:, None]


def _quadrature(lmax: int) -> tuple[Tensor, Tensor]:
    """Return points and weights exact for even polynomials up to degree 2 lmax, weights sum to 1.

    Y_l Y_l is even, so half of the meridians of a product rule (Gauss-Legendre in y) suffice.
    """
    heights, weights = np.polynomial.legendre.leggauss(lmax + 1)
    n_meridians = 2 * lmax + 2
    angles = math.pi * (np.arange(n_meridians // 2) + 0.25) * 2 / n_meridians
    radius = np.sqrt(1 - heights**2)
    points = np.stack(
        (
            np.outer(radius, np.sin(angles)),
            np.repeat(heights[:, None], angles.size, axis=1),
            np.outer(radius, np.cos(angles)),
        ),
        axis=-1,
    ).reshape(-1, 3)
    repeated = np.repeat(weights / 2 / angles.size, angles.size)
    return torch.from_numpy(points), torch.from_numpy(repeated)
