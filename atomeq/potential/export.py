"""From a potential to one file of machine code: a trace of energy, forces and stress, compiled.

The trace follows the reference backend, whose operations are plain torch, with symbols in place of
the numbers of atoms, edges and structures. The derivatives are traced as they are computed, so the
result is one graph without any autograd, which AOTInductor compiles into a shared library. For a
GPU the graph is made on the CPU and moved there: its operations are the same.
"""

import copy
import json
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from atomeq.files import refuse_unwritable, write_atomically
from atomeq.graph.atom_graph import AtomGraph
from atomeq.ops.dispatch import use_backend
from atomeq.potential.checkpoint import (
    load_potential,
    refuse_unsaveable,
    resolve_device,
    sha256,
)
from atomeq.potential.compiled import (
    COMPILED_VERSION,
    METADATA_KEY,
    CompiledPotential,
    graph_fields,
    machine,
)
from atomeq.potential.derivatives import energy_and_gradients
from atomeq.potential.folders import WEIGHTS_FILE, find_single_potential
from atomeq.potential.potential import Potential

_SIZES = (3, 4, 5, 6, 4, 5, 4)  # 31 atoms: no size may look like a number of the model, or like 1
_N_EDGES, _N_HYPEREDGES, _N_INCIDENCES = 109, 13, 37


class ExportError(ValueError):
    """A potential cannot be compiled, or not on this machine."""


@torch.inference_mode(False)  # a copy of what was made in that mode can be traced
def export_potential(
    potential: Potential | str | Path,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Path:
    """Compile a potential into one .pt2 file that computes energy, forces and stress.

    The library needs torch, but nothing of this package's operations, and serves structures of any
    size, several at once. It is made for this kind of processor, and for as many threads as torch
    has here (``torch.set_num_threads``), or for this kind of GPU. Compiling takes about a minute.

    Args:
        potential: A potential, name of a shipped one or folder of a saved one.
        path: A file ending in .pt2, written or replaced.
        dtype: The dtype the network computes in; by default the potential's own.
        device: Where the library computes, ``cpu`` or ``cuda``; by default where the potential is.

    Returns:
        The path; :func:`~atomeq.potential.compiled.load_compiled` loads it.

    Raises:
        ExportError: The model cannot be traced, or what compiles for the device is not here.
        ValueError: The path does not end in .pt2, or there is no such device.

    Example:
        >>> export_potential("cu-pbe", "cu.pt2")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"a compiled potential is a .pt2 file, and {path} does not end so")
    refuse_unwritable(path)
    if isinstance(potential, Potential):
        _refuse(potential)
        device = potential.device if device is None else device
        loaded = copy.deepcopy(potential).cpu().to(dtype if dtype is not None else potential.dtype)
        loaded = loaded.requires_grad_(False).eval()
        origin = {"name": None, "sha256": loaded.fingerprint()}
    else:
        folder = find_single_potential(potential)
        loaded = load_potential(potential, dtype=dtype)
        _refuse(loaded)
        origin = {"name": str(potential), "sha256": sha256(folder / WEIGHTS_FILE)}
    target = resolve_device(device)
    _refuse_without_compiler(target)
    metadata = {**origin, **_description(loaded, target)}
    with warnings.catch_warnings(), write_atomically(path) as partial:
        for category in (FutureWarning, DeprecationWarning):  # torch's compiler, of itself
            warnings.simplefilter("ignore", category)
        _compile(_on(target, _exported(loaded)), partial, metadata)
    return path


def _refuse(potential: Potential) -> None:
    if isinstance(potential, CompiledPotential):
        raise ExportError(f"{potential.path} is compiled already")
    if potential.conservative and potential.references.rescales_derivatives:
        raise ExportError(
            "this potential scales its forces or stress apart from its energy, whose derivatives "
            "are compiled; use it as it is"
        )
    if potential.model.told:
        raise ExportError(
            "a compiled potential is not told of charge or multiplicity; use this one as it is"
        )
    refuse_unsaveable(potential)  # what is compiled builds its model again, for its graphs


def _refuse_without_compiler(device: torch.device) -> None:
    from torch._inductor import cpp_builder  # two seconds that nobody else should wait
    from torch.utils import cpp_extension

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        raise ExportError(
            f"no C++ compiler here: {error}; install g++ or clang++, or set CXX to one"
        ) from error
    if device.type == "cuda" and find_spec("triton") is None:
        raise ExportError("a library for CUDA is made of Triton kernels: pip install atomeq[cuda]")
    if device.type == "cuda" and cpp_extension.CUDA_HOME is None:
        raise ExportError(
            "a library for CUDA is compiled with the headers of NVIDIA's CUDA toolkit, which is "
            f"not found: install the toolkit of CUDA {torch.version.cuda} and set CUDA_HOME to its "
            "folder, or use the potential as it is"
        )


def _description(potential: Potential, device: torch.device) -> dict[str, Any]:
    """Return what a package tells about itself, as plain values."""
    stress = ["stress"] if potential.gives_stress else []
    derived = stress and "stress" not in potential.model.outputs
    return {
        "compiled_version": COMPILED_VERSION,
        "model": potential.model.config(),
        "terms": potential.term_configs(),
        "shortest_distances": potential.distances.shortest,
        "cutoff": potential.cutoff,
        "elements": list(potential.elements),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "properties": ["energy", "energies", "forces", *stress],
        "inputs": list(graph_fields(potential.model)),
        "outputs": ["energy", "energies", "forces", *(["dE/dstrain"] if derived else stress)],
        "device": device.type,
        "machine": machine(device.type),
        "threads": torch.get_num_threads(),
        "versions": {"atomeq": _version(), "torch": str(torch.__version__)},
    }


def _exported(potential: Potential) -> torch.export.ExportedProgram:
    """Trace a potential for graphs of every size.

    Raises:
        ExportError: It depends on numbers that a trace cannot know, or on a size.
    """
    fields = graph_fields(potential.model)

    def compute(*values: Tensor) -> tuple[Tensor, ...]:
        return _computed(potential, AtomGraph(**dict(zip(fields, values, strict=True))))

    graph = example_graph(potential)
    example = tuple(graph[name] for name in fields)
    with use_backend("reference"):
        compute(*example)  # constant tables are made from numbers, which a trace does not have
        try:
            trace = make_fx(compute, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
            refuse_guards(trace)
            return torch.export.export(
                trace, example, dynamic_shapes=tuple(map(_dynamic, fields)), strict=False
            )
        except RuntimeError as error:
            raise ExportError(not_traceable(potential, error)) from error


def _on(
    device: torch.device, program: torch.export.ExportedProgram
) -> torch.export.ExportedProgram:
    """Return a trace with its weights, tables and what it makes on the way on a device."""
    if device.type == "cpu":
        return program
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(program, str(device))


def _computed(potential: Potential, graph: AtomGraph) -> tuple[Tensor, ...]:
    if not potential.conservative:
        computed = potential.evaluate(graph)
        found = computed["energy"], computed["energies"], computed["forces"]
        return (*found, computed["stress"]) if "stress" in computed else found
    strain = "stress" not in potential.model.outputs
    computed, gradients = energy_and_gradients(potential.evaluate, graph, strain=strain)
    stress = gradients[1] if strain else computed["stress"]
    return computed["energy"], computed["energies"], -gradients[0], stress


def _dynamic(field: str) -> dict[int, Any]:
    axis = 1 if field in ("edge_index", "hyperedge_index") else 0
    return {axis: torch.export.Dim.DYNAMIC}  # refuses a trace that holds for one size alone


def refuse_guards(trace: fx.GraphModule) -> None:
    """Refuse a trace that took one of two ways by looking at a size of the example.

    Only the axes of space, 3, and the ends of an edge, 2, are numbers that it may rely on.
    """
    fake = next(iter(trace.graph.find_nodes(op="placeholder"))).meta["val"]
    for guard in fake.fake_mode.shape_env.guards:
        if not (isinstance(guard.expr, sympy.Eq) and guard.expr.rhs in (2, 3)):
            raise RuntimeError(f"the trace holds only where {guard.expr}")


def not_traceable(potential: Potential, error: RuntimeError) -> str:
    """Return what to tell of a potential whose trace has failed."""
    reason = str(error).strip().split("\n")[0]
    parts = [potential.model, *potential.terms]
    names = " with ".join(type(part).__name__ for part in parts)
    return (
        f"{names} cannot be compiled: what it computes depends on more than the sizes of its "
        f"input ({reason}); use the potential as it is, or one with another model, EGNN or ESCN say"
    )


def example_graph(potential: Potential) -> AtomGraph:
    """Return structures to trace with; of their numbers only the sizes matter."""
    generator = torch.Generator().manual_seed(0)
    n_atoms = sum(_SIZES)
    pos = 3.0 * torch.rand(n_atoms, 3, generator=generator, dtype=torch.float64)
    elements = torch.tensor(potential.elements)
    natoms = torch.tensor(_SIZES)
    batch = torch.arange(len(_SIZES)).repeat_interleave(natoms)
    pairs = torch.nonzero(batch[:, None] == batch[None, :])
    edge_index = pairs[pairs[:, 0] != pairs[:, 1]][:_N_EDGES].T.contiguous()
    incidences = torch.stack(
        (
            torch.arange(_N_INCIDENCES) % n_atoms,
            torch.arange(_N_INCIDENCES) % _N_HYPEREDGES,
        )
    )
    return AtomGraph(
        pos,
        elements[torch.arange(n_atoms) % len(elements)],
        cell=9.0 * torch.eye(3, dtype=torch.float64).repeat(len(_SIZES), 1, 1),
        pbc=torch.ones(len(_SIZES), 3, dtype=torch.bool),
        natoms=natoms,
        batch=batch,
        edge_index=edge_index,
        cell_offsets=torch.zeros(edge_index.shape[1], 3, dtype=torch.int64),
        hyperedge_index=incidences,
        hyperedge_type=torch.zeros(_N_HYPEREDGES, dtype=torch.int64),
        num_hyperedges=torch.ones(len(_SIZES), dtype=torch.int64),
    )


def _compile(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Compile a trace into a package.

    Raises:
        ExportError: A compiler fails.
    """
    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {METADATA_KEY: json.dumps(metadata)}},
        )
    except (RuntimeError, OSError) as error:
        raise ExportError(f"no library came of it: {error}") from error


def _version() -> str:
    try:
        return version("atomeq")
    except PackageNotFoundError:
        return "source tree"
