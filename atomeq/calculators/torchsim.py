"""A potential as a model of torch-sim, for its batched optimizers and integrators."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomeq.graph.atom_graph import MIN_VOLUME, AtomGraph
from atomeq.graph.builders import HyperGraph
from atomeq.ops.precision import checked_precision
from atomeq.potential.checkpoint import load_potential, resolve_device
from atomeq.potential.potential import Potential
from atomeq.typing import Precision, PropertyKey


def torchsim_model(
    potential: str | Path | Potential,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    precision: Precision | None = None,
    compute_stress: bool = True,
) -> Any:
    """Return a ``torch_sim.models.interface.ModelInterface`` that computes with a potential.

    Energies, forces and stress come in the dtype torch-sim asks for; the graph is float64 inside.
    The stress of a system without a volume is zero, as torch-sim's own models give it.

    Args:
        potential: Name of a shipped potential, folder of a saved one, or a :class:`Potential`.
        device: Where to compute; by default where the potential is, the CPU for a name or folder.
        dtype: Of the network and of what is returned; by default the potential's own.
        precision: As of :func:`~atomeq.potential.checkpoint.load_potential`; by default its own.
        compute_stress: Compute the stress as well; a potential with a force head has none.

    Raises:
        ImportError: torch-sim is not installed.
        ValueError: A stress is wanted of a potential with a force head, or the potential perceives
            the topology of molecules, which torch-sim's states cannot keep.

    Example:
        >>> model = torchsim_model("cu-pbe")  # doctest: +SKIP
        >>> torch_sim.optimize(atoms, model, optimizer=torch_sim.Optimizer.fire)  # doctest: +SKIP
    """
    if not isinstance(potential, Potential):
        potential = load_potential(potential, device=device, dtype=dtype)
    if precision is not None:
        potential = copy.copy(potential)  # its weights are shared, its precision is not
        potential.precision = checked_precision(precision)
    builder = potential.model.graph_builder()
    if isinstance(builder, HyperGraph) and builder.perceive:
        raise ValueError(
            "this potential perceives the topology of molecules where a motion starts, and a state "
            "of torch-sim cannot keep it; use atomeq.relax and atomeq.simulate"
        )
    target = potential.device if device is None else resolve_device(device)
    return _model_class()(potential, target, dtype or potential.dtype, compute_stress)


@cache
def _model_class() -> Any:
    try:
        from torch_sim.models.interface import (  # pyright: ignore[reportMissingImports]
            ModelInterface,
        )
    except ImportError as error:
        raise ImportError(
            "this needs torch-sim, which needs Python 3.12 or newer: pip install atomeq[torchsim]"
        ) from error

    class AtomeqModel(ModelInterface):
        """A potential with torch-sim's interface."""

        def __init__(
            self,
            potential: Potential,
            device: torch.device,
            dtype: torch.dtype,
            compute_stress: bool,
        ) -> None:
            super().__init__()
            self.potential = potential.to(device).to(dtype).requires_grad_(False).eval()
            self._device, self._dtype = device, dtype
            self._compute_forces = True
            self._memory_scales_with = "n_atoms_x_density"
            self.compute_stress = compute_stress

        @property
        def compute_stress(self) -> bool:
            """Whether the stress is computed."""
            return self._compute_stress

        @compute_stress.setter
        def compute_stress(self, wanted: bool) -> None:
            if wanted and not self.potential.gives_stress:
                raise ValueError(
                    "this potential has a force head and none for the stress; pass "
                    "compute_stress=False"
                )
            self._compute_stress = wanted

        def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
            """Return energy (n_systems,), forces (n_atoms, 3), stress (n_systems, 3, 3)."""
            graph = _graph(state)
            keys: tuple[PropertyKey, ...] = ("energy", "forces")
            flat = graph.volume() < MIN_VOLUME
            if self._compute_stress:
                keys = (*keys, "stress")
                # Where nothing is periodic a cell changes nothing; the stress is set to zero below.
                unit = torch.eye(3, dtype=graph.cell.dtype, device=graph.cell.device)
                cell = torch.where(flat[:, None, None], unit, graph.cell)
                graph = graph.replace(cell=cell)
            results = self.potential(self.potential.build_graph(graph), keys)
            if "stress" in results:
                results["stress"] = torch.where(flat[:, None, None], 0.0, results["stress"])
            return {str(key): value.detach().to(self._dtype) for key, value in results.items()}

    return AtomeqModel


def _graph(state: Any) -> AtomGraph:
    """Return torch-sim's state, an object or a dictionary of its fields, as a graph."""

    def field(name: str) -> Any:
        return state[name] if isinstance(state, dict) else getattr(state, name)

    positions = field("positions").detach().to(torch.float64)
    cell = field("cell").detach().to(torch.float64).mT.contiguous()  # columns there, rows here
    system = field("system_idx")
    if system is None:
        system = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
    n_graphs = cell.shape[0]
    pbc = torch.as_tensor(field("pbc"), dtype=torch.bool, device=positions.device)
    return AtomGraph(
        positions,
        field("atomic_numbers").to(torch.int64),
        cell=cell,
        pbc=pbc.reshape(-1, pbc.shape[-1] if pbc.ndim else 1).expand(n_graphs, 3).clone(),
        natoms=torch.bincount(system, minlength=n_graphs),
    )
