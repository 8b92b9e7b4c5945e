"""relax() and simulate(): streams of structures in, their outcomes out, batched in flight."""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch

from atomeq.dynamics.budget import EdgeBudget
from atomeq.dynamics.cell import FrechetCell
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.in_flight import Flight, Outcome, Status
from atomeq.dynamics.integrators import Integrator, MDState
from atomeq.dynamics.kinetics import mix
from atomeq.dynamics.optimizers import FIRE, LBFGS, OptimizerState
from atomeq.dynamics.trajectory import Recorder
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import PymatgenSites, StructureLike
from atomeq.graph.files import read_structures
from atomeq.potential.potential import Potential

Optimizer = FIRE | LBFGS
_OPTIMIZERS: dict[str, type[Optimizer]] = {"fire": FIRE, "lbfgs": LBFGS}


def relax(
    structures: Iterable[StructureLike] | str | os.PathLike[str],
    potential: Potential | Evaluator | str | Path,
    *,
    optimizer: Literal["fire", "lbfgs"] | Optimizer = "fire",
    cell: FrechetCell | bool = False,
    fmax: float = 0.01,
    max_steps: int = 500,
    ids: Iterable[Hashable] | None = None,
    max_edges: int | None = None,
    folder: str | Path | None = None,
    interval: int = 10,
    checkpoint_interval: int = 100,
    restart: bool = False,
    observe: Callable[[OptimizerState, list[int]], None] | None = None,
) -> Iterator[Outcome]:
    """Relax structures, many at a time, each as it would relax alone.

    They are taken from the iterable when there is room, and yielded as soon as they end, in that
    order. A structure that cannot be used, breaks or does not converge is yielded with its reason
    and harms no other.

    Args:
        structures: ASE's Atoms, pymatgen's Structures or Molecules, AtomGraphs of one structure;
            any iterable, which need not fit into memory, or a file that ASE reads. Fixed atoms
            stay.
        potential: A potential, name or folder of one, or an Evaluator. It computes where it is.
        optimizer: ``"fire"``, ``"lbfgs"``, or one of them with settings of your own.
        cell: Relax the cell too; a FrechetCell says how.
        fmax: Largest force left, eV/Å; with ``cell`` as ASE's FrechetCellFilter counts.
        max_steps: Steps after which a structure leaves anyhow.
        ids: Names of the structures, in parallel; by default their index.
        max_edges: Edges that may be computed at once. By default chosen for the device, and on CUDA
            by the memory that is measured. Halved where memory runs out.
        folder: Where trajectories and checkpoints go; nothing is written by default.
        interval: Steps of a structure between frames.
        checkpoint_interval: Steps of the batch between checkpoints.
        restart: Go on from the folder's checkpoint, given the same structures. Every outcome is
            yielded, and nothing that had ended is computed again; but what did not converge goes on
            where ``max_steps`` allows more. A run without a checkpoint starts afresh.
        observe: Called after every step with the state and the indices of its structures.

    Yields:
        One outcome per structure.

    Raises:
        ValueError: A setting is not allowed, or the checkpoint is of another run.

    Example:
        >>> for outcome in relax(structures, "cu-pbe", cell=True):  # doctest: +SKIP
        ...     print(outcome.index, outcome.status, outcome.energy, outcome.reason)
    """
    stepper = _optimizer(optimizer, cell)
    if not fmax > 0 or max_steps < 0:
        raise ValueError(f"fmax must be positive and max_steps not negative: {fmax}, {max_steps}")

    def ended(state: OptimizerState) -> list[Status | None]:
        below, steps = (state.fmax() < fmax).tolist(), state.n_steps.tolist()
        return [
            "converged" if done else "not_converged" if n >= max_steps else None
            for done, n in zip(below, steps, strict=True)
        ]

    evaluate = potential if isinstance(potential, Evaluator) else Evaluator(potential)
    intervals = interval, checkpoint_interval
    recorder = _recorder(folder, f"{stepper}, fmax={fmax}", intervals, restart)
    flight = Flight[Any](
        stepper,
        evaluate,
        budget=EdgeBudget(evaluate.potential.device, max_edges),
        ended=ended,
        recorder=recorder,
        observe=observe,
    )
    return _fly(flight, structures, ids, stepper.state_type)


def simulate(
    structures: Iterable[StructureLike] | str | os.PathLike[str],
    potential: Potential | Evaluator | str | Path,
    integrator: Integrator,
    *,
    n_steps: int,
    seed: int = 0,
    ids: Iterable[Hashable] | None = None,
    max_edges: int | None = None,
    folder: str | Path | None = None,
    interval: int = 10,
    checkpoint_interval: int = 100,
    restart: bool = False,
    observe: Callable[[MDState, list[int]], None] | None = None,
) -> Iterator[Outcome]:
    """Run molecular dynamics of structures, many at a time, each as it would run alone.

    Args:
        structures: As in :func:`relax`; those at rest get velocities of the temperature.
        potential: As in :func:`relax`.
        integrator: Which dynamics: VelocityVerlet, Bussi, Langevin, NoseHoover or LangevinNPT.
        n_steps: Steps of each structure.
        seed: Of velocities and noise, which each structure draws by its index.
        ids: As in :func:`relax`.
        max_edges: As in :func:`relax`.
        folder: As in :func:`relax`.
        interval: As in :func:`relax`.
        checkpoint_interval: As in :func:`relax`.
        restart: As in :func:`relax`; on a CPU the run goes on bit for bit. A run that has ended is
            extended where ``n_steps`` is larger now.
        observe: As in :func:`relax`; the place for logs and averages.

    Yields:
        One outcome per structure, with velocities in its graph.

    Raises:
        ValueError: A setting is not allowed, or the checkpoint is of another run.

    Example:
        >>> hot = Langevin(timestep=2.0, temperature=600.0)  # doctest: +SKIP
        >>> for outcome in simulate(structures, "cu-pbe", hot, n_steps=1000):  # doctest: +SKIP
        ...     outcome.atoms.write(f"{outcome.index}.extxyz")
    """
    if n_steps < 0:
        raise ValueError(f"n_steps must not be negative, got {n_steps}")

    def ended(state: MDState) -> list[Status | None]:
        return ["completed" if n >= n_steps else None for n in state.n_steps.tolist()]

    def begin(graph: AtomGraph, index: int) -> AtomGraph:
        return graph.replace(seed=torch.full_like(graph.natoms, mix(seed, index)))

    evaluate = potential if isinstance(potential, Evaluator) else Evaluator(potential)
    settings = f"{integrator}, seed={seed}"
    intervals = interval, checkpoint_interval
    recorder = _recorder(folder, settings, intervals, restart, timestep=integrator.timestep)
    flight = Flight[Any](
        integrator,
        evaluate,
        budget=EdgeBudget(evaluate.potential.device, max_edges),
        ended=ended,
        begin=begin,
        recorder=recorder,
        observe=observe,
    )
    return _fly(flight, structures, ids, integrator.state_type)


def _optimizer(optimizer: str | Optimizer, cell: FrechetCell | bool) -> Optimizer:
    chosen = FrechetCell() if cell is True else cell or None
    if isinstance(optimizer, FIRE | LBFGS):
        if chosen is not None:
            raise ValueError(
                "cell is given beside an optimizer that has settings of its own; write "
                f"{type(optimizer).__name__}(cell=...)"
            )
        return optimizer
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be 'fire' or 'lbfgs', not {optimizer!r}")
    return _OPTIMIZERS[optimizer](cell=chosen)


def _recorder(
    folder: str | Path | None,
    settings: str,
    intervals: tuple[int, int],
    restart: bool,
    *,
    timestep: float | None = None,
) -> Recorder | None:
    if folder is None:
        if restart:
            raise ValueError("restart needs the folder of the run it continues")
        return None
    recorder = Recorder(
        folder,
        settings=settings,
        interval=intervals[0],
        checkpoint_interval=intervals[1],
        timestep=timestep,
    )
    if not restart and any(recorder.folder.iterdir()):
        raise ValueError(
            f"{recorder.folder} is not empty; continue its run with restart=True, or name another"
        )
    return recorder


def _fly(
    flight: Flight[Any],
    structures: Iterable[StructureLike] | str | os.PathLike[str],
    ids: Iterable[Hashable] | None,
    kind: type[Any],
) -> Iterator[Outcome]:
    # A single structure is iterable too, in its own way; it is not what was meant.
    if isinstance(structures, PymatgenSites | AtomGraph) or hasattr(structures, "get_positions"):
        structures = cast("Iterable[StructureLike]", [structures])
    elif isinstance(structures, str | os.PathLike):
        structures = read_structures(structures)
    if flight.recorder is not None:
        flight.resume(kind)
    return flight.run(structures, ids)
