"""A potential as a metatomic model: one file for LAMMPS, GROMACS, i-PI and others that load it.

The network is traced on the reference backend, which is plain torch, and becomes TorchScript:
engines give systems with neighbours, take energies, and differentiate those by positions and
strain. So this trace is of energies alone, with all that a derivative needs.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from atomeq.files import refuse_unwritable, write_atomically
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge.rotation import turned_wigner, turning_wigner
from atomeq.ops.sphere.gaunt import pointwise_product
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.compiled import CompiledPotential, graph_fields
from atomeq.potential.derivatives import pulled_back
from atomeq.potential.export import ExportError, example_graph, not_traceable, refuse_guards
from atomeq.potential.heads import HeadedPotential
from atomeq.potential.mean import MeanPotential
from atomeq.potential.potential import Potential

_DIFFERENTIATED = ("pos", "cell")


@torch.inference_mode(False)
def export_metatomic(
    potential: Potential | str | Path,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a potential as a metatomic model, which computes energies of structures and of atoms.

    Engines find in it which atoms it knows, what neighbours it wants and how far energies reach,
    and derive forces and stress. Its numbers are float64 whatever the network computes in. It runs
    on CPUs, in any process with metatomic; this package is not needed there.

    Args:
        potential: A potential, name of a shipped one or folder of a saved one.
        path: A file ending in .pt, written or replaced.
        dtype: The dtype the network computes in; by default the potential's own.

    Returns:
        The path.

    Raises:
        ImportError: metatomic is not installed.
        ExportError: Its forces are not the derivative of its energy, an energy depends on all of a
            structure, or its graph or network is not what such a model can have.
        ValueError: The path does not end in .pt.

    Example:
        >>> export_metatomic("cu-pbe", "cu.pt")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise ValueError(f"a metatomic model is a .pt file, and {path} does not end so")
    refuse_unwritable(path)
    if isinstance(potential, Potential):
        own = copy.deepcopy(potential).to(potential.dtype if dtype is None else dtype)
    else:
        own = load_potential(potential, dtype=dtype)
    own = own.requires_grad_(False).eval()
    _refuse(own)
    with warnings.catch_warnings(), write_atomically(path) as partial:
        for category in (DeprecationWarning, UserWarning):  # torch's, of its own TorchScript
            warnings.simplefilter("ignore", category)
        _atomistic_model(own).save(partial)
    return path


def _refuse(potential: Potential) -> None:
    model = potential.model
    fault = ""
    if isinstance(potential, CompiledPotential | MeanPotential | HeadedPotential):
        fault = f"is a {type(potential).__name__}, and it wants one network with its weights"
    elif potential.device.type != "cpu":
        fault = f"is on {potential.device}, and its trace is made on the CPU; give potential.cpu()"
    elif model.outputs - {"energies"} or potential.references.rescales_derivatives:
        fault = "has forces or properties of its own, and engines take derivatives of its energy"
    elif model.told:
        fault = f"is told of {', '.join(sorted(model.told))}, which engines do not say"
    elif type(model.graph_builder()) is not RadiusGraph:
        fault = f"wants a {type(model.graph_builder()).__name__}, and engines give all neighbours"
    elif potential.receptive_depth is None:
        fault = "has energies of atoms that depend on all of a structure, and engines divide it"
    if fault:
        raise ExportError(f"potential {potential.name!r} becomes no metatomic model: it {fault}")


def _trace(potential: Potential) -> fx.GraphModule:
    """Return energies of atoms as a function of the fields of a graph, in operations of torch.

    Raises:
        ExportError: The network looks at numbers that a trace cannot know.
    """
    fields = graph_fields(potential.model)

    def energies(*values: Tensor) -> Tensor:
        graph = AtomGraph(**dict(zip(fields, values, strict=True)))
        return potential.evaluate(graph)["energies"]

    graph = example_graph(potential)
    # What asks for no gradient would be traced as a constant of the positions.
    example = [graph[name].requires_grad_(name in _DIFFERENTIATED) for name in fields]
    with use_backend("reference"):
        # Constant tables, those of derivatives too, are made from numbers, which no trace has.
        pulled_back(energies(*example), [example[fields.index(name)] for name in _DIFFERENTIATED])
        try:
            trace = make_fx(
                energies,
                _IN_PLAIN_TORCH,
                tracing_mode="symbolic",
                _allow_non_fake_inputs=True,
            )(*example)
            refuse_guards(trace)
        except RuntimeError as error:
            raise ExportError(not_traceable(potential, error)) from error
    for node in trace.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = _scriptable(node.target)
    trace.recompile()
    return trace


def _scriptable(target: "torch._ops.OpOverload") -> Any:
    """Return an operation as TorchScript calls it, without the name of its overload."""
    if target.namespace != "aten":
        raise ExportError(f"{target} is none of torch's operations, and engines have only those")
    if target is torch.ops.aten.sym_size.int:
        return torch.ops.aten.size
    return target.overloadpacket


def _atomistic_model(potential: Potential) -> Any:
    """Return a ``metatomic.torch.AtomisticModel`` around the trace of a potential.

    Raises:
        ImportError: metatomic is not installed.
        ExportError: It cannot be traced.
    """
    try:
        from metatomic.torch import (  # pyright: ignore[reportMissingImports]
            AtomisticModel,
            ModelCapabilities,
            ModelMetadata,
            ModelOutput,
            NeighborListOptions,
        )

        from atomeq.calculators.metatomic_module import EnergyModel
    except ImportError as error:
        raise ImportError("this needs metatomic: pip install atomeq[metatomic]") from error
    assert potential.receptive_depth is not None
    neighbors = NeighborListOptions(cutoff=potential.cutoff, full_list=True, strict=True)
    return AtomisticModel(
        EnergyModel(torch.jit.script(_trace(potential)), neighbors).eval(),
        ModelMetadata(
            name=potential.name,
            description=f"{type(potential.model).__name__}, a potential of atomeq",
            extra={"weights": potential.fingerprint(), "network": str(potential.dtype)},
        ),
        ModelCapabilities(
            outputs={"energy": ModelOutput(unit="eV", sample_kind="atom")},
            atomic_types=list(potential.elements),
            interaction_range=potential.receptive_depth * potential.cutoff,
            length_unit="angstrom",
            supported_devices=["cpu"],
            dtype="float64",
        ),
    )


def _turning(vectors: Tensor, wigner: Tensor) -> Tensor:
    """Return W (1 - T(t)), which is W, with t the turn of the vectors from where they are."""
    still = vectors.detach()
    turn = torch.linalg.cross(still, vectors) / still.square().sum(-1, keepdim=True)
    return wigner - turned_wigner(wigner, turn)


def _product(x: Tensor, y: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return out.mT @ ((left @ x) * (right @ y))


#: Operations of the reference backend with gradients of their own, as autograd can find them.
_IN_PLAIN_TORCH: dict[Any, Callable[..., Tensor]] = {
    turning_wigner: _turning,
    pointwise_product: _product,
}
