"""How coarse the operands of matrix products may be: asked for by a caller, carried by its calls.

``highest`` multiplies in single precision, ``high`` may round operands to TF32 and ``medium`` to
bfloat16; all add in single precision, and double precision is never rounded. It is a permission:
a device without such units, a CPU say, computes as in ``highest``. Nobody asks: torch's own setting
(``torch.set_float32_matmul_precision``) holds, as it does for whatever is plain torch.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from atomeq.traces import constant_in_traces
from atomeq.typing import Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class _Choice(threading.local):
    """What is asked for in this thread; a plain attribute, since that is what a trace guards."""

    def __init__(self) -> None:
        self.asked: Precision | None = None


_choice = _Choice()


@contextmanager
def use_precision(precision: Precision | None) -> Iterator[None]:
    """Let the kernels that are called inside the ``with`` block round their operands so far.

    It belongs to the current thread, and to the gradients of what was computed in the block.

    Args:
        precision: ``highest``, ``high`` or ``medium``; None changes nothing.

    Example:
        >>> with use_precision("high"):
        ...     matmul_precision()
        'high'
    """
    before = _choice.asked
    _choice.asked = before if precision is None else precision
    try:
        yield
    finally:
        _choice.asked = before


def matmul_precision() -> Precision:
    """Return what kernels may do here: what was asked for, else torch's own setting."""
    return _choice.asked or torch_precision()


def halved(dtype: torch.dtype) -> bool:
    """Whether operands in single precision are rounded to bfloat16: ``medium``."""
    return dtype == torch.float32 and matmul_precision() == "medium"


def operand_dtype(like: torch.Tensor) -> torch.dtype:
    """Return the dtype of what only a product of matrices reads."""
    return torch.bfloat16 if halved(like.dtype) else like.dtype


@constant_in_traces
def torch_precision() -> Precision:
    """Return ``torch.get_float32_matmul_precision()``, which a trace takes for a constant."""
    return torch.get_float32_matmul_precision()  # pyright: ignore[reportReturnType]


def checked_precision(precision: str | None) -> Precision | None:
    """Return a precision that there is.

    Raises:
        ValueError: It is none.
    """
    for known in PRECISIONS:
        if precision == known:
            return known
    if precision is None:
        return None
    raise ValueError(f"precision must be {', '.join(PRECISIONS)}, not {precision!r}")
