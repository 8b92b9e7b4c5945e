"""Molecular dynamics of one molecule from a file, cut into pairs of frames a long step apart.

What SEGNO's MD22 experiment trains on; any trajectory of an isolated molecule will do, for example
one that ``atomeq md`` wrote.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.units import fs
from torch import Tensor

from atomeq.data.ase_files import DataError, read_structures
from atomeq.data.molecule_files import reader_of
from atomeq.propagation.nbody import Trajectories
from atomeq.units import ACCELERATION

SHUFFLED = 0.5  # consecutive frames of a trajectory are nearer than this share of random ones
_TIME_ERROR = 1e-6  # relative, of times that a file holds as decimal numbers


@dataclass(frozen=True)
class MolecularMotion:
    """Frames of one molecule at equal distances in time.

    Attributes:
        pos: Positions, (n_frames, n_atoms, 3), Å.
        velocities: Velocities, of the same shape, Å/fs.
        atomic_numbers: Of the molecule, in the order of its atoms.
        frame_time: Time between two frames, fs.
        source: Where the velocities are from: ``file``, ``forces`` or ``differences``.
    """

    pos: Tensor
    velocities: Tensor
    atomic_numbers: tuple[int, ...]
    frame_time: float
    source: str

    def stride(self, time: float) -> int:
        """Return how many frames a long step is.

        Raises:
            ValueError: The step is not a multiple of the time between frames.
        """
        stride = round(time / self.frame_time)
        if stride < 1 or abs(stride * self.frame_time - time) > _TIME_ERROR * time:
            raise ValueError(
                f"a long step of {time:g} fs is no multiple of the {self.frame_time:g} fs between "
                "two frames"
            )
        return stride

    def windows(self, first: int, end: int, stride: int, most: int | None) -> Trajectories:
        """Return pairs of frames within [first, end), evenly spread, as trajectories of two frames.

        Raises:
            DataError: No pair lies within.
        """
        starts = np.arange(first, end - stride)
        if len(starts) == 0:
            raise DataError(
                f"frames {first} to {end} hold no pair that is {stride} frames apart; the "
                "trajectory is too short for its split"
            )
        if most is not None and len(starts) > most:
            starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
        chosen = torch.from_numpy(np.stack([starts, starts + stride], axis=1))
        numbers = torch.tensor(self.atomic_numbers, dtype=torch.float32).expand(len(starts), -1)
        pos, velocities = self.pos[chosen].float(), self.velocities[chosen].float()
        return Trajectories(pos, velocities, numbers, (0, stride))

    def bonds(self, length: float) -> tuple[tuple[int, int], ...]:
        """Return the pairs i < j of atoms that are nearer than ``length`` in the first frame.

        Raises:
            DataError: There are none, or an atom has none.
        """
        distances = torch.cdist(self.pos[0], self.pos[0])
        first, second = torch.nonzero(torch.triu(distances < length, diagonal=1), as_tuple=True)
        alone = set(range(len(self.atomic_numbers))) - {*first.tolist(), *second.tolist()}
        if alone:
            raise DataError(f"atom {min(alone)} has no other atom within {length:g} Å")
        return tuple(zip(first.tolist(), second.tolist(), strict=True))


def read_motion(
    path: str | os.PathLike[str], *, frame_time: float | None = None
) -> MolecularMotion:
    """Read the trajectory of one isolated molecule.

    Velocities are those of the file (momenta, as ASE writes them, or an array ``velocities`` in
    Å/fs). Where it has none they follow from the next frame: with forces as in velocity Verlet,
    v = Δx/Δt - a Δt/2, without forces as published with SEGNO, v = Δx/Δt; the last frame is lost.

    Args:
        path: The file; any that ASE reads.
        frame_time: Time between two frames, fs; by default what the frames call ``time_fs``.

    Raises:
        DataError: Frames of different molecules, periodic ones, unequal times or none, or frames
            without velocities that are in no order of time.
    """
    return motion_of(
        list(read_structures(path, reader=reader_of(Path(path)))),
        name=str(path),
        frame_time=frame_time,
    )


def motion_of(
    frames: Sequence[Atoms], *, name: str, frame_time: float | None = None
) -> MolecularMotion:
    """Return the motion that frames show; see :func:`read_motion`."""
    numbers = frames[0].numbers
    for index, atoms in enumerate(frames):
        if atoms.pbc.any():
            raise DataError(
                f"{name}, frame {index} is periodic; long steps are for isolated molecules"
            )
        if not np.array_equal(atoms.numbers, numbers):
            raise DataError(f"{name}, frame {index} is not the molecule of frame 0")
    frame_time = _frame_time(frames, frame_time, name)
    pos = np.stack([atoms.positions for atoms in frames])
    velocities = _stored_velocities(frames)
    source = "file"
    if velocities is None:
        if len(frames) < 2:
            raise DataError(f"{name} has no velocities and a single frame to find them from")
        _refuse_shuffled(pos, name)
        source, velocities = _derived_velocities(frames, pos, frame_time)
        pos = pos[:-1]
    atomic_numbers = tuple(int(number) for number in numbers)
    tensors = torch.from_numpy(pos), torch.from_numpy(velocities)
    return MolecularMotion(*tensors, atomic_numbers, frame_time, source)


def _frame_time(frames: Sequence[Atoms], given: float | None, name: str) -> float:
    if given is not None:
        if not given > 0:
            raise ValueError(f"the time between frames is > 0 fs, not {given}")
        return given
    times = [atoms.info.get("time_fs") for atoms in frames]
    if len(frames) < 2 or None in times:
        raise DataError(f"{name} does not say how far its frames are apart; give it, in fs")
    steps = np.diff(np.array(times, dtype=float))
    if steps[0] <= 0 or np.abs(steps - steps[0]).max() > _TIME_ERROR * abs(steps[0]):
        raise DataError(f"the frames of {name} are not at equal distances in time")
    return float(steps[0])


def _stored_velocities(frames: Sequence[Atoms]) -> np.ndarray | None:
    """Return velocities in Å/fs, (n_frames, n_atoms, 3), or None where a frame has none."""
    found = []
    for atoms in frames:
        if "velocities" in atoms.arrays:
            found.append(np.asarray(atoms.arrays["velocities"], dtype=float))
        elif atoms.has("momenta"):
            found.append(atoms.get_velocities() * fs)
        else:
            return None
    return np.stack(found)


def _derived_velocities(
    frames: Sequence[Atoms], pos: np.ndarray, frame_time: float
) -> tuple[str, np.ndarray]:
    velocities = (pos[1:] - pos[:-1]) / frame_time
    forces = [atoms.calc.results.get("forces") for atoms in frames[:-1] if atoms.calc is not None]
    if len(forces) < len(velocities) or any(force is None for force in forces):
        return "differences", velocities
    acceleration = np.stack(forces) / frames[0].get_masses()[:, None] * ACCELERATION
    return "forces", velocities - acceleration * frame_time / 2


def _refuse_shuffled(pos: np.ndarray, name: str) -> None:
    """Refuse frames that were drawn at random from a trajectory, as those of rMD17 are."""
    if len(pos) < 10:  # too few to tell
        return
    order = np.random.default_rng(0).permutation(len(pos))
    consecutive = np.linalg.norm(np.diff(pos, axis=0), axis=2).mean()
    random = np.linalg.norm(np.diff(pos[order], axis=0), axis=2).mean()
    if consecutive > SHUFFLED * random:
        raise DataError(
            f"{name} has no velocities, and its frames are in no order of time: consecutive ones "
            f"differ by {consecutive:.3g} Å, random ones by {random:.3g} Å"
        )
