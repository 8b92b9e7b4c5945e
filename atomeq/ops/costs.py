"""What one forward call of an operation costs at least: arithmetic, memory traffic, time.

Bytes are those of a fused kernel, which reads each input and writes each output once; sums over
edges are written per atom and are left out. The times are floors on an assumed machine, a yardstick
for measurements and no prediction.
"""

from typing import NamedTuple

import torch

from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.ops.coupling.symmetric_contraction_basis import SymmetricForm
from atomeq.ops.orders import m_primary_order
from atomeq.ops.paths import tensor_product_paths
from atomeq.ops.precision import matmul_precision
from atomeq.ops.specification import OpSpec
from atomeq.ops.sphere.grid import SphereGrid

_NOTHING = 1e-12  # below this a 3j symbol is rounding


class Machine(NamedTuple):
    """An assumed machine: memory bandwidth in bytes/s and arithmetic in FLOP/s.

    ``matrices`` are the rates of products of large matrices by how they are multiplied: in double,
    in single precision, in TF32 or in bfloat16.
    """

    name: str
    bandwidth: float
    single: float
    double: float
    matrices: dict[str, float]


MACHINES = {
    "cuda": Machine(
        *("one H200", 4.3e12, 60e12, 30e12),
        {"double": 60e12, "single": 60e12, "tf32": 380e12, "bfloat16": 790e12},
    ),
    "cpu": Machine(
        *("one AVX2 core", 10e9, 100e9, 50e9),
        {"double": 50e9, "single": 100e9, "tf32": 100e9, "bfloat16": 100e9},
    ),
}


class Floor(NamedTuple):
    """The least time of a call, s, and what sets it: ``arithmetic`` or ``memory``."""

    seconds: float
    limit: str


class Cost(NamedTuple):
    """Floating-point operations, those of large matrices among them, and bytes of a call."""

    flops: int
    matrix_flops: int
    bytes: int

    def floor(self, machine: Machine, dtype: torch.dtype) -> Floor:
        """Return the least time on a machine: the slower of arithmetic and traffic.

        Matrices are multiplied at the precision that holds here.
        """
        peak = machine.double if dtype == torch.float64 else machine.single
        arithmetic = (self.flops - self.matrix_flops) / peak
        arithmetic += self.matrix_flops / machine.matrices[_multiplication(dtype)]
        traffic = self.bytes / machine.bandwidth
        if arithmetic > traffic:
            return Floor(arithmetic, "arithmetic")
        return Floor(traffic, "memory")


def _multiplication(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "double"
    if dtype in (torch.bfloat16, torch.float16):
        return "bfloat16"
    ways = {"highest": "single", "high": "tf32", "medium": "bfloat16"}
    return ways[matmul_precision()]


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
        "so2_linear_with_scalars": _so2,
        "escn_conv": _layer,
        "tensor_product": _coupling,
        "cg_conv": _coupling,
        "symmetric_contraction": _contraction,
        "sphere_pointwise": _sphere,
        "sphere_silu": _sphere,
        "gaunt_product": _sphere,
        "segment_sum": _segment,
        "segment_softmax": _segment,
        "rms_norm": _norm,
        "gated_update": _update,
        "pair_functions": _table,
        "geometric_product": _geometric,
    }
    if spec.op not in counters:
        raise ValueError(f"operation {spec.op!r} is unknown; choose from {', '.join(counters)}")
    flops, matrix_flops, numbers, shared = counters[spec.op](spec)
    itemsize = spec.dtype.itemsize
    return Cost(
        spec.n_edges * (flops + matrix_flops),
        spec.n_edges * matrix_flops,
        itemsize * (spec.n_edges * numbers + shared),
    )


class _Work(NamedTuple):
    """Of one edge: FLOPs, those of large matrices apart, and numbers moved; numbers moved once."""

    flops: int
    matrix_flops: int
    numbers: int
    shared: int = 0


def _harmonics(spec: OpSpec) -> _Work:
    n_sph = (spec.lmax + 1) ** 2
    return _Work(5 * n_sph, 0, 3 + n_sph)


def _geometric(spec: OpSpec) -> _Work:
    n_blades = 2**spec.lmax  # of an algebra of so many dimensions, each product of two is one term
    return _Work(3 * n_blades**2 * spec.channels, 0, 3 * n_blades * spec.channels)


def _frame(spec: OpSpec) -> _Work:
    return _Work(2 * (2 * spec.lmax + 1) * _nonzeros(spec), 0, 3 + _nonzeros(spec))


def _rotation(spec: OpSpec) -> _Work:
    n_rows, n_sph = len(m_primary_order(spec.lmax, spec.mmax)), (spec.lmax + 1) ** 2
    features = n_rows + n_sph if spec.op == "rotate_to_edge" else n_rows
    nonzeros = _nonzeros(spec)
    return _Work(2 * nonzeros * spec.channels, 0, features * spec.channels + nonzeros)


def _so2(spec: OpSpec) -> _Work:
    """Count four products of a pair +-m; three would do, for some more sums."""
    degrees = [spec.lmax - m + 1 for m in range(spec.mmax + 1)]
    weights = sum(n * n * (1 if m == 0 else 2) for m, n in enumerate(degrees)) * spec.channels**2
    products = sum(n * n * (1 if m == 0 else 4) for m, n in enumerate(degrees))
    n_rows = len(m_primary_order(spec.lmax, spec.mmax))
    return _Work(0, 2 * products * spec.channels**2, 2 * n_rows * spec.channels, weights)


def _layer(spec: OpSpec) -> _Work:
    """Count both atoms in, as many hidden channels, gates of every degree, and the sum out."""
    rotation, map_ = _rotation(spec), _so2(spec)
    gates = 2 * 2 * (spec.lmax + 1) * spec.lmax * spec.channels**2
    features = 2 * (spec.lmax + 1) ** 2 * spec.channels
    return _Work(
        3 * rotation.flops,
        3 * map_.matrix_flops + gates,
        features + _nonzeros(spec),
        3 * map_.shared,
    )


def _coupling(spec: OpSpec) -> _Work:
    """Count all paths up to lmax; y and the weights have channels of their own but in mode uvu."""
    paths = tensor_product_paths(spec.lmax, spec.lmax, spec.lmax)
    nonzeros = sum(int((clebsch_gordan(*path).abs() > _NOTHING).sum()) for path in paths)
    n_sph, channels = (spec.lmax + 1) ** 2, spec.channels
    features = n_sph * channels * (2 if spec.op == "tensor_product" else 1)
    if spec.mode == "uvu":
        y, weights, flops, mixing = n_sph, len(paths) * channels, 3 * nonzeros * channels, 0
    elif spec.mode == "uuu":
        y, weights, flops, mixing = n_sph * channels, len(paths) * channels, 0, 0
        flops = 4 * nonzeros * channels
    else:  # the products of all pairs of channels, then a matrix for each path
        y, weights, flops = n_sph * channels, len(paths) * channels**3, 3 * nonzeros * channels**2
        mixing = 2 * sum(2 * path.l3 + 1 for path in paths) * channels**3
    return _Work(flops, mixing, features + y + (weights if spec.weighted else 0))


def _contraction(spec: OpSpec) -> _Work:
    """Count products of up to three factors to degree 0, with weights of each atom's own."""
    form = SymmetricForm(spec.lmax, (0,), 3)
    rows = form.n_components + form.n_columns + form.n_rows
    return _Work(4 * len(form.terms()) * spec.channels, 0, rows * spec.channels)


def _sphere(spec: OpSpec) -> _Work:
    n_rows = len(m_primary_order(spec.lmax, spec.mmax))
    n_points = SphereGrid(spec.lmax, spec.mmax).n_points
    n_features = 3 if spec.op == "gaunt_product" else 2
    flops = 2 * n_features * n_rows * n_points * spec.channels
    return _Work(0, flops, n_features * n_rows * spec.channels)


def _segment(spec: OpSpec) -> _Work:
    passes = 1 if spec.op == "segment_sum" else 4
    return _Work(passes * spec.channels, 0, (1 if passes == 1 else 2) * spec.channels)


def _norm(spec: OpSpec) -> _Work:
    numbers = (spec.lmax + 1) ** 2 * spec.channels
    return _Work(4 * numbers, 0, 2 * numbers, (spec.lmax + 2) * spec.channels)


def _update(spec: OpSpec) -> _Work:
    """Count as many channels in and out as inside."""
    numbers = (spec.lmax + 1) ** 2 * spec.channels
    weights = (3 * spec.lmax + 2) * spec.channels**2
    products = 2 * numbers * spec.channels + spec.lmax * spec.channels**2
    return _Work(numbers, 2 * products, 2 * numbers, weights)


def _table(spec: OpSpec) -> _Work:
    return _Work(10 * spec.channels, 0, 3 + 7 * spec.channels)


def _nonzeros(spec: OpSpec) -> int:
    """Return the number of matrix elements of one edge's rotation, rows with |m| <= mmax only."""
    return sum((2 * min(l, spec.mmax) + 1) * (2 * l + 1) for l in range(spec.lmax + 1))
