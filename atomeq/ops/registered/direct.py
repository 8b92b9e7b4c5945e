"""When torch's dispatcher has nothing to do for a registered operation but to call its function.

Through the dispatcher a call costs tens of microseconds in Python, as much as the kernel of a
molecule. Where nobody watches and nothing is to be differentiated, the function alone gives the
same result.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad, profiler

_TENSORS = (Tensor, torch.nn.Parameter)  # other classes may want to see the call


def may_call(values: Iterable[Any]) -> bool:
    """Return whether an operation on these arguments is its function alone, in eager mode.

    It is not if a gradient will be wanted, under ``torch.func``, in a trace, in a mode of torch, in
    a profile, or if a tensor is more than numbers on a CPU or a GPU.
    """
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() & ~_USUAL_KEYS
        or torch._C._is_torch_function_mode_enabled()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    ):
        return False
    return _all_plain(values, torch.is_grad_enabled())


def _all_plain(values: Iterable[Any], differentiable: bool) -> bool:
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            if differentiable and value.requires_grad:
                return False
            if torch._C._dispatch_keys(value).raw_repr() & ~_PLAIN_KEYS:
                return False
        elif kind in (list, tuple):
            if not _all_plain(value, differentiable):
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def _bits(*keys: DispatchKey) -> int:
    bits = 0
    for key in keys:
        bits |= DispatchKeySet(key).raw_repr()
    return bits


_USUAL_KEYS = _bits(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)  # of every thread
_PLAIN_KEYS = _bits(
    *(DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.ADInplaceOrView),
    *(DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA),
    *(DispatchKey.AutocastCPU, DispatchKey.AutocastCUDA),
)
