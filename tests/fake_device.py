"""A device without memory: models run on it, and what they send to it and ask it is written down.

torch's fake tensors know shapes and devices and no values, so a question to the device has no
answer and a tensor of the host does not mix with the device's. This is a script, for the name of a
device and the tables it leaves in caches are a whole process's; it prints JSON.
"""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from structures import RATTLED
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn import radial_tables
from atomeq.nn.radial_tables import RadialTables, exact_radial_functions
from atomeq.ops import dispatch, tables
from atomeq.ops.dispatch import use_backend
from atomeq.potential.captured import Padded, refusal
from atomeq.potential.checkpoint import untrained_potential
from atomeq.potential.compiled import graph_fields
from atomeq.potential.potential import Potential

DEVICE = "fakegpu"
MODE = FakeTensorMode()
#: Operations that a host waits for, since what comes next depends on the numbers they find.
QUESTIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
_build_table = tables._converted


class Dispatches(TorchDispatchMode):
    """Writes down what is sent to the device, what it is asked and what the host makes meanwhile.

    Views cost a device nothing and are not counted.

    Attributes:
        counts: Operations by name.
        questions: The line of the package that waits for an answer, once for each time.
        on_host: Operations of which an argument or a result is a tensor of the host, where the
            device computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.questions: list[str] = []
        self.on_host: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Run an operation; to a question the device says no, zero or nothing, and it goes on."""
        name = func.overloadpacket.__name__
        if is_question(func, args):
            self.questions.append(_line_of_the_package())
            return _no(name, args)
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" for x in tensors):
            self.on_host.append(f"{name} in {_line_of_the_package()}")
        if func.namespace != "prim" and not func.is_view:
            self.counts[name] += 1
        return result


def is_question(func: Any, args: tuple) -> bool:
    """Whether a host waits for an operation, since what comes next depends on what it finds."""
    name = func.overloadpacket.__name__
    masks = args[1] if name.lstrip("_") in ("index", "index_put_", "index_put") else ()
    masked = any(mask is not None and mask.dtype == torch.bool for mask in masks)
    # A single number goes where a mask is without looking for the places.
    return name in QUESTIONS or (masked and (name == "index" or args[2].numel() != 1))


def _no(name: str, args: tuple) -> Any:
    about = args[0]
    if name == "nonzero":
        return about.new_empty(0, about.dim(), dtype=torch.int64)
    if name == "index":
        return about.new_empty(0, *about.shape[args[1][0].dim() :])
    if name == "_local_scalar_dense":
        return False if about.dtype == torch.bool else 0
    if name == "_unique2":
        return about.new_empty(0), about.new_empty(0), about.new_empty(0)
    raise NotImplementedError(f"no answer to {name} in {_line_of_the_package()}")


def nested_zeros(tensor: Tensor) -> list:
    """Stand in for a fake tensor's tolist(), which asks for one number after the other."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Dispatches):
            mode.questions.append(_line_of_the_package())
    return np.zeros(tuple(tensor.shape), bool if tensor.dtype == torch.bool else int).tolist()


def _line_of_the_package() -> str:
    frame = sys._getframe()
    while frame is not None:
        _, package, path = frame.f_code.co_filename.rpartition(f"{os.sep}atomeq{os.sep}")
        if package:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


@functools.cache
def table_on_device(
    table: Callable[..., Tensor], args: tuple, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Build a table of real numbers, which some are made of other tables, and move it."""
    with unset_fake_temporarily():
        values = _build_table(table, args, dtype, torch.device("cpu"))
    return values if device.type == "cpu" else MODE.from_tensor(values).to(device)


def on_device(potential: Potential, graph: AtomGraph) -> tuple[Potential, AtomGraph]:
    """Move weights, in place, and structures; within the mode of fake tensors."""

    def moved(x: Tensor) -> Tensor:
        return MODE.from_tensor(x).detach().to(DEVICE)

    for module in potential.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(moved(weight))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return potential, AtomGraph(**{name: moved(x) for name, x in graph.to_dict().items()})


def make_tables_of_pairs(potential: Potential, graph: AtomGraph) -> None:
    """Make tables on the host, which has values, and move them: weights do not change here."""
    networks = getattr(potential.model, "_pair_networks", None)
    if networks is None:
        return
    tables: RadialTables = potential.model._tables
    elements = frozenset(graph.atomic_numbers.tolist())
    made = tables._tables_of(elements, networks(), [], like=torch.zeros(1))
    assert made is not None
    with MODE:
        kinds, polynomials = (
            MODE.from_tensor(x).to(DEVICE) for x in (made.kinds, made.polynomials)
        )
    moved = made._replace(kinds=kinds, polynomials=polynomials)
    tables._tables_of = lambda *_, like: moved


def evaluate(potential: Potential, graph: AtomGraph) -> None:
    potential(graph, ("energy", "forces"))


def evaluate_stress(potential: Potential, graph: AtomGraph) -> None:
    potential(graph, ("energy", "forces", "stress"))


def train(potential: Potential, graph: AtomGraph) -> None:
    found = potential.train()(graph, ("energy", "forces"), create_graph=True)
    loss = found["energy"].square().sum() + found["forces"].square().sum()
    torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)


def record(potential: Potential, graph: AtomGraph) -> None:
    """Do what a CUDA graph records: energy, forces and stress of padded structures."""
    if refusal(potential) is None:
        padded = Padded(graph, graph_fields(potential.model), cutoff=potential.cutoff)
        padded.write(graph)
        with exact_radial_functions():
            potential.derive(padded.graph, ("energy", "forces", "stress"))


WORK = {"forces": evaluate, "stress": evaluate_stress, "recorded": record, "training": train}


def measured(config: Path) -> dict[str, dict[str, Any]]:
    """Return what a model's second calls send and ask; the first ones make its tables.

    Weights are single precision, and fixed but for training, as in a potential that was loaded.
    """
    potential = untrained_potential(config, dtype=torch.float32).requires_grad_(False)
    graph = potential.build_graph([RATTLED[name]() for name in ("crystal", "slab")])
    with use_backend("reference"):
        evaluate(potential, graph)  # some tables are made of others, which have to be real
    make_tables_of_pairs(potential, graph)
    found = {}
    with MODE, use_backend("auto"):
        potential, graph = on_device(potential, graph)
        for name, work in WORK.items():
            potential.requires_grad_(name == "training")
            with Dispatches():
                work(potential, graph)
            with Dispatches() as seen:
                work(potential, graph)
            found[name] = {
                "dispatches": seen.counts.total(),
                "questions": seen.questions,
                "on_host": seen.on_host,
            }
    return found


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    tables._converted = table_on_device
    FakeTensor.tolist = nested_zeros
    radial_tables._PLAIN = (Tensor, FakeTensor)
    radial_tables._state = lambda weights: []
    order, *configs = sys.argv[1:]
    # As on a GPU, where kernels serve what they can; that they are right is not shown here.
    dispatch.AUTO_ORDER, dispatch.PROVED = tuple(order.split(",")), frozenset()
    json.dump({Path(config).stem: measured(Path(config)) for config in configs}, sys.stdout)
