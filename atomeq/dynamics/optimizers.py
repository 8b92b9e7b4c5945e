"""FIRE and L-BFGS on batches: every structure has its own step length, history and end.

Both take the steps that ASE's optimizers of these names take, cell relaxation included; L-BFGS does
so without ``rescale``.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from atomeq.dynamics.cell import FrechetCell
from atomeq.dynamics.evaluator import Evaluator, Failure
from atomeq.dynamics.state import PER_ATOM, PER_SYSTEM, State, largest, per_system
from atomeq.graph.atom_graph import AtomGraph


@dataclass(frozen=True)
class OptimizerState(State):
    """A batch on its way to a minimum.

    Its coordinates are those of the atoms and, where the cell relaxes, of the cell (see
    :class:`~atomeq.dynamics.cell.FrechetCell`); without a cell the latter are zero throughout.

    Attributes:
        coordinates: Positions, in the undeformed cell, (n_atoms, 3), Å.
        cell_coordinates: (n_graphs, 3, 3).
        reference_cell: The undeformed cell, (n_graphs, 3, 3), Å.
        forces: Forces on the coordinates, (n_atoms, 3), eV/Å.
        cell_forces: Forces on the cell's, (n_graphs, 3, 3), eV.
    """

    coordinates: Tensor = field(metadata=PER_ATOM)
    cell_coordinates: Tensor = field(metadata=PER_SYSTEM)
    reference_cell: Tensor = field(metadata=PER_SYSTEM)
    forces: Tensor = field(metadata=PER_ATOM)
    cell_forces: Tensor = field(metadata=PER_SYSTEM)

    def fmax(self) -> Tensor:
        """Return the largest force of each structure, (n_graphs,), eV/Å.

        With the cell its three rows count as three more atoms, as in ASE.
        """
        atoms = largest(torch.linalg.vector_norm(self.forces, dim=1), self.graph)
        return torch.maximum(atoms, torch.linalg.vector_norm(self.cell_forces, dim=2).amax(dim=1))


@dataclass(frozen=True)
class FIREState(OptimizerState):
    """What FIRE remembers.

    Attributes:
        velocities: Of the coordinates, (n_atoms, 3).
        cell_velocities: (n_graphs, 3, 3).
        dt: Time step, (n_graphs,).
        mixing: How far velocities are turned towards the forces, (n_graphs,).
        n_downhill: Steps since it last went uphill, (n_graphs,).
    """

    velocities: Tensor = field(metadata=PER_ATOM)
    cell_velocities: Tensor = field(metadata=PER_SYSTEM)
    dt: Tensor = field(metadata=PER_SYSTEM)
    mixing: Tensor = field(metadata=PER_SYSTEM)
    n_downhill: Tensor = field(metadata=PER_SYSTEM)


@dataclass(frozen=True)
class LBFGSState(OptimizerState):
    """What L-BFGS remembers, newest last; a structure that has fewer steps has zeros before.

    Attributes:
        moves: Steps that were taken, (n_atoms, n_kept, 3).
        changes: Changes of the gradient in them, (n_atoms, n_kept, 3).
        cell_moves: (n_graphs, n_kept, 3, 3).
        cell_changes: (n_graphs, n_kept, 3, 3).
        curvature: One over the product of move and change, (n_graphs, n_kept); 0 is not used.
    """

    moves: Tensor = field(metadata=PER_ATOM)
    changes: Tensor = field(metadata=PER_ATOM)
    cell_moves: Tensor = field(metadata=PER_SYSTEM)
    cell_changes: Tensor = field(metadata=PER_SYSTEM)
    curvature: Tensor = field(metadata=PER_SYSTEM)

    @classmethod
    def concatenate(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, states: Sequence[Self]
    ) -> Self:
        """Join states, padding short histories."""
        longest = max(state.curvature.shape[1] for state in states)
        return super().concatenate([state._padded(longest) for state in states])

    def _padded(self, n_kept: int) -> Self:
        missing = n_kept - self.curvature.shape[1]
        if not missing:
            return self
        names = ("moves", "changes", "cell_moves", "cell_changes", "curvature")
        padded = {
            name: torch.cat([value.new_zeros(len(value), missing, *value.shape[2:]), value], dim=1)
            for name in names
            for value in [getattr(self, name)]
        }
        return dataclasses.replace(self, **padded)


S = TypeVar("S", bound=OptimizerState)
_Pair = tuple[Tensor, Tensor]  # of atoms (n_atoms, 3) and of cells (n_graphs, 3, 3)


@dataclass(frozen=True)
class _Optimizer(Generic[S]):
    """What optimizers share: the coordinates.

    Args:
        max_step: Longest step, Å.
        cell: How the cell relaxes; not at all by default.
    """

    max_step: float = 0.2
    cell: FrechetCell | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_step < float("inf"):
            raise ValueError(f"max_step must be a positive length in Å, not {self.max_step!r}")

    def check(self, graph: AtomGraph) -> None:
        """Refuse structures this cannot relax.

        Raises:
            StructureError: The cell is to relax and one has no volume.
        """
        if self.cell is not None:
            self.cell.check(graph)

    def _start(self, graph: AtomGraph, evaluate: Evaluator) -> OptimizerState:
        self.check(graph)
        graph = evaluate(graph, stress=self.cell is not None)
        start = OptimizerState(
            graph=graph,
            n_steps=torch.zeros_like(graph.natoms),
            coordinates=graph.pos,
            cell_coordinates=torch.zeros_like(graph.cell),
            reference_cell=graph.cell,
            forces=graph.forces,
            cell_forces=torch.zeros_like(graph.cell),
        )
        return start if self.cell is None else self._with_forces(start, self.cell)

    def _with_forces(self, state: OptimizerState, cell: FrechetCell) -> OptimizerState:
        forces, cell_forces = cell.forces(state.graph, state.cell_coordinates)
        return dataclasses.replace(state, forces=forces, cell_forces=cell_forces)

    def _move(self, state: S, step: Tensor, cell_step: Tensor, evaluate: Evaluator) -> S:
        """Move, evaluate, and leave structures that broke where they were."""
        graph = state.graph
        coordinates = state.coordinates + step
        cell_coordinates = state.cell_coordinates + cell_step
        if self.cell is None:
            graph = graph.replace(pos=coordinates)
        else:
            graph = self.cell.place(graph, coordinates, cell_coordinates, state.reference_cell)
            exploded = self.cell.exploded(cell_coordinates, graph) & ~state.failed
            graph = graph.replace(failure=graph["failure"] + Failure.EXPLODED * exploded)
        graph = evaluate(graph, stress=self.cell is not None)
        after = dataclasses.replace(
            state,
            graph=graph,
            n_steps=state.n_steps + 1,
            coordinates=coordinates,
            cell_coordinates=cell_coordinates,
            forces=graph.forces,
        )
        return after if self.cell is None else self._with_forces(after, self.cell)  # pyright: ignore[reportReturnType]

    def _dot(self, a: _Pair, b: _Pair, graph: AtomGraph) -> Tensor:
        """Return the product over all coordinates of each structure, (n_graphs,)."""
        atoms = per_system((a[0] * b[0]).sum(dim=1), graph)
        if self.cell is None:  # all zeros
            return atoms
        return atoms + (a[1] * b[1]).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class FIRE(_Optimizer[FIREState]):
    """The fast inertial relaxation engine (Bitzek et al., Phys. Rev. Lett. 97, 170201, 2006).

    Args:
        max_step: Longest step of all coordinates of a structure together, Å.
        cell: How the cell relaxes; not at all by default.
        dt: First time step; there are no masses, so it has no unit.
        dt_max: Longest time step.
        n_min: Steps downhill before the time step grows.
        grow: Factor of the time step downhill.
        shrink: Factor of the time step uphill.
        mixing: First share of the forces' direction in the velocities.
        mixing_decay: Factor of that share downhill.

    Example:
        >>> evaluate = Evaluator("cu-pbe")  # doctest: +SKIP
        >>> fire = FIRE(cell=FrechetCell())  # doctest: +SKIP
        >>> state = fire.init(prepare(structures), evaluate)  # doctest: +SKIP
        >>> while (state.fmax() > 0.01).any():  # doctest: +SKIP
        ...     state = fire.step(state, evaluate)
    """

    dt: float = 0.1
    dt_max: float = 1.0
    n_min: int = 5
    grow: float = 1.1
    shrink: float = 0.5
    mixing: float = 0.1
    mixing_decay: float = 0.99

    state_type: ClassVar[type[OptimizerState]] = FIREState

    def init(self, graph: AtomGraph, evaluate: Evaluator) -> FIREState:
        """Evaluate the structures where they are, at rest.

        Args:
            graph: The structures, without edges.
            evaluate: The potential.

        Returns:
            The state at step 0.
        """
        start = self._start(graph, evaluate)
        ones = torch.ones_like(graph.cell[:, 0, 0])
        return FIREState(
            **vars(start),
            velocities=torch.zeros_like(graph.pos),
            cell_velocities=torch.zeros_like(graph.cell),
            dt=self.dt * ones,
            mixing=self.mixing * ones,
            n_downhill=torch.zeros_like(graph.natoms),
        )

    def step(self, state: FIREState, evaluate: Evaluator) -> FIREState:
        """Take one step; structures that broke stay where they were.

        Args:
            state: As :meth:`init` or the last step gave it; it stays as it is.
            evaluate: The potential.

        Returns:
            The state one step later.
        """
        turned = self._turn(state)
        atoms, batch = turned.graph, turned.graph.batch
        velocities = turned.velocities + turned.dt[batch, None] * turned.forces
        cell_velocities = turned.cell_velocities + turned.dt[:, None, None] * turned.cell_forces
        moving = velocities, cell_velocities
        norm = turned.dt * self._dot(moving, moving, atoms).sqrt()
        scale = turned.dt * torch.where(norm > self.max_step, self.max_step / norm, 1.0)
        turned = dataclasses.replace(turned, velocities=velocities, cell_velocities=cell_velocities)
        step, cell_step = scale[batch, None] * velocities, scale[:, None, None] * cell_velocities
        return state.followed_by(self._move(turned, step, cell_step, evaluate))

    def _turn(self, state: FIREState) -> FIREState:
        """Turn velocities towards the forces where they go downhill, stop them where not."""
        graph = state.graph
        forces = state.forces, state.cell_forces
        velocities = state.velocities, state.cell_velocities
        power = self._dot(forces, velocities, graph)
        begun = state.n_steps > 0
        downhill, uphill = begun & (power > 0), begun & ~(power > 0)
        speed = self._dot(velocities, velocities, graph).sqrt()
        force = self._dot(forces, forces, graph).sqrt()
        keep = torch.where(downhill, 1 - state.mixing, (~uphill).to(speed.dtype))
        add = torch.where(downhill, state.mixing * speed / force, 0.0)
        faster = downhill & (state.n_downhill > self.n_min)
        dt = torch.where(faster, (state.dt * self.grow).clamp(max=self.dt_max), state.dt)
        mixing = torch.where(faster, state.mixing * self.mixing_decay, state.mixing)
        atom, cell = keep[graph.batch, None], keep[:, None, None]
        return dataclasses.replace(
            state,
            velocities=atom * state.velocities + add[graph.batch, None] * state.forces,
            cell_velocities=cell * state.cell_velocities + add[:, None, None] * state.cell_forces,
            dt=torch.where(uphill, dt * self.shrink, dt),
            mixing=torch.where(uphill, self.mixing, mixing),
            n_downhill=torch.where(uphill, 0, state.n_downhill + downhill),
        )


@dataclass(frozen=True)
class LBFGS(_Optimizer[LBFGSState]):
    """Limited-memory BFGS without line search (Nocedal, Math. Comput. 35, 773, 1980).

    Args:
        max_step: Longest step of a single atom, Å; longer ones are scaled down as a whole.
        cell: How the cell relaxes; not at all by default.
        memory: Steps that are remembered.
        stiffness: First guess of the Hessian, eV/Å².
        rescale: Take for that guess, after every step, the stiffness which that one met (Nocedal
            and Wright, Numerical Optimization, eq. 7.20). Crystals, most of them softer than the
            first guess, relax in about a third of the steps.
        damping: Factor of every step.
    """

    memory: int = 100
    stiffness: float = 70.0
    rescale: bool = True
    damping: float = 1.0

    state_type: ClassVar[type[OptimizerState]] = LBFGSState

    def init(self, graph: AtomGraph, evaluate: Evaluator) -> LBFGSState:
        """Evaluate the structures where they are, without history.

        Args:
            graph: The structures, without edges.
            evaluate: The potential.

        Returns:
            The state at step 0.
        """
        pos, cell = graph.pos, graph.cell
        return LBFGSState(
            **vars(self._start(graph, evaluate)),
            moves=pos.new_zeros(graph.n_atoms, 0, 3),
            changes=pos.new_zeros(graph.n_atoms, 0, 3),
            cell_moves=cell.new_zeros(graph.n_graphs, 0, 3, 3),
            cell_changes=cell.new_zeros(graph.n_graphs, 0, 3, 3),
            curvature=cell.new_zeros(graph.n_graphs, 0),
        )

    def step(self, state: LBFGSState, evaluate: Evaluator) -> LBFGSState:
        """Take one step; structures that broke stay where they were.

        Args:
            state: As :meth:`init` or the last step gave it; it stays as it is.
            evaluate: The potential.

        Returns:
            The state one step later.
        """
        graph = state.graph
        step, cell_step = self._direction(state)
        longest = torch.maximum(
            largest(torch.linalg.vector_norm(step, dim=1), graph),
            torch.linalg.vector_norm(cell_step, dim=2).amax(dim=1),
        )
        scale = torch.where(longest >= self.max_step, self.max_step / longest, 1.0) * self.damping
        step, cell_step = scale[graph.batch, None] * step, scale[:, None, None] * cell_step
        moved = self._move(state, step, cell_step, evaluate)
        return state.followed_by(self._remember(state, moved))

    def _direction(self, state: LBFGSState) -> tuple[Tensor, Tensor]:
        """Multiply the forces by the inverse Hessian that the history makes: two loops."""
        graph, batch = state.graph, state.graph.batch
        q, cell_q = state.forces, state.cell_forces
        weights: list[Tensor] = []
        for n in reversed(range(state.curvature.shape[1])):
            along = self._dot((state.moves[:, n], state.cell_moves[:, n]), (q, cell_q), graph)
            weight = state.curvature[:, n] * along
            q = q - weight[batch, None] * state.changes[:, n]
            cell_q = cell_q - weight[:, None, None] * state.cell_changes[:, n]
            weights.append(weight)
        stiffness = self._guess(state)
        z, cell_z = q / stiffness[batch, None], cell_q / stiffness[:, None, None]
        for n, weight in enumerate(reversed(weights)):
            along = self._dot((state.changes[:, n], state.cell_changes[:, n]), (z, cell_z), graph)
            weight = weight - state.curvature[:, n] * along
            z = z + weight[batch, None] * state.moves[:, n]
            cell_z = cell_z + weight[:, None, None] * state.cell_moves[:, n]
        return z, cell_z

    def _guess(self, state: LBFGSState) -> Tensor:
        """Return the Hessian of each structure where nothing is known of it, (n_graphs,)."""
        if not (self.rescale and state.curvature.shape[1]):
            return torch.full_like(state.graph.cell[:, 0, 0], self.stiffness)
        change = state.changes[:, -1], state.cell_changes[:, -1]
        met = self._dot(change, change, state.graph) * state.curvature[:, -1]
        return torch.where(met > 0, met, self.stiffness)

    def _remember(self, before: LBFGSState, after: LBFGSState) -> LBFGSState:
        move = after.coordinates - before.coordinates
        change = before.forces - after.forces
        cell_move = after.cell_coordinates - before.cell_coordinates
        cell_change = before.cell_forces - after.cell_forces
        product = self._dot((move, cell_move), (change, cell_change), after.graph)
        newest = {
            "moves": move,
            "changes": change,
            "cell_moves": cell_move,
            "cell_changes": cell_change,
            "curvature": torch.where(product == 0, 0.0, 1 / product),
        }
        return dataclasses.replace(
            after,
            **{
                name: torch.cat([getattr(before, name), value[:, None]], dim=1)[:, -self.memory :]
                for name, value in newest.items()
            },
        )
