"""Trajectories and checkpoints: runs that are killed go on as if they had not been.

A folder holds one extended XYZ file per structure, which ASE reads, and ``checkpoint.safetensors``
with the whole state, to the last bit. Frames are appended; the checkpoint, which is replaced as a
whole, says how long each file was then, and what a killed run wrote after it is cut off. A
structure that has ended leaves a file with where it did, from which a longer run goes on.
"""

import json
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atomeq.dynamics.state import State
from atomeq.files import write_atomically
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import element_symbols, standard_masses
from atomeq.units import ACCELERATION

CHECKPOINT_FILE = "checkpoint.safetensors"
_END = ".end.safetensors"
S = TypeVar("S", bound=State)

Status = Literal["converged", "completed", "not_converged", "failed", "refused", "too_large"]


@dataclass
class Passenger:
    """One structure on its way.

    Attributes:
        index: Its place among the structures that were given.
        id: As given.
        n_edges: Edges it had when it was last evaluated.
    """

    index: int
    id: Hashable
    n_edges: int


@dataclass(frozen=True)
class End(Generic[S]):
    """Where one structure ended, as a restart finds it.

    Attributes:
        passenger: Which.
        status: How.
        reason: Why, for the user.
        n_steps: Steps it took.
        state: Its state, or None where it never began.
        sizes: Bytes of its trajectory without a last frame that was off the interval, and with it.
    """

    passenger: Passenger
    status: Status
    reason: str
    n_steps: int
    state: S | None
    sizes: tuple[int, int]


class Recorder:
    """Writes a run into a folder.

    Args:
        folder: Made if missing.
        settings: What the run computes; a checkpoint of another run is refused.
        interval: Steps of a structure between its frames.
        checkpoint_interval: Steps of the batch between checkpoints.
        timestep: fs; frames then say their time.

    Raises:
        ValueError: An interval is not positive.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        settings: str,
        interval: int = 10,
        checkpoint_interval: int = 100,
        timestep: float | None = None,
    ) -> None:
        if interval < 1 or checkpoint_interval < 1:
            raise ValueError(
                f"intervals must be at least 1 step, not {interval} and {checkpoint_interval}"
            )
        self.folder = Path(folder)
        self.settings, self.timestep = settings, timestep
        self.interval, self.checkpoint_interval = interval, checkpoint_interval
        self._n_steps = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint_path(self) -> Path:
        """Where the checkpoint is."""
        return self.folder / CHECKPOINT_FILE

    def trajectory(self, index: int) -> Path:
        """Return the file of a structure's frames."""
        return self.folder / f"{index:06d}.extxyz"

    def frames(self, state: State, indices: Sequence[int], *, entered: bool = False) -> None:
        """Append the frames that are due.

        Args:
            state: The batch.
            indices: Of its structures.
            entered: These structures have just begun: their files start anew.
        """
        steps, broken = state.n_steps.tolist(), state.failed.tolist()
        due = [
            k
            for k, n in enumerate(steps)
            if not broken[k] and (entered or n % self.interval == 0)  # else it was written before
        ]
        if not due:
            return
        systems = torch.tensor(due, device=state.n_steps.device)
        graphs = state.graph.take(systems).to("cpu").to_list()
        for k, graph in zip(due, graphs, strict=True):
            self._append(indices[k], graph, steps[k], mode="w" if entered else "a")

    def _append(self, index: int, graph: AtomGraph, step: int, *, mode: str = "a") -> None:
        time = None if self.timestep is None else step * self.timestep
        with self.trajectory(index).open(mode, encoding="utf-8") as out:
            out.write(extxyz_frame(graph, step=step, time=time))

    def checkpoint(
        self, states: Sequence[State], passengers: Sequence[Passenger], n_taken: int
    ) -> None:
        """Save everything, every ``checkpoint_interval``-th time it is called.

        Args:
            states: The running batch, then each structure that was set aside.
            passengers: All their structures, in order.
            n_taken: Structures taken from the stream.
        """
        self._n_steps += 1
        if self._n_steps % self.checkpoint_interval == 0:
            self._save(states, passengers, n_taken)

    def land(
        self, passenger: Passenger, status: Status, reason: str, n_steps: int, state: State | None
    ) -> None:
        """Save where a structure ended; the last frame is written whatever the interval.

        Args:
            passenger: Which.
            status: How.
            reason: Why, for the user.
            n_steps: Steps it took.
            state: Of this structure alone; None where it never began.
        """
        trajectory = self.trajectory(passenger.index)
        regular = _size(trajectory)
        if state is not None and n_steps % self.interval:
            self._append(passenger.index, state.graph.to("cpu"), n_steps)
        about = {
            "id": passenger.id,
            "n_edges": passenger.n_edges,
            "status": status,
            "reason": reason,
            "n_steps": n_steps,
            "sizes": [regular, _size(trajectory)],
        }
        tensors = {} if state is None else state.tensors()
        _write(self._end_path(passenger.index), tensors, about)

    def ends(self, kind: type[S], device: torch.device, indices: Iterable[int]) -> Iterator[End[S]]:
        """Yield where structures ended; those that never began or are on their way have no end.

        Args:
            kind: The class of state.
            device: Where it goes.
            indices: Which structures.
        """
        for index in indices:
            if self._end_path(index).exists():
                about, tensors = _read(self._end_path(index), device)
                state = kind.from_tensors(tensors) if tensors else None
                passenger = Passenger(index, about["id"], about["n_edges"])
                how = about["status"], about["reason"], about["n_steps"]
                yield End(passenger, *how, state, tuple(about["sizes"]))

    def cut(self, index: int, size: int) -> None:
        """Cut off frames of a structure that no checkpoint knows.

        Raises:
            ValueError: Frames are missing.
        """
        path = self.trajectory(index)
        if _size(path) < size:
            raise ValueError(
                f"{path} is missing or shorter than when it was saved; put it back, or start afresh"
            )
        if path.exists():
            with path.open("ab") as out:
                out.truncate(size)

    def _end_path(self, index: int) -> Path:
        return self.folder / f"{index:06d}{_END}"

    def finish(self, n_taken: int) -> None:
        """Save that the run has ended; a restart finds the ends of its structures.

        Args:
            n_taken: Structures taken from the stream.
        """
        self._save([], [], n_taken)

    def _save(self, states: Sequence[State], passengers: Sequence[Passenger], n_taken: int) -> None:
        tensors = {
            f"{k}.{name}": value
            for k, state in enumerate(states)
            for name, value in state.tensors().items()
        }
        sizes = {p.index: _size(self.trajectory(p.index)) for p in passengers}
        about = {
            "settings": self.settings,
            "n_taken": n_taken,
            "n_states": len(states),
            "passengers": [[p.index, p.id, p.n_edges] for p in passengers],
            "sizes": [[index, size] for index, size in sizes.items()],
        }
        _write(self.checkpoint_path, tensors, about)

    def restore(
        self, kind: type[S], device: torch.device
    ) -> tuple[list[S], list[Passenger], int] | None:
        """Read the checkpoint and cut off the frames that are younger.

        Args:
            kind: The class of state.
            device: Where it goes.

        Returns:
            What :meth:`checkpoint` was given, or None where there is none.

        Raises:
            ValueError: It belongs to a run with other settings.
        """
        if not self.checkpoint_path.exists():
            return None
        about, tensors = _read(self.checkpoint_path, device)
        if about["settings"] != self.settings:
            raise ValueError(
                f"{self.checkpoint_path} is of a run with other settings: {about['settings']}, now "
                f"{self.settings}; repeat them, or name another folder"
            )
        states = []
        for k in range(about["n_states"]):
            own = {n.partition(".")[2]: v for n, v in tensors.items() if n.startswith(f"{k}.")}
            states.append(kind.from_tensors(own))
        for index, size in about["sizes"]:
            self.cut(index, size)
        passengers = [Passenger(*entry) for entry in about["passengers"]]
        return states, passengers, about["n_taken"]


def extxyz_frame(graph: AtomGraph, *, step: int, time: float | None = None) -> str:
    """Return a structure as one frame of extended XYZ; numbers are exact.

    Momenta are in ASE's units, so that ``ase.io.read`` gives the velocities back, with masses where
    there are isotopes; atoms that are not fixed are those of ``move_mask``.

    Args:
        graph: One structure, on the CPU.
        step: Written beside it.
        time: fs, likewise.
    """
    numbers = [graph.pos]
    properties = "species:S:1:pos:R:3"
    if not torch.equal(graph["masses"], standard_masses(graph.atomic_numbers)):
        numbers.append(graph["masses"][:, None])
        properties += ":masses:R:1"
    if "velocities" in graph:
        numbers.append(graph["masses"][:, None] * graph["velocities"] / math.sqrt(ACCELERATION))
        properties += ":momenta:R:3"
    if "forces" in graph:
        numbers.append(graph.forces)
        properties += ":forces:R:3"
    held = bool(graph["fixed"].any())
    cell = " ".join(repr(x) for x in graph.cell.flatten().tolist())
    pbc = " ".join("T" if periodic else "F" for periodic in graph.pbc[0].tolist())
    words = [f'pbc="{pbc}"', f"step={step}"] + ([] if time is None else [f"time_fs={time!r}"])
    if bool(graph.cell.any()):
        words.insert(0, f'Lattice="{cell}"')
    if "energy" in graph:
        words.append(f"energy={float(graph.energy)!r}")
    if "stress" in graph:
        stress = " ".join(repr(x) for x in graph.stress.flatten().tolist())
        words.append(f'stress="{stress}"')
    words.append(f"Properties={properties}{':move_mask:L:1' if held else ''}")
    lines = [str(graph.n_atoms), " ".join(words)]
    rows = torch.cat(numbers, dim=1).tolist()
    for symbol, row, fixed in zip(
        element_symbols(graph.atomic_numbers), rows, graph["fixed"].tolist(), strict=True
    ):
        mask = [] if not held else ["F" if fixed else "T"]
        lines.append(" ".join([symbol, *map(repr, row), *mask]))
    return "\n".join(lines) + "\n"


def _write(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    # Clones, for they may share memory, which safetensors refuses.
    cloned = {name: value.clone() for name, value in tensors.items()}
    with write_atomically(path) as partial:
        save_file(cloned, partial, metadata={"about": json.dumps(about)})


def _read(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt", device=str(device)) as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        return json.loads(stream.metadata()["about"]), tensors


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
