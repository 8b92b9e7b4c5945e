"""Tables of functions of the edges' lengths, read by the C kernels."""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.c_compiler import c_library, checked_index, refusal, threads_for

__all__ = ["read_pairs", "read_pairs_gradient", "refusal"]

_NUMBERS_PER_THREAD = 2**14  # fewer do not pay for a thread


def read_pairs(call: SimpleNamespace) -> list[Tensor]:
    """Return the functions, a tensor (n_edges, width) for each width."""
    found = [call.vectors.new_empty(len(call.vectors), width) for width in call.widths]
    _run("read_tables", call, found)
    return found


def read_pairs_gradient(call: SimpleNamespace) -> Tensor:
    """Return the gradient by the vectors, (n_edges, 3)."""
    result = call.vectors.new_empty(len(call.vectors), 3)
    _run("read_tables_gradient", call, call.grads, result)
    return result


def _run(name: str, call: SimpleNamespace, parts: list[Tensor], *result: Tensor) -> None:
    n_edges, (n_kinds, n_intervals, _, width) = len(call.vectors), call.polynomials.shape[1:]
    ends = checked_index(call.edge_index, len(call.kinds), "an edge ends at an atom")
    kinds = checked_index(call.kinds, n_kinds, "an atom is of a kind")
    getattr(c_library("pairs/cpu/pairs.c", call.vectors.dtype), name)(
        *(call.vectors, ends[0], ends[1], kinds, n_edges, call.polynomials, n_kinds, n_intervals),
        *(width, call.step, [part.shape[1] for part in parts], len(parts), parts, *result),
        threads_for(n_edges * width, _NUMBERS_PER_THREAD),
    )
