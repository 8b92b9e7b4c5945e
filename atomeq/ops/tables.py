"""Constant tables of the operations: built once in float64, kept per dtype and device.

Every table of this package (Wigner J matrices, generators, Clebsch-Gordan coefficients, grids) is
made by a function under :func:`constant_table`, and reaches a computation through
:func:`table_like`.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, cast

import torch
from torch import Tensor

P = ParamSpec("P")


def constant_table(build: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Cache a function that builds a constant tensor from hashable arguments.

    A table first asked for inside ``torch.inference_mode()`` would be an inference tensor, which
    no later training step could save for its backward pass: so tables are built outside that mode.
    """

    def outside_inference(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return build(*args, **kwargs)

    functools.update_wrapper(outside_inference, build)
    return cast(Callable[P, Tensor], functools.cache(outside_inference))


def table_like(table: Callable[..., Tensor], *args: object, like: Tensor) -> Tensor:
    """Return ``table(*args)`` on the device of ``like``, and in its dtype if it is floating."""
    return _converted(table, args, like.dtype, like.device)


@constant_table
def _converted(
    table: Callable[..., Tensor], args: tuple, dtype: torch.dtype, device: torch.device
) -> Tensor:
    values = table(*args)
    return values.to(device=device, dtype=dtype if values.is_floating_point() else None)
