"""CompiledPotential: a potential whose network is a library of machine code, one .pt2 file.

:func:`~atomeq.potential.export.export_potential` makes the file. It is AOTInductor's package: a zip
archive with a shared library, which holds the weights, and JSON, which tells what the library
computes. Nothing in it is a pickle, but **a shared library is a program**: to load one is to run
it. So :func:`load_compiled` alone does that, for files that their user trusts, and whatever takes
the name or folder of a potential refuses them.
"""

import json
import platform
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import HyperGraph
from atomeq.models.base import AtomisticModel
from atomeq.potential.checkpoint import CheckpointError, build_model, resolve_device
from atomeq.potential.derivatives import refuse_flat_cells
from atomeq.potential.distances import KnownDistances
from atomeq.potential.potential import Potential, refuse_unknown_properties
from atomeq.potential.references import AtomicReferences
from atomeq.potential.terms import EnergyTerm
from atomeq.typing import PropertyKey

COMPILED_VERSION = 1
METADATA_KEY = "atomeq"  # in the package's own table of metadata

_FIELDS = ("pos", "atomic_numbers", "cell", "pbc")
_FIELDS += ("edge_index", "cell_offsets", "natoms", "batch")
_HYPEREDGE_FIELDS = ("hyperedge_index", "hyperedge_type", "num_hyperedges")


class CompiledPotential(Potential):
    """A potential as a compiled library: the same numbers, for calculators and dynamics.

    Energy, forces and stress of any number of structures of any size come from one call. It
    computes on the device and in the dtype it was compiled for, cannot be trained, saved or
    differentiated, and has no Hessian. Copies share the library; a pickle holds the path and loads
    it again.

    Args:
        library: What the package computes: fields of a graph in, energy, energies, forces, dE/dε
            or the stress of a head.
        path: Where it was loaded from.
        metadata: As :func:`read_metadata` returns it.

    Attributes:
        path: Where it was loaded from.
        metadata: What the package tells about itself.
    """

    def __init__(
        self, library: Callable[..., Sequence[Tensor]], path: Path, metadata: dict[str, Any]
    ) -> None:
        model = build_model(metadata["model"], named_in=path).to(getattr(torch, metadata["dtype"]))
        super().__init__(
            model.to("meta"),  # its cutoff, graphs and exemptions; the weights are in the library
            AtomicReferences(dict.fromkeys(metadata["elements"], 0.0)),
        )
        self.distances = KnownDistances(metadata.get("shortest_distances"))
        self.path = path
        self.name = str(path)
        self.metadata = metadata
        self._library = library
        self._device = resolve_device(metadata.get("device"))
        if self._device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._fields = graph_fields(model)
        self.requires_grad_(False).eval()

    def forward(
        self,
        graph: AtomGraph,
        properties: Sequence[PropertyKey] = ("energy", "forces"),
        *,
        create_graph: bool | None = None,
    ) -> dict[PropertyKey, Tensor]:
        """Compute properties of a batch of structures.

        Args:
            graph: As :meth:`build_graph` returns it.
            properties: ``energy``, ``energies``, ``forces``, ``stress``.
            create_graph: Nothing here is differentiable, so True is refused.

        Returns:
            As :meth:`Potential.forward` returns it.

        Raises:
            ValueError: An unknown property, a derivative that the library does not have, the stress
                of a structure without volume, or a graph on another device.
        """
        refuse_unknown_properties(properties)
        if create_graph or "gradient_forces" in properties:
            raise ValueError(f"{self.path} is compiled and has {_NO_DERIVATIVES}")
        if "stress" in properties:
            if not self.gives_stress:
                raise ValueError("a model with a force head has no energy whose strain is a stress")
            refuse_flat_cells(graph)
        missing = [name for name in self._fields if name not in graph]
        if missing or graph.pos.device.type != self.device.type:
            fault = f"lacks {missing[0]}" if missing else f"is on {graph.pos.device}"
            raise ValueError(f"this graph {fault}; make it with build_graph()")
        self.check_electrons(graph)
        self.warn_of_distances(graph)
        computed = self._computed(graph)
        return {key: computed[key] for key in properties}

    def _computed(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        dtype = graph.pos.dtype
        # The library reads memory as it was laid out in the trace and checks nothing of it.
        inputs = [_plain(graph[name]) for name in self._fields]
        energy, energies, forces, *rest = self._library(*inputs)
        computed: dict[PropertyKey, Tensor] = {"energy": energy, "energies": energies}
        computed["forces"] = forces.to(dtype) if self.conservative else forces
        if "stress" in self.model.outputs:
            computed["stress"] = rest[0]
        elif rest:
            computed["stress"] = (rest[0] / graph.volume()[:, None, None]).to(dtype)
        return computed

    @property
    def device(self) -> torch.device:
        """Where it computes: the CPU, or the GPU that was the current one when it was loaded."""
        return self._device

    @property
    def twice_differentiable(self) -> bool:
        """Whether forces can be differentiated once more: never."""
        return False

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights it was compiled from."""
        return self.metadata["sha256"]

    def add_terms(self, terms: Sequence[EnergyTerm]) -> None:
        """Refuse: what is compiled is compiled."""
        if terms:
            raise ValueError(f"{self.path} is compiled; add terms to what it was exported from")

    def term_configs(self) -> list[dict[str, Any]]:
        """Return the nodes of the terms that were compiled in."""
        return self.metadata["terms"]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse: the weights are in the library."""
        raise ValueError(
            f"{self.path} is compiled: its weights cannot be had; save or train the potential it "
            "was exported from"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompiledPotential":
        wanted = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (wanted.dtype, wanted.device) != (self.dtype, self.device):
            raise ValueError(
                f"{self.path} is compiled for {self.device} in {self.dtype} and cannot go to "
                f"{wanted.device} in {wanted.dtype}; export the potential anew, or use it as it is"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledPotential":
        return self

    def __reduce__(self) -> tuple[Callable[..., "CompiledPotential"], tuple[Path]]:
        return load_compiled, (self.path,)


def load_compiled(path: str | Path) -> CompiledPotential:
    """Load a compiled potential, which **runs the program it holds**: only load what you trust.

    What it says about itself is read before and without that, by :func:`read_metadata`.

    Args:
        path: A .pt2 file of :func:`~atomeq.potential.export.export_potential`.

    Returns:
        A potential whose energy, forces and stress come in one call.

    Raises:
        CheckpointError: No such file, no package of this kind, or one that was compiled by another
            version of torch or for another kind of machine.
        ValueError: It was compiled for CUDA, and there is none here.

    Example:
        >>> atoms.calc = AtomeqCalculator(load_compiled("cu.pt2"))  # doctest: +SKIP
    """
    path = Path(path).resolve()
    metadata = read_metadata(path)
    here = machine(resolve_device(metadata.get("device")).type)
    for what, compiled_for in metadata["machine"].items():
        if here[what] != compiled_for:
            raise CheckpointError(
                f"{path} was compiled for {what} {compiled_for}, and here it is {here[what]}; "
                "export the potential on this machine"
            )
    try:
        library = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not load: {error}") from error
    return CompiledPotential(library, path, metadata)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what a package tells about itself; nothing of it is executed.

    Args:
        path: A .pt2 file.

    Returns:
        ``name``, ``model`` (the node of its class and arguments), ``terms``, ``cutoff`` (Å),
        ``elements`` (atomic numbers), ``dtype``, ``properties``, ``sha256`` of the weights,
        ``device``, ``machine`` and ``threads`` (what it was compiled for), ``versions``, and
        ``inputs`` and ``outputs``, what the library is given and returns, in their order.

    Raises:
        CheckpointError: No such file, or no package of :func:`export_potential`.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
            tables = [json.loads(archive.read(name)) for name in names]
    except (OSError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no compiled potential: {error}") from error
    for table in tables:
        if METADATA_KEY in table:
            metadata = json.loads(table[METADATA_KEY])
            if metadata["compiled_version"] != COMPILED_VERSION:
                raise CheckpointError(
                    f"{path} has version {metadata['compiled_version']} of compiled potentials, "
                    f"this package reads {COMPILED_VERSION}; export the potential anew"
                )
            return metadata
    raise CheckpointError(f"{path} is no compiled potential: `atomeq export` did not write it")


def graph_fields(model: AtomisticModel) -> tuple[str, ...]:
    """Return the fields of a graph that a compiled model is given, in their order."""
    hypergraph = isinstance(model.graph_builder(), HyperGraph)
    return _FIELDS + (_HYPEREDGE_FIELDS if hypergraph else ())


def machine(device: str = "cpu") -> dict[str, str]:
    """Return what a library depends on: torch's interface, the system, the processor, the GPU."""
    found = {
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "system": platform.system(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found["GPU"] = f"sm_{major}{minor}"
    return found


def _plain(field: Tensor) -> Tensor:
    field = field.detach().contiguous()
    return field.double() if field.is_floating_point() else field


_NO_DERIVATIVES = (
    "no further derivatives; Hessians and training need the potential it was exported from"
)
