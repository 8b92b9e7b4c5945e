"""What one forward call of an operation costs at least: arithmetic, memory traffic, time.

Bytes are those of a fused kernel, which reads each input and writes each output once; sums over
edges are written per atom and are left out. The times are floors on an assumed machine, a yardstick
for measurements and no prediction.
"""

from typing import NamedTuple

import torch

from atomeq.ops.clebsch_gordan import clebsch_gordan
from atomeq.ops.orders import m_primary_order
from atomeq.ops.paths import tensor_product_paths
from atomeq.ops.specification import OpSpec
from atomeq.ops.sphere_grid import SphereGrid


class Machine(NamedTuple):
    """An assumed machine: memory bandwidth in bytes/s and arithmetic in FLOP/s."""

    name: str
    bandwidth: float
    single: float
    double: float


MACHINES = {
    "cuda": Machine("one H200, without tensor cores", 4.3e12, 60e12, 30e12),
    "cpu": Machine("one AVX2 core", 10e9, 100e9, 50e9),
}


class Cost(NamedTuple):
    """Floating-point operations and bytes of a call."""

    flops: int
    bytes: int

    def floor(self, machine: Machine, dtype: torch.dtype) -> float:
        """Return the least time on a machine, s: the slower of arithmetic and traffic."""
        peak = machine.double if dtype == torch.float64 else machine.single
        return max(self.flops / peak, self.bytes / machine.bandwidth)


def cost(spec: OpSpec) -> Cost:
    """Count the work of a call.

    Raises:
        ValueError: If the operation is unknown.
    """
    counters = {
        "spherical_harmonics": _harmonics,
        "edge_wigner": _frame,
        "rotate_to_edge": _rotation,
        "rotate_from_edge": _rotation,
        "so2_linear": _so2,
        "escn_conv": _layer,
        "tensor_product": _coupling,
        "cg_conv": _coupling,
        "sphere_pointwise": _sphere,
        "sphere_silu": _sphere,
        "sphere_product": _sphere,
        "segment_sum": _segment,
        "segment_softmax": _segment,
    }
    if spec.op not in counters:
        raise ValueError(f"operation {spec.op!r} is unknown; choose from {', '.join(counters)}")
    flops, numbers, shared = counters[spec.op](spec)
    itemsize = spec.dtype.itemsize
    return Cost(spec.n_edges * flops, itemsize * (spec.n_edges * numbers + shared))


def _harmonics(spec: OpSpec) -> tuple[int, int, int]:
    """Return FLOPs per edge, numbers moved per edge, and numbers moved once; so do all below."""
    n_sph = (spec.lmax + 1) ** 2
    return 5 * n_sph, 3 + n_sph, 0


def _frame(spec: OpSpec) -> tuple[int, int, int]:
    return 2 * (2 * spec.lmax + 1) * _nonzeros(spec), 3 + _nonzeros(spec), 0


def _rotation(spec: OpSpec) -> tuple[int, int, int]:
    n_rows, n_sph = len(m_primary_order(spec.lmax, spec.mmax)), (spec.lmax + 1) ** 2
    features = n_rows + n_sph if spec.op == "rotate_to_edge" else n_rows
    return 2 * _nonzeros(spec) * spec.channels, features * spec.channels + _nonzeros(spec), 0


def _so2(spec: OpSpec) -> tuple[int, int, int]:
    degrees = [spec.lmax - m + 1 for m in range(spec.mmax + 1)]
    weights = sum(n * n * (1 if m == 0 else 2) for m, n in enumerate(degrees)) * spec.channels**2
    products = sum(n * n * (1 if m == 0 else 4) for m, n in enumerate(degrees))
    n_rows = len(m_primary_order(spec.lmax, spec.mmax))
    return 2 * products * spec.channels**2, 2 * n_rows * spec.channels, weights


def _layer(spec: OpSpec) -> tuple[int, int, int]:
    """Count both atoms in, as many hidden channels, gates of every degree, and the sum out."""
    rotation, map_ = _rotation(spec), _so2(spec)
    gates = 2 * 2 * (spec.lmax + 1) * spec.lmax * spec.channels**2
    flops = 3 * rotation[0] + 3 * map_[0] + gates
    return flops, 2 * (spec.lmax + 1) ** 2 * spec.channels + _nonzeros(spec), 3 * map_[2]


def _coupling(spec: OpSpec) -> tuple[int, int, int]:
    paths = tensor_product_paths(spec.lmax, spec.lmax, spec.lmax)
    nonzeros = sum(int((clebsch_gordan(*path).abs() > 1e-12).sum()) for path in paths)
    n_sph = (spec.lmax + 1) ** 2
    features = n_sph + len(paths) + (n_sph if spec.op == "tensor_product" else 0)
    return 3 * nonzeros * spec.channels, features * spec.channels + n_sph, 0


def _sphere(spec: OpSpec) -> tuple[int, int, int]:
    n_rows = len(m_primary_order(spec.lmax, spec.mmax))
    n_points = SphereGrid(spec.lmax, spec.mmax).n_points
    n_features = 3 if spec.op == "sphere_product" else 2
    flops = 2 * n_features * n_rows * n_points * spec.channels
    return flops, n_features * n_rows * spec.channels, 0


def _segment(spec: OpSpec) -> tuple[int, int, int]:
    passes = 1 if spec.op == "segment_sum" else 4
    return passes * spec.channels, (1 if passes == 1 else 2) * spec.channels, 0


def _nonzeros(spec: OpSpec) -> int:
    """Return the number of matrix elements of one edge's rotation, rows with |m| <= mmax only."""
    return sum((2 * min(l, spec.mmax) + 1) * (2 * l + 1) for l in range(spec.lmax + 1))
