"""The C kernels of edges: rotations, SO(2) maps, their gate and factors, and a whole layer.

What comes and goes with a block of edges lies in memory that the next block uses again.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, BuildError, load, n_threads, refusal, source_of
from atomeq.ops.edge.cpu.memory import empty
from atomeq.ops.edge.layer import EdgeLayer, Named, WayIn
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.edge.wigner import generators, tilt_tables
from atomeq.ops.orders import orders_of, row_degrees
from atomeq.ops.tables import constant_table

__all__ = ["empty", "refusal"]

_LAYER_BLOCK = 2**18  # numbers of the widest rows of an edge layer
_LEAST_EDGES, _MOST_EDGES = 400, 1024  # of a block; matrix products want some rows
_MAP_EDGES_PER_THREAD = 48  # fewer do not pay for a thread; a whole layer of so many shares less
_LAYER_EDGES_PER_THREAD = 500
# In C some dozens of edges go through all steps of a layer before they leave the cache. 24 are as
# fast in small layers, and a tenth slower in large ones.
_EDGES_AT_ONCE = 64
_MOST_INPUTS = 768  # of order 0: products of larger matrices outgrow the cache, and so2.c cuts them

# Arguments of the functions in C: p is a pointer, n a number.
_FUNCTIONS = {
    "edge": {
        "gather_rotate": "pppnppnn",
        "rotate_scatter": "pppnppnn",
        "torque": "ppppnppppnn",
        "gather_gradient": "pppnppppppppnn",
        "scale_rows": "ppppppnn",
        "scale_second": "ppppppppnn",
        "gate": "pppnn",
        "gate_gradient": "ppppnn",
        "gate_second": "ppppppnn",
    },
    "so2": {
        "packed_size": "nnnn",
        "panels_size": "n",
        "pack_map": "ppnnnnp",
        "map_rows": "pppnnnnpnn",
        "map_weights": "pppnnnppnn",
    },
    "wigner": {"edge_wigner": "pppnpn"},
}


@functools.cache
def _library(name: str, dtype: torch.dtype, lmax: int, mmax: int) -> ctypes.CDLL:
    library = load(_source(name, dtype, lmax, mmax))
    for function, arguments in _FUNCTIONS[name].items():
        kinds = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in arguments]
        getattr(library, function).argtypes = kinds
        getattr(library, function).restype = ctypes.c_int64 if "size" in function else None
    return library


def _source(name: str, dtype: torch.dtype, lmax: int, mmax: int) -> str:
    defines = {"REAL": REALS[dtype], "LMAX": lmax, "MMAX": mmax}
    return source_of(f"edge/cpu/{name}.c", defines)


def _rotations(wigner: Tensor) -> ctypes.CDLL:
    return _library("edge", wigner.dtype, *orders_of(wigner.shape[1], wigner.shape[2]))


def _address(tensor: Tensor | None) -> int | None:
    """Return a tensor's address, None for none.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(f"a C kernel was given strides {tensor.stride()}; pass .contiguous()")
    return tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * max(1, len(tensors)))(*map(_address, tensors))


def _numbers(index: Tensor, atoms: Tensor) -> Tensor:
    """Return contiguous numbers of atoms, none of them beyond the atoms: else C reads anything.

    A frame has been checked already; a compiled graph comes here with indices nobody has seen.

    Raises:
        IndexError: If a number is not in 0..n_atoms - 1.
        ValueError: If the numbers are not int64.
    """
    if index.dtype != torch.long:
        raise ValueError(f"a C kernel was given {index.dtype} for the numbers of atoms; pass int64")
    index = index.contiguous()
    if not _in_range()(index.data_ptr(), len(index), len(atoms)):
        raise IndexError(f"an edge ends at an atom that is not among the {len(atoms)} given")
    return index


@functools.cache
def _in_range() -> Any:
    library = load(source_of("segment/cpu/segments.c", {"REAL": "float"}))
    library.segments_in_range.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return library.segments_in_range


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    operand: bool = False,
) -> Tensor:
    """Return scale * W G x, (n_edges, n_rows, S * channels); an operand is like any other here.

    Args:
        x: (n_atoms, n_sph, channels), or of the edges if there are no indices.
        wigner: (n_edges, n_rows, n_sph), in m-primary order and block diagonal in l; the product
            with an infinitesimal rotation from the right is still that.
        indices: Atoms of the edges, (n_edges,), joined along the channels.
        scale: (n_edges, sum over m of (lmax - m + 1) * S * channels); +m and -m share theirs.
        operand: Whether the result is read by a map alone, and may have the precision of those.
    """
    x, wigner, scale = x.contiguous(), wigner.contiguous(), _plain(scale)
    ends = [_numbers(index, x) for index in indices]
    rows = empty((*wigner.shape[:2], max(1, len(ends)) * x.shape[2]), x)
    _rotations(wigner).gather_rotate(
        *(_address(x), _address(wigner), _addresses(ends), len(ends)),
        *(_address(scale), _address(rows), len(rows), x.shape[2]),
    )
    return rows


def rotate_scatter(
    rows: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    n_atoms: int,
    *,
    factor: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Return G^T W^T (factor * rows), (n_atoms, n_sph, channels), added to the total if given.

    ``factor`` is (n_edges,). Without indices the result is of each edge.
    """
    rows, wigner, factor = rows.contiguous(), wigner.contiguous(), _plain(factor)
    if total is None:
        size = (n_atoms if indices else len(rows), wigner.shape[2])
        total = rows.new_zeros(*size, rows.shape[2] // max(1, len(indices)))
    ends = [_numbers(index, total) for index in indices]
    _rotations(wigner).rotate_scatter(
        *(_address(rows), _address(wigner), _addresses(ends), len(ends)),
        *(_address(factor), _address(total), len(rows), total.shape[2]),
    )
    return total


def torque(x: Tensor, rows: Tensor, wigner: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Return <W^T rows, X_k G x> for the three generators X_k, (n_edges, 3)."""
    x, rows, wigner = x.contiguous(), rows.contiguous(), wigner.contiguous()
    ends = [_numbers(index, x) for index in indices]
    found = rows.new_empty(len(rows), 3)
    _rotations(wigner).torque(
        *(_address(x), _address(rows), _address(wigner), _addresses(ends), len(ends)),
        *map(_address, _generators(x.dtype, x.shape[1])),
        *(_address(found), len(rows), x.shape[2]),
    )
    return found


def gather_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor | None,
    shape: SO2Shape,
    into: WayIn,
) -> None:
    """Give the gradients of <grad, s W G x>; grad, (n_edges, n_rows * c_in), may change.

    Without ``scale`` the factors are 1.
    """
    x, wigner, scale = x.contiguous(), wigner.contiguous(), _plain(scale)
    ends = [_numbers(index, x) for index in indices]
    _rotations(wigner).gather_gradient(
        *(_address(x), _address(wigner), _addresses(ends), len(ends)),
        *map(_address, (grad, scale, *into, *_generators(x.dtype, x.shape[1]))),
        *(len(grad), x.shape[2]),
    )


def edge_wigner(vectors: Tensor, lmax: int, mmax: int) -> Tensor:
    """Return the rows that take edges to +y, (n_edges, n_rows, n_sph)."""
    degrees, tables = _wigner_tables(vectors.dtype, lmax, mmax)
    vectors = vectors.contiguous()
    wigner = vectors.new_empty(len(vectors), len(degrees), (lmax + 1) ** 2)
    _library("wigner", vectors.dtype, lmax, 0).edge_wigner(
        *map(_address, (vectors, degrees, tables)), len(degrees), _address(wigner), len(vectors)
    )
    return wigner


class SO2Map:
    """The map M of some weights, packed in the order in which the kernel reads them."""

    def __init__(self, weights: list[Tensor], shape: SO2Shape) -> None:
        self.shape = shape
        self.weights = [weight.contiguous() for weight in weights]
        self._library = _library("so2", weights[0].dtype, shape.lmax, shape.mmax)
        self._complex = _complex(weights)
        self._packed: dict[int, Tensor] = {}

    def forward(
        self, rows: Tensor, out: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Return M rows + bias, (n_edges, n_rows * c_in) -> (n_edges, width).

        The bias, if there is one, belongs to the first of the outputs, those of m = 0.
        """
        out = empty((len(rows), self.shape.width), rows) if out is None else out
        self._multiply(rows, out, 0)
        if bias is not None:
            out[:, : len(bias)] += bias
        return out

    def gated(self, rows: Tensor, out: Tensor, *, keep: bool) -> Tensor:
        """Write y = M rows to ``out``; return a(y)."""
        return Gate(self.forward(rows, out), self.shape).value()

    def transposed(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
        out = empty((len(grad), self.shape.width_in), grad) if out is None else out
        self._multiply(grad, out, 1)
        return out

    def _multiply(self, rows: Tensor, out: Tensor, back: int) -> None:
        sizes = (back, *self.shape[2:])
        if back not in self._packed:
            packed = empty((self._library.packed_size(*sizes),), self.weights[0])
            places = _addresses(self.weights)
            self._library.pack_map(places, self._complex, *sizes, packed.data_ptr())
            self._packed[back] = packed
        self._library.map_rows(
            *(_address(rows), self._packed[back].data_ptr(), self._complex, *sizes),
            *(_address(out), len(rows), _threads(len(rows), _MAP_EDGES_PER_THREAD)),
        )


def add_weight_gradients(rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape) -> None:
    """Add the gradients of <grad, M rows> with respect to the weights to ``into``."""
    library = _library("so2", rows.dtype, shape.lmax, shape.mmax)
    panels = empty((library.panels_size(shape.c_in),), rows)
    library.map_weights(
        *(_address(rows), _address(grad), _complex(into), *shape[2:], _addresses(into)),
        *(_address(panels), len(rows), _threads(len(rows), _MAP_EDGES_PER_THREAD)),
    )


def _complex(weights: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_int64 * len(weights))(*[weight.ndim == 3 for weight in weights])


def _threads(n_edges: int, each: int) -> int:
    return min(n_threads(), n_edges // each) if n_edges >= 2 * each else 1


class Gate:
    """SiLU on l = 0, sigmoid gates on l > 0: value a(y), Jacobian J and second derivative.

    Of y, (n_edges, lmax * channels + n_rows * channels), the gates of l = 1..lmax come first.
    """

    def __init__(self, y: Tensor, shape: SO2Shape) -> None:
        self.y = y
        self.shape = shape
        # the gates and the row l = 0 lie side by side
        scalars = y[:, : (shape.lmax + 1) * shape.c_out]
        self.sigmoid = torch.sigmoid(scalars, out=empty(scalars.shape, y))

    def value(self) -> Tensor:
        """Return SiLU of l = 0, and gated rows, (n_edges, n_rows * channels)."""
        value = empty((len(self.y), self.shape.n_rows * self.shape.c_out), self.y)
        self._call("gate", value)
        return value

    def gradient(self, grad: Tensor) -> Tensor:
        """Return J^T grad, like y."""
        result = empty(self.y.shape, self.y)
        self._call("gate_gradient", grad, result)
        return result

    def second(self, moved: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return J moved, like a, and the gradient of <moved, J^T grad> in y, like y."""
        value, curved = empty(grad.shape, grad), empty(self.y.shape, self.y)
        self._call("gate_second", moved, grad, value, curved)
        return value, curved

    def _call(self, name: str, *tensors: Tensor) -> None:
        function = getattr(_library("edge", self.y.dtype, *self.shape[:2]), name)
        given = (self.y, self.sigmoid, *tensors)
        function(*map(_address, given), len(self.y), self.shape.c_out)


def scaled(
    rows: Tensor, moved: Tensor, scale: Tensor, moved_scale: Tensor | None, shape: SO2Shape
) -> tuple[Tensor, Tensor]:
    """Return z = s r and its derivative z' = s r' + s' r along a direction."""
    z, moved_z = empty(rows.shape, rows), empty(rows.shape, rows)
    scale, moved_scale = scale.contiguous(), _plain(moved_scale)
    given = (rows, moved, scale, moved_scale, z, moved_z)
    library = _library("edge", rows.dtype, *shape[:2])
    library.scale_rows(*map(_address, given), len(rows), shape.c_in)
    return z, moved_z


def scaled_second_(
    rows: Tensor,
    moved: Tensor,
    grad: Tensor,
    moved_grad: Tensor,
    scale: Tensor,
    moved_scale: Tensor | None,
    shape: SO2Shape,
) -> tuple[Tensor, Tensor]:
    """Return dE/ds and its derivative; dE/dz and its derivative become those of dE/dr."""
    through, moved_through = empty(scale.shape, scale), empty(scale.shape, scale)
    scale, moved_scale = scale.contiguous(), _plain(moved_scale)
    given = (rows, moved, scale, moved_scale, grad, moved_grad, through, moved_through)
    library = _library("edge", rows.dtype, *shape[:2])
    library.scale_second(*map(_address, given), len(rows), shape.c_in)
    return through, moved_through


def scaled_rows(rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), for factors s (n_edges, n_scales)."""
    result = torch.empty_like(rows)
    for block in shape.blocks:
        for columns in block.inputs:
            torch.mul(rows[:, columns], scale[:, block.scales], out=result[:, columns])
    return result


def row_products(left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
    """Return the products of rows, summed over +m and -m, (n_edges, n_scales)."""
    result = left.new_empty(len(left), shape.n_scales)
    for block in shape.blocks:
        part = result[:, block.scales]
        torch.mul(left[:, block.inputs[0]], right[:, block.inputs[0]], out=part)
        for columns in block.inputs[1:]:
            part.addcmul_(left[:, columns], right[:, columns])
    return result


def edges_at_once(first: SO2Shape) -> int:
    """Return how many edges keep a layer's rows in the cache."""
    return min(max(_LAYER_BLOCK // max(1, first.width_in), _LEAST_EDGES), _MOST_EDGES)


def layer_value(layer: EdgeLayer, *, keep: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the sums on the atoms, y and u in one call of C, or None where it does not serve."""
    if not _whole_layer_serves(layer):
        return None
    x = layer.tensors["x"]
    total = x.new_zeros(x.shape[0], x.shape[1], layer.shapes[1].c_out)
    n_kept, (_, width, _, width_out) = layer.n_edges if keep else 0, layer.widths
    y, u = x.new_empty(n_kept, width), x.new_empty(n_kept, width_out)
    _call_layer(layer, "layer_value", {"total": total} | ({"y": y, "u": u} if keep else {}))
    return total, y, u


def layer_gradient(layer: EdgeLayer, grad: Tensor, kept: list[Tensor], found: Named) -> bool:
    """Write dE/de of the inputs that are ``found``; False if gradients of weights are among them.

    What is found comes as :func:`~atomeq.ops.edge.layer.empty_gradients` makes it.
    """
    if not found.keys() <= _RESULTS.keys() or not _whole_layer_serves(layer):
        return False
    given = {_RESULTS[name]: tensor for name, tensor in found.items()} | {"grad": grad}
    if len(kept[0]):
        given |= {"y": kept[0], "u": kept[1]}
    _call_layer(layer, "layer_gradient", given)
    return True


_RESULTS = {"x": "to_x", "vectors": "to_turn", "envelope": "to_envelope", "radial": "to_radial"}


def _whole_layer_serves(layer: EdgeLayer) -> bool:
    """Say whether layer.c knows the layer's weights, chiral ones it does not, and gains by them."""
    weights = [*layer.weights["first"], *layer.weights["second"]]
    return all([w.ndim == 2 for w in weights]) and weights[0].shape[1] <= _MOST_INPUTS


def _call_layer(layer: EdgeLayer, name: str, given: Named) -> None:
    x, (first, second) = layer.tensors["x"], layer.shapes
    library, kind = _layer_library(x.dtype, first.lmax, first.mmax)
    tensors = layer.tensors | given
    tensors |= zip(_FIELDS[-3:], _generators(x.dtype, x.shape[1]), strict=True)
    for end in ("source", "target"):
        tensors[end] = _numbers(tensors[end], x)
    weights = {key: [w.contiguous() for w in some] for key, some in layer.weights.items()}
    arguments = kind(
        n_edges=layer.n_edges,
        n_atoms=x.shape[0],
        channels=x.shape[2],
        hidden=first.c_out,
        c_out=second.c_out,
        n_radial=tensors["radial"].shape[1] if "radial" in tensors else 0,
        at_once=_EDGES_AT_ONCE,
        n_parts=_threads(layer.n_edges, _LAYER_EDGES_PER_THREAD),
        **{key: _addresses(some) for key, some in weights.items()},
        **{field: _address(tensor) for field, tensor in tensors.items()},
    )
    if not getattr(library, name)(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for the blocks of {layer.n_edges} edges")


_SIZES = (
    *("n_edges", "n_atoms", "channels", "hidden", "c_out", "n_radial"),
    *("at_once", "n_parts"),
)
_FIELDS = (
    *("x", "wigner", "source", "target", "radial", "radial_weight", "radial_bias", "envelope"),
    *("y", "u", "total", "grad", "to_x", "to_turn", "to_radial", "to_envelope"),
    *("generator", "place", "count"),
)


@functools.cache
def _layer_library(dtype: torch.dtype, lmax: int, mmax: int) -> tuple[ctypes.CDLL, type]:
    """Return the kernel and the type of layer_t in layer.c, whose fields these are."""
    pointer = ctypes.c_void_p
    weights = [(name, pointer * (mmax + 1)) for name in ("first", "second")]
    after = _FIELDS.index("y")
    fields = [(name, ctypes.c_int64) for name in _SIZES]
    fields += [(name, pointer) for name in _FIELDS[:after]] + weights
    fields += [(name, pointer) for name in _FIELDS[after:]]
    kind = type("layer_t", (ctypes.Structure,), {"_fields_": fields})
    library = load(_source("edge", dtype, lmax, mmax) + source_of("edge/cpu/layer.c", {}))
    names = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "layer_names")))
    known = names.decode().split()
    places = list((ctypes.c_int64 * (len(known) + 1)).in_dll(library, "layer_places"))
    own = [getattr(kind, name).offset for name, _ in fields]
    if known != [name for name, _ in fields] or places != [*own, ctypes.sizeof(kind)]:
        raise BuildError("layer_t in layer.c is not what this module writes; see _SIZES, _FIELDS")
    return library, kind


@functools.cache
def _wigner_tables(dtype: torch.dtype, lmax: int, mmax: int) -> tuple[Tensor, Tensor]:
    """Return the degree of each row, and the factors of its elements."""
    return row_degrees(lmax, mmax), _dense_rows(lmax, mmax).to(dtype)


@constant_table
def _dense_rows(lmax: int, mmax: int) -> Tensor:
    """Return, row by row, the factors of cos(k beta), k <= l, and of sin(k beta), 1 <= k <= l."""
    tilt = tilt_tables(lmax, mmax)[0]  # (2 lmax + 2, n_rows, n_sph)
    parts = []
    for row, l in enumerate(row_degrees(lmax, mmax).tolist()):
        own = tilt[:, row, l * l : (l + 1) ** 2]
        parts += [own[: l + 1], own[lmax + 2 : lmax + 2 + l]]
    return torch.cat([part.flatten() for part in parts])


@functools.cache
def _generators(dtype: torch.dtype, n_sph: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the elements of the generators of rotations as the kernels take them.

    These are the values, one generator after the other, row and column of each, and where each
    generator starts and the last one ends.
    """
    table = generators(math.isqrt(n_sph) - 1)
    exist = table.abs() > 1e-9  # the others are rounding
    counts = [0, *exist.flatten(1).sum(1).cumsum(0).tolist()]
    places = exist.nonzero()[:, 1:].contiguous()
    return table[exist].to(dtype), places, torch.tensor(counts, device="cpu")
