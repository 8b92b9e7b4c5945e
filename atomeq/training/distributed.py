"""What several processes have to agree on: a loss is a mean over the batch of all of them.

Each process has its share of a batch, and shares differ in size. Gradients are averaged over the
processes, so a share's loss is its sum over the mean count of the shares: the average is then the
loss, and the gradient, of the whole batch in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed

from atomeq.graph.atom_graph import AtomGraph

_joint: ContextVar[bool] = ContextVar("counts are those of all processes", default=False)


@contextmanager
def joint_counts() -> Iterator[None]:
    """Count over all processes within the block, in which every one of them must be."""
    token = _joint.set(n_processes() > 1)
    try:
        yield
    finally:
        _joint.reset(token)


def joint_count(count: Tensor) -> Tensor:
    """Return what a sum is divided by to become a mean: the count, at least 1.

    Within :func:`joint_counts` it is the mean count of all processes.
    """
    if not _joint.get():
        return count.clamp(min=1)
    total = count.detach().to(torch.float64)
    distributed.all_reduce(total)
    return total.clamp(min=1) / n_processes()


def joint_structures(batch: AtomGraph) -> int:
    """Return the number of structures in the batch of all processes, within such a block."""
    return round(float(joint_count((batch["dataset_index"] >= 0).sum())) * n_processes())


def is_empty_share(batch: AtomGraph) -> bool:
    """Tell whether a process has nothing of a batch, and a structure without labels for it."""
    return bool((batch["dataset_index"] < 0).all())


def n_processes() -> int:
    """Return how many processes train together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def of_all_processes(value: Any) -> list[Any]:
    """Return the plain values of all processes, by their rank."""
    if n_processes() == 1:
        return [value]
    gathered: list[Any] = [None] * n_processes()
    distributed.all_gather_object(gathered, value)
    return gathered


def whole(value: Any) -> Any:
    """Return a tensor of which each process keeps a share; anything else as it is."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather().detach()


def part_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor as a parameter is: on its device, and a share where it is one."""
    found = tensor.to(device=parameter.device, dtype=parameter.dtype)
    if not hasattr(parameter, "full_tensor") or hasattr(found, "full_tensor"):
        return found
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(found, parameter.device_mesh, parameter.placements)
