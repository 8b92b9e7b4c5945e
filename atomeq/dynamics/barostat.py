"""Molecular dynamics at constant temperature and pressure, on batches.

The equations of motion are those of Martyna, Tobias and Klein (J. Chem. Phys. 101, 4177, 1994) with
friction and noise on atoms and cell instead of chains (Quigley and Probert, J. Chem. Phys. 120,
11432, 2004): ergodic, and exact in the limit of short steps for any friction and any cell mass.
With ε the rate at which the cell deforms, in 1/fs, W its mass and n the degrees of freedom::

    r' = v + ε r      h' = h ε      v' = F/m - (ε + tr ε / n) v
    W ε' = V (P_inside - P) + (2 K / n) 1
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import Langevin, MDState, drift, stepped, thermalized
from atomeq.dynamics.kinetics import (
    acceleration,
    kinetic_energy,
    kinetic_tensor,
    standard_normal,
)
from atomeq.dynamics.state import PER_SYSTEM
from atomeq.graph.atom_graph import MIN_VOLUME, AtomGraph
from atomeq.graph.convert import StructureError
from atomeq.typing import Positions, Stress
from atomeq.units import BOLTZMANN

_CELL_DRAW = -(1 << 40)  # counters of the cell's noise, where no atom's counter ever comes
_MAX_RATE = 0.5  # largest strain of one step; beyond it has exploded, and exp shall stay a number

Barostat = Literal["isotropic", "full"]


@dataclass(frozen=True)
class PressureState(MDState):
    """A batch whose cells move.

    Attributes:
        strain_rate: ε, symmetric so that cells do not turn, (n_graphs, 3, 3), 1/fs.
    """

    strain_rate: Tensor = field(metadata=PER_SYSTEM)

    def stress(self) -> Stress:
        """Return the stress with what the motion of atoms adds, (n_graphs, 3, 3), eV/Å³."""
        return self.graph.stress - kinetic_tensor(self.graph) / _volume(self.graph)

    def pressure(self) -> Tensor:
        """Return the pressure inside, motion included, (n_graphs,), eV/Å³."""
        return -self.stress().diagonal(dim1=1, dim2=2).mean(dim=1)


@dataclass(frozen=True)
class LangevinNPT(Langevin):
    """Constant temperature and pressure, by friction and noise on atoms and cell.

    Args:
        timestep: fs.
        temperature: K.
        friction_time: One over the friction of atoms, fs.
        pressure: eV/Å³; ``5 * atomeq.units.GPA`` is 5 GPa.
        barostat: ``"isotropic"`` keeps the shape of the cell, ``"full"`` lets every component of
            the strain fluctuate.
        barostat_time: Sets the mass of the cell, and is one over its friction, fs. The cell of a
            solid swings some thirty times in it, so it must be long beside the timestep: 100 of
            them at least.
    """

    pressure: float = 0.0
    barostat: Barostat = "isotropic"
    barostat_time: float = 500.0

    state_type: ClassVar[type[MDState]] = PressureState

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.barostat not in ("isotropic", "full"):
            raise ValueError(f"barostat must be 'isotropic' or 'full', not {self.barostat!r}")
        if not math.isfinite(self.pressure):
            raise ValueError(f"pressure must be a finite number in eV/Å³, not {self.pressure!r}")

    def check(self, graph: AtomGraph) -> None:
        """Refuse structures whose cell cannot move.

        Raises:
            StructureError: One has no volume or is not periodic, or atoms are fixed.
        """
        super().check(graph)
        flat = ~graph.pbc.all(dim=1) | (graph.volume() < MIN_VOLUME)
        for k in torch.nonzero(flat).flatten().tolist():
            raise StructureError(
                "a barostat needs a cell that is periodic in three directions; this one has pbc "
                f"{graph.pbc[k].tolist()}",
                index=k,
            )
        if bool(graph["fixed"].any()):
            raise StructureError(
                "a barostat moves all atoms with the cell, fixed ones too; free them, or keep the "
                "volume",
                index=int(graph.batch[graph["fixed"]][0]),
            )

    def init(
        self, graph: AtomGraph, evaluate: Evaluator, *, seeds: Tensor | None = None
    ) -> PressureState:
        """Evaluate the structures; their cells start at rest."""
        start = self.start(graph, evaluate, seeds=seeds, stress=True)
        return PressureState(**vars(start), strain_rate=torch.zeros_like(graph.cell))

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: PressureState, evaluate: Evaluator
    ) -> PressureState:
        """Take one step: kicks, half a drift, friction and noise, and the same backwards."""
        half = self.timestep / 2
        rate = state.strain_rate + half * self._push(state.graph, state.degrees)
        rate = self._bounded(rate)
        velocities = self._kick(state.graph, rate, state.degrees)
        graph = self._deform(state.graph, velocities, rate)
        velocities = thermalized(state, velocities, self)
        rate = self._bounded(self._thermalized_rate(state, rate))
        graph = evaluate(self._deform(graph, velocities, rate), stress=True)
        velocities = self._kick(graph.replace(velocities=velocities), rate, state.degrees)
        graph = graph.replace(velocities=velocities)
        rate = rate + half * self._push(graph, state.degrees)
        after = stepped(dataclasses.replace(state, strain_rate=rate), graph, velocities)
        return state.followed_by(after)

    def _mass(self, degrees: Tensor) -> Tensor:
        """Return the cell's mass, (n_graphs, 1, 1), eV fs²."""
        kt = BOLTZMANN * self.start_temperature
        return ((degrees + 3) * kt * self.barostat_time**2)[:, None, None] / self._directions

    @property
    def _directions(self) -> int:
        # One scalar rate stands for three equal components, whose mass is thrice that of one.
        return 1 if self.barostat == "isotropic" else 3

    def _push(self, graph: AtomGraph, degrees: Tensor) -> Tensor:
        """Return ε', (n_graphs, 3, 3), 1/fs²."""
        eye = torch.eye(3, dtype=graph.pos.dtype, device=graph.pos.device)
        outside = _volume(graph) * (graph.stress + self.pressure * eye)
        inside = (2 * kinetic_energy(graph) / degrees)[:, None, None] * eye
        force = kinetic_tensor(graph) - outside + inside
        force = (force + force.transpose(1, 2)) / 2
        if self.barostat == "isotropic":
            force = force.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] * eye
        return force / self._mass(degrees)

    def _kick(self, graph: AtomGraph, rate: Tensor, degrees: Tensor) -> Positions:
        """Return velocities half a step later: drag of the cell, force, drag."""
        trace = rate.diagonal(dim1=1, dim2=2).sum(dim=1)
        eye = torch.eye(3, dtype=rate.dtype, device=rate.device)
        drag = rate + (trace / degrees)[:, None, None] * eye
        drag = torch.linalg.matrix_exp(-self.timestep / 4 * drag)[graph.batch]
        velocities = torch.bmm(graph["velocities"][:, None], drag)
        velocities = velocities + self.timestep / 2 * acceleration(graph)[:, None]
        return torch.bmm(velocities, drag)[:, 0]

    def _deform(self, graph: AtomGraph, velocities: Positions, rate: Tensor) -> AtomGraph:
        """Return the graph half a step later: cell and atoms strained, atoms drifted, strained."""
        strain = torch.linalg.matrix_exp(self.timestep / 4 * rate)
        pos = torch.bmm(graph.pos[:, None], strain[graph.batch])[:, 0]
        moved = drift(graph.replace(pos=pos), velocities, self.timestep / 2)
        pos = torch.bmm(moved.pos[:, None], strain[graph.batch])[:, 0]
        return moved.replace(pos=pos, cell=torch.bmm(graph.cell, torch.bmm(strain, strain)))

    def _thermalized_rate(self, state: PressureState, rate: Tensor) -> Tensor:
        keep = math.exp(-self.timestep / self.barostat_time)
        noise = standard_normal(
            state.seeds, _CELL_DRAW + state.n_steps, torch.ones_like(state.seeds), (3, 3)
        )
        if self.barostat == "isotropic":
            noise = noise[:, :1, :1] * torch.eye(3, dtype=rate.dtype, device=rate.device)
        else:
            noise = (noise + noise.transpose(1, 2)) / 2
        variance = (1 - keep**2) * self.kt(state)[:, None, None] / self._mass(state.degrees)
        return keep * rate + variance.sqrt() * noise

    def _bounded(self, rate: Tensor) -> Tensor:
        limit = _MAX_RATE / self.timestep
        return rate.clamp(-limit, limit)


def _volume(graph: AtomGraph) -> Tensor:
    return graph.volume()[:, None, None]
