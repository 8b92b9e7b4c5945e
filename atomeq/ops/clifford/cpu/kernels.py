"""The geometric product by a C kernel that is written for one algebra: its terms are unrolled."""

import ctypes
import functools

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, refusal, source_of, threads_for
from atomeq.ops.clifford.algebra import Algebra, Term, terms
from atomeq.ops.clifford.registered import FACTORS

__all__ = ["product", "refusal", "weights"]

_NUMBERS_PER_THREAD = 2**15  # fewer do not pay for a thread


def product(
    first: Tensor, second: Tensor, weights: Tensor | None, wanted: str, algebra: Algebra
) -> Tensor:
    """Return the derivative of the form by one multivector, (n, 2^n, C)."""
    library = _library(algebra, first.dtype)
    first, second = first.contiguous(), second.contiguous()
    if weights is None:
        weights = first.new_ones(algebra.n_paths, first.shape[-1])
    weights, result = weights.contiguous(), torch.empty_like(first)
    getattr(library, f"to_{wanted}")(
        *(first.data_ptr(), second.data_ptr(), weights.data_ptr(), result.data_ptr()),
        *(len(first), first.shape[-1], _parts(first)),
    )
    return result


def weights(left: Tensor, right: Tensor, output: Tensor, algebra: Algebra) -> Tensor:
    """Return the derivative of the form by the weights, (n_paths, C)."""
    library, parts = _library(algebra, left.dtype), _parts(left)
    left, right, output = left.contiguous(), right.contiguous(), output.contiguous()
    sums = left.new_zeros(parts, algebra.n_paths, left.shape[-1])
    library.to_weights(
        *(left.data_ptr(), right.data_ptr(), output.data_ptr(), sums.data_ptr()),
        *(len(left), left.shape[-1], parts),
    )
    return sums.sum(dim=0) if parts > 1 else sums[0]


def _parts(x: Tensor) -> int:
    return max(1, min(threads_for(x.numel(), _NUMBERS_PER_THREAD), len(x)))


@functools.cache
def _library(algebra: Algebra, dtype: torch.dtype) -> ctypes.CDLL:
    defines: dict[str, str | int] = {"REAL": REALS[dtype], "N_BLADES": algebra.n_blades}
    defines["N_PATHS"] = algebra.n_paths
    for wanted, (first, second) in FACTORS.items():
        sums: dict[int, list[str]] = {number: [] for number in range(algebra.n_blades)}
        for term in terms(algebra):
            numbers = (term.path, getattr(term, first), getattr(term, second))
            sums[getattr(term, wanted)].append(_signed("TERM", term, numbers))
        defines[f"TO_{wanted.upper()}"] = _statements("BLADE", sums)
    of_paths: dict[int, list[str]] = {number: [] for number in range(algebra.n_paths)}
    for term in terms(algebra):
        of_paths[term.path].append(_signed("CUBE", term, (term.left, term.right, term.output)))
    defines["TO_WEIGHTS"] = _statements("PATH", of_paths)
    library = load(source_of("clifford/cpu/product.c", defines))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for wanted in FACTORS:  # made by a macro, which is not read off the source
        function = getattr(library, f"to_{wanted}")
        function.argtypes = (*[pointer] * 4, size, size, ctypes.c_int)
        function.restype = None
    return library


def _signed(macro: str, term: Term, numbers: tuple[int, int, int]) -> str:
    return f"{'+' if term.sign > 0 else '-'} {macro}({', '.join(map(str, numbers))})"


def _statements(macro: str, sums: dict[int, list[str]]) -> str:
    return " ".join(f"{macro}({number}, {' '.join(some)})" for number, some in sums.items())
