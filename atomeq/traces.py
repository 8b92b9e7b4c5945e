"""What code asks of tensors while torch may be tracing it."""

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has numbers to look at: a trace's and a fake one have a shape alone."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def known_to_the_host(tensor: Tensor) -> bool:
    """Whether a step may depend on a tensor's numbers: those on a GPU take waiting."""
    return has_values(tensor) and tensor.is_cpu


def constant_in_traces(function: Callable[P, T]) -> Callable[P, T]:
    """Let a trace run a function and take its answer for a constant.

    This is ``torch.compiler.assume_constant_result``, which imports the compiler to set its mark:
    two seconds that who does not compile should not wait.
    """
    if "torch._dynamo" in sys.modules:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
