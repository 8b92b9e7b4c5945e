"""Constant tables of the operations: built once in float64, kept per dtype and device.

Every table of this package (Wigner J matrices, generators, Clebsch-Gordan coefficients, grids) is
made by a function under :func:`constant_table`, and reaches a computation through
:func:`table_like`.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from atomeq.traces import constant_in_traces

P = ParamSpec("P")
T = TypeVar("T")


def constant_table(build: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Cache a function that builds a constant tensor from hashable arguments.

    A table first asked for inside ``torch.inference_mode()`` would be an inference tensor, which
    no later training step could save for its backward pass: so tables are built outside that mode,
    and on the CPU, whatever the default device is.
    """

    @functools.cache
    def built(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return build(*args, **kwargs)

    @functools.wraps(build)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return built(*args, **kwargs)

    return table


def table_like(table: Callable[..., Tensor], *args: object, like: Tensor) -> Tensor:
    """Return ``table(*args)`` on the device of ``like``, and in its dtype if it is floating."""
    if torch.compiler.is_compiling():
        # A trace can not look into a cache, but it can read a tensor from where it always stands.
        return getattr(_shelf, _shelve(table, args, like.dtype, like.device))
    return _converted(table, args, like.dtype, like.device)


@constant_table
def _converted(
    table: Callable[..., Tensor], args: tuple, dtype: torch.dtype, device: torch.device
) -> Tensor:
    values = table(*args)
    return values.to(device=device, dtype=dtype if values.is_floating_point() else None)


_shelf = SimpleNamespace()  # tables that traces have asked for


@constant_in_traces
def _shelve(
    table: Callable[..., Tensor], args: tuple, dtype: torch.dtype, device: torch.device
) -> str:
    """Put a table on the shelf and return its place, the same one every time."""
    values = _converted(table, args, dtype, device)
    place = f"{table.__name__}_{id(values)}"  # the cache keeps it alive
    setattr(_shelf, place, values)
    return place
