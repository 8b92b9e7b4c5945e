"""Kernels prove themselves before they serve unasked: value and gradients against the reference.

A kernel that was right where it was written may be wrong, or fail to compile, on another device or
with another compiler. So the first time that ``auto`` would take it for an operation, degrees and
dtype, it meets a small random problem there.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.precision import matmul_precision, use_precision
from atomeq.ops.specification import Size
from atomeq.typing import Precision

# The tensors that are differentiated by, and what becomes of them with a function of the
# operation's signature.
Example = tuple[list[Tensor], Callable[..., Tensor]]

# Of the largest number: rounding of sums in another order, by how matrices are multiplied.
_ERRORS = {"highest": 2e-5, "high": 5e-3, "medium": 5e-2}
_DOUBLE, _HALF = 1e-10, 5e-2


def random(size: Size, *shape: int) -> Tensor:
    """Return normal numbers of a shape in the dtype and on the device of a call."""
    values = torch.randn(shape, dtype=torch.float64, device="cpu")
    return values.to(size.device, size.dtype)


def indices(size: Size, n: int, *shape: int) -> Tensor:
    """Return numbers below n of a shape on the device of a call; the last one may be missing."""
    return torch.randint(0, max(1, n - 1), shape, device="cpu").to(size.device)


def deviation(
    example: Callable[[Size], Example],
    reference: Callable[..., Any],
    by_kernels: Callable[..., Any],
    size: Size,
    precision: Precision,
) -> str | None:
    """Say how far kernels are from the reference on a random problem, or None if they are right.

    It runs in a thread of its own, which no mode of the caller's reaches: inference, autocast,
    a trace.

    Args:
        example: Makes the problem.
        reference: The operation in plain torch; it computes in double precision.
        by_kernels: The same by the kernels.
        size: Of the call that they are to serve.
        precision: At which they are to serve it.
    """
    found: list[str | None] = []

    def check() -> None:
        try:
            with use_precision(precision):
                found.append(_deviation(example, reference, by_kernels, size))
        except Exception as error:  # a compiler fails in its own ways, and none of them is ours
            found.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    return found[0]


def _deviation(
    example: Callable[[Size], Example],
    reference: Callable[..., Any],
    by_kernels: Callable[..., Any],
    size: Size,
) -> str | None:
    exact, tested = (
        _value_and_gradients(partial(example, given), function)
        for given, function in (
            (size._replace(dtype=torch.float64), reference),
            (size, by_kernels),
        )
    )
    allowed = _allowed(size.dtype)
    for number, (truth, value) in enumerate(zip(exact, tested, strict=True)):
        scale = max(float(truth.abs().max()), 1e-3) if truth.numel() else 1.0
        error = float((value.double() - truth).abs().max()) / scale if truth.numel() else 0.0
        if not error <= allowed:  # nor if it is NaN
            what = "its value" if number == 0 else f"its gradient number {number}"
            return f"{what} is off by {error:.1e} of the largest number, {allowed:.0e} is allowed"
    return None


def _value_and_gradients(
    example: Callable[[], Example], function: Callable[..., Any]
) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves, compute = example()
        leaves = [leaf.requires_grad_() for leaf in leaves]
        value = compute(function, *leaves)
        # drawn in double precision whatever the dtype, so that both have the same numbers
        cotangent = torch.randn(value.shape, dtype=torch.float64, device="cpu").to(value)
    gradients = torch.autograd.grad(value, leaves, cotangent) if leaves else ()
    return [tensor.detach() for tensor in (value, *gradients)]


def _allowed(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return _DOUBLE
    return _ERRORS[matmul_precision()] if dtype == torch.float32 else _HALF
