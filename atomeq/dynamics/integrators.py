"""Molecular dynamics at constant energy and at constant temperature, on batches.

Each integrator has ``init`` and ``step``; the noise of a structure depends on its own seed and step
only, so it moves in a batch as it moves alone.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from atomeq.dynamics.evaluator import Evaluator, Failure, marked
from atomeq.dynamics.kinetics import (
    acceleration,
    degrees_of_freedom,
    kinetic_energy,
    standard_normal,
    thermal_velocities,
    without_drift,
)
from atomeq.dynamics.kinetics import temperature as kinetic_temperature
from atomeq.dynamics.state import PER_SYSTEM, State, any_atom
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import StructureError
from atomeq.typing import Energies, Positions
from atomeq.units import ACCELERATION, BOLTZMANN

S = TypeVar("S", bound=State)

_MAX_MOVE = 2.0  # Å in one step; at 10⁴ K and 2 fs the lightest atom moves half of it
# Suzuki-Yoshida weights of fourth order: a chain is stiffer than the atoms it holds.
_W1 = 1 / (2 - 2 ** (1 / 3))
_WEIGHTS = (_W1, 1 - 2 * _W1, _W1)


@dataclass(frozen=True)
class MDState(State):
    """A batch in thermal motion; ``graph`` has ``velocities`` (n_atoms, 3), Å/fs.

    Attributes:
        seeds: Of each structure's noise, (n_graphs,).
        degrees: Degrees of freedom, (n_graphs,).
    """

    seeds: Tensor = field(metadata=PER_SYSTEM)
    degrees: Tensor = field(metadata=PER_SYSTEM)

    def kinetic_energy(self) -> Energies:
        """Return (n_graphs,), eV."""
        return kinetic_energy(self.graph)

    def total_energy(self) -> Energies:
        """Return potential and kinetic energy, (n_graphs,), eV."""
        return self.graph.energy + self.kinetic_energy()

    def temperature(self) -> Tensor:
        """Return the temperature the velocities have now, (n_graphs,), K."""
        return kinetic_temperature(self.graph, self.degrees)


@dataclass(frozen=True)
class Ramp:
    """A temperature that changes evenly from one value to another, and then stays.

    Args:
        start: K.
        end: K.
        n_steps: Steps of a structure until the end is reached.
    """

    start: float
    end: float
    n_steps: int

    def __post_init__(self) -> None:
        _refuse_not_positive(self)

    def __call__(self, steps: Tensor) -> Tensor:
        """Return the temperature after so many steps, (n_graphs,), K."""
        fraction = (steps.to(torch.float64) / self.n_steps).clamp(max=1.0)
        return self.start + (self.end - self.start) * fraction


@dataclass(frozen=True)
class Integrator:
    """What integrators share.

    Args:
        timestep: fs.
        temperature: Of velocities that are drawn where a structure has none, and of the thermostat
            where there is one, K; a Ramp where it changes on the way.
    """

    timestep: float = 1.0
    temperature: float | Ramp = 300.0

    holds_drift: ClassVar[bool] = True  # whether the momentum of a structure stays what it is
    state_type: ClassVar[type[MDState]] = MDState

    def __post_init__(self) -> None:
        _refuse_not_positive(self)

    @property
    def start_temperature(self) -> float:
        """The temperature at the first step, K."""
        return self.temperature.start if isinstance(self.temperature, Ramp) else self.temperature

    def kt(self, state: MDState) -> Tensor:
        """Return k times the thermostat's temperature at each structure's step, (n_graphs,), eV."""
        if isinstance(self.temperature, Ramp):
            return BOLTZMANN * self.temperature(state.n_steps)
        return torch.full_like(state.graph.energy, BOLTZMANN * self.temperature)

    def check(self, graph: AtomGraph) -> None:
        """Refuse structures this cannot integrate.

        Raises:
            StructureError: Nothing in one can move.
        """
        degrees = degrees_of_freedom(graph, held=self.holds_drift)
        stuck = torch.nonzero(degrees <= 0).flatten().tolist()
        if stuck:
            raise StructureError(
                "nothing can move: all atoms are fixed, or it is a single atom whose centre of "
                "mass is held",
                index=stuck[0],
            )

    def init(self, graph: AtomGraph, evaluate: Evaluator, *, seeds: Tensor | None = None) -> Any:
        """Return the state of structures that begin."""
        raise NotImplementedError(f"{type(self).__name__} does not define init()")

    def step(self, state: Any, evaluate: Evaluator) -> Any:
        """Return the state one step later."""
        raise NotImplementedError(f"{type(self).__name__} does not define step()")

    def start(
        self,
        graph: AtomGraph,
        evaluate: Evaluator,
        *,
        seeds: Tensor | None = None,
        stress: bool = False,
    ) -> MDState:
        """Evaluate structures and give those at rest velocities of exactly the temperature.

        Args:
            graph: As :func:`~atomeq.dynamics.state.prepare` makes it; a structure keeps velocities
                that are not all zero.
            evaluate: The potential.
            seeds: Of each structure, (n_graphs,); by default the graph's ``seed``, or 0, 1, 2, ...
            stress: Whether the stress is needed.
        """
        self.check(graph)
        if seeds is None and "seed" in graph:
            seeds = graph["seed"]
        if seeds is None:
            seeds = torch.arange(graph.n_graphs, device=graph.pos.device)
        degrees = degrees_of_freedom(graph, held=self.holds_drift)
        drawn = thermal_velocities(graph, self.start_temperature, seeds, held=self.holds_drift)
        now = kinetic_temperature(graph.replace(velocities=drawn), degrees)
        drawn = drawn * (self.start_temperature / now).sqrt()[graph.batch, None]
        if "velocities" in graph:
            given = graph["velocities"]
            speeds = torch.zeros_like(graph.cell[:, 0, 0])
            speeds = speeds.index_add(0, graph.batch, given.abs().sum(dim=1))
            drawn = torch.where((speeds == 0)[graph.batch, None], drawn, given)
        velocities = torch.where(graph["fixed"][:, None], 0.0, drawn)
        if self.holds_drift:
            velocities = without_drift(velocities, graph)
        graph = evaluate(graph.replace(velocities=velocities), stress=stress)
        return MDState(
            graph=graph,
            n_steps=torch.zeros_like(graph.natoms),
            seeds=seeds,
            degrees=degrees,
        )


_POSITIVE = (
    "timestep",
    "temperature",
    "start",
    "end",
    "n_steps",
    "friction_time",
    "relaxation_time",
    "barostat_time",
)


def _refuse_not_positive(settings: Integrator | Ramp) -> None:
    for name, value in vars(settings).items():
        number = isinstance(value, int | float)
        if number and name in _POSITIVE and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, not {value!r}")


@dataclass(frozen=True)
class VelocityVerlet(Integrator):
    """Constant energy: velocity Verlet, time-reversible and symplectic.

    Args:
        timestep: fs.
        temperature: Of velocities that are drawn where a structure has none, K.
    """

    def init(
        self, graph: AtomGraph, evaluate: Evaluator, *, seeds: Tensor | None = None
    ) -> MDState:
        """Evaluate the structures; the drift of their centre of mass is taken out once."""
        return self.start(graph, evaluate, seeds=seeds)

    def step(self, state: S, evaluate: Evaluator) -> S:
        """Take one step."""
        velocities = state.graph["velocities"] + self.timestep / 2 * acceleration(state.graph)
        graph = evaluate(drift(state.graph, velocities, self.timestep))
        velocities = velocities + self.timestep / 2 * acceleration(graph)
        return state.followed_by(stepped(state, graph, velocities))

    def conserved(self, state: MDState) -> Energies:
        """Return the total energy, (n_graphs,), eV."""
        return state.total_energy()


@dataclass(frozen=True)
class BussiState(MDState):
    """A batch with what its thermostat gave.

    Attributes:
        heat: Energy that each structure was given so far, (n_graphs,), eV.
    """

    heat: Tensor = field(metadata=PER_SYSTEM)


@dataclass(frozen=True)
class Bussi(VelocityVerlet):
    """Constant temperature by rescaling all velocities of a structure by one random factor.

    Canonical sampling through velocity rescaling (Bussi, Donadio, Parrinello, J. Chem. Phys. 126,
    014101, 2007). The motion is hardly disturbed, and the centre of mass is held as in NoseHoover.

    Args:
        timestep: fs.
        temperature: K.
        relaxation_time: Of the kinetic energy, fs.
    """

    relaxation_time: float = 100.0

    state_type: ClassVar[type[MDState]] = BussiState

    def init(
        self, graph: AtomGraph, evaluate: Evaluator, *, seeds: Tensor | None = None
    ) -> BussiState:
        """Evaluate the structures."""
        start = self.start(graph, evaluate, seeds=seeds)
        return BussiState(**vars(start), heat=torch.zeros_like(start.graph.energy))

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: BussiState, evaluate: Evaluator
    ) -> BussiState:
        """Take one step of velocity Verlet and let the thermostat act for as long."""
        after = super().step(state, evaluate)
        before = after.kinetic_energy()
        held = after.graph.replace(velocities=without_drift(after.graph["velocities"], after.graph))
        scale = torch.where(after.failed, 1.0, self._scale(state, 2 * kinetic_energy(held)))
        graph = held.replace(velocities=held["velocities"] * scale[held.batch, None])
        heat = state.heat + torch.where(after.failed, 0.0, kinetic_energy(graph) - before)
        return dataclasses.replace(after, graph=graph, heat=heat)

    def conserved(self, state: MDState) -> Energies:
        """Return the total energy without what the thermostat gave, (n_graphs,), eV."""
        assert isinstance(state, BussiState)
        return state.total_energy() - state.heat

    def _scale(self, state: BussiState, twice_kinetic: Energies) -> Tensor:
        """Return the factors of the velocities, eq. A7 with its square completed, (n_graphs,)."""
        keep = math.exp(-self.timestep / self.relaxation_time)
        share = (1 - keep) * self.kt(state)
        noise = standard_normal(state.seeds, state.n_steps, state.degrees, ())
        first = torch.cumsum(state.degrees, dim=0) - state.degrees
        squares = torch.zeros_like(share).index_add(
            0,
            torch.arange(len(first), device=first.device).repeat_interleave(
                state.degrees, output_size=len(noise)
            ),
            noise.square(),
        )
        kept = (keep * twice_kinetic).sqrt() + noise[first] * share.sqrt()
        scaled = kept.square() + share * (squares - noise[first].square())
        tiny = torch.finfo(scaled.dtype).tiny
        return torch.sign(kept) * (scaled / twice_kinetic.clamp(min=tiny)).sqrt()


@dataclass(frozen=True)
class Langevin(Integrator):
    """Constant temperature by friction and noise: BAOAB (Leimkuhler and Matthews, 2013).

    Noise moves the centre of mass, so every atom that is not fixed counts three degrees of freedom.

    Args:
        timestep: fs.
        temperature: K.
        friction_time: One over the friction, fs.
    """

    friction_time: float = 100.0

    holds_drift: ClassVar[bool] = False

    def init(
        self, graph: AtomGraph, evaluate: Evaluator, *, seeds: Tensor | None = None
    ) -> MDState:
        """Evaluate the structures."""
        return self.start(graph, evaluate, seeds=seeds)

    def step(self, state: MDState, evaluate: Evaluator) -> MDState:
        """Take one step."""
        half = self.timestep / 2
        velocities = state.graph["velocities"] + half * acceleration(state.graph)
        graph = drift(state.graph, velocities, half)
        velocities = thermalized(state, velocities, self)
        graph = evaluate(drift(graph, velocities, half))
        velocities = velocities + half * acceleration(graph)
        return state.followed_by(stepped(state, graph, velocities))


@dataclass(frozen=True)
class NoseHooverState(MDState):
    """A batch with a chain of thermostats for each structure.

    Attributes:
        chain: Positions of the thermostats, (n_graphs, chain_length), without unit.
        chain_velocities: (n_graphs, chain_length), 1/fs.
    """

    chain: Tensor = field(metadata=PER_SYSTEM)
    chain_velocities: Tensor = field(metadata=PER_SYSTEM)


@dataclass(frozen=True)
class NoseHoover(Integrator):
    """Constant temperature by chains (Martyna, Klein and Tuckerman, J. Chem. Phys. 97, 2635, 1992).

    Deterministic. The centre of mass of a structure without fixed atoms is held, which is a
    constraint even under forces that do not sum to zero, and takes three degrees of freedom.

    Args:
        timestep: fs.
        temperature: K.
        relaxation_time: Period of the thermostat over 2π, fs.
        chain_length: Thermostats per structure.
    """

    relaxation_time: float = 100.0
    chain_length: int = 3

    state_type: ClassVar[type[MDState]] = NoseHooverState

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chain_length < 1:
            raise ValueError(f"chain_length must be at least 1, not {self.chain_length!r}")

    def init(
        self, graph: AtomGraph, evaluate: Evaluator, *, seeds: Tensor | None = None
    ) -> NoseHooverState:
        """Evaluate the structures; the chains start at rest."""
        start = self.start(graph, evaluate, seeds=seeds)
        chain = graph.pos.new_zeros(graph.n_graphs, self.chain_length)
        return NoseHooverState(**vars(start), chain=chain, chain_velocities=chain)

    def step(self, state: NoseHooverState, evaluate: Evaluator) -> NoseHooverState:
        """Take one step."""
        half = self.timestep / 2
        before = self._thermostat(state)
        velocities = before.graph["velocities"] + half * acceleration(before.graph)
        velocities = without_drift(velocities, state.graph)
        graph = evaluate(drift(before.graph, velocities, self.timestep))
        velocities = without_drift(velocities + half * acceleration(graph), graph)
        after = self._thermostat(stepped(before, graph, velocities))
        return state.followed_by(after)

    def conserved(self, state: NoseHooverState) -> Energies:
        """Return the energy of structure and chain, (n_graphs,), eV; constant without a Ramp."""
        kt = self.kt(state)
        moving = (self._masses(state) * state.chain_velocities.square()).sum(dim=1) / 2
        resting = kt * (state.degrees * state.chain[:, 0] + state.chain[:, 1:].sum(dim=1))
        return state.total_energy() + moving + resting

    def _masses(self, state: NoseHooverState) -> Tensor:
        """Return the thermostats' masses, (n_graphs, chain_length), eV fs²."""
        masses = torch.ones_like(state.chain)
        masses[:, 0] = state.degrees.to(masses.dtype)
        return masses * BOLTZMANN * self.start_temperature * self.relaxation_time**2

    def _thermostat(self, state: NoseHooverState) -> NoseHooverState:
        """Let the chains act for half a step; velocities are scaled as a whole."""
        kt, masses = self.kt(state), self._masses(state)
        twice_kinetic = 2 * state.kinetic_energy()
        scale = torch.ones_like(twice_kinetic)
        chain, speed = state.chain, list(state.chain_velocities.unbind(dim=1))

        def push(k: int, dt: float) -> None:
            if k == 0:
                force = twice_kinetic * scale.square() - state.degrees * kt
            else:
                force = masses[:, k - 1] * speed[k - 1].square() - kt
            drag = torch.exp(-dt / 8 * speed[k + 1]) if k + 1 < len(speed) else 1.0
            speed[k] = (speed[k] * drag + dt / 4 * force / masses[:, k]) * drag

        for weight in _WEIGHTS:
            dt = weight * self.timestep
            for k in reversed(range(len(speed))):
                push(k, dt)
            scale = scale * torch.exp(-dt / 2 * speed[0])
            chain = chain + dt / 2 * torch.stack(speed, dim=1)
            for k in range(len(speed)):
                push(k, dt)
        velocities = state.graph["velocities"] * scale[state.graph.batch, None]
        return dataclasses.replace(
            state,
            graph=state.graph.replace(velocities=velocities),
            chain=chain,
            chain_velocities=torch.stack(speed, dim=1),
        )


def drift(graph: AtomGraph, velocities: Positions, timestep: float) -> AtomGraph:
    """Move atoms with constant velocities, and mark structures that fly apart."""
    move = timestep * velocities
    graph = graph.replace(pos=graph.pos + move)
    exploded = any_atom(move.abs().amax(dim=1) > _MAX_MOVE, graph)
    return graph.replace(failure=marked(graph["failure"], exploded, Failure.EXPLODED))


def thermalized(state: MDState, velocities: Positions, bath: Langevin) -> Positions:
    """Let friction and noise act on velocities for a whole step, exactly."""
    graph = state.graph
    keep = math.exp(-bath.timestep / bath.friction_time)
    width = (1 - keep**2) * ACCELERATION * bath.kt(state)[graph.batch] / graph["masses"]
    noise = standard_normal(state.seeds, state.n_steps, graph.natoms, (3,))
    return torch.where(
        graph["fixed"][:, None], 0.0, keep * velocities + width.sqrt()[:, None] * noise
    )


def stepped(state: S, graph: AtomGraph, velocities: Positions) -> S:
    """Return the state one step later."""
    graph = graph.replace(velocities=velocities)
    return dataclasses.replace(state, graph=graph, n_steps=state.n_steps + 1)
