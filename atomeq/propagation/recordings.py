"""Recorded motion in files: few-body systems as .npz, a molecule as anything that ASE reads.

A rollout starts from one frame of a recording, writes another, and is compared with a third.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.units import fs
from torch import Tensor

from atomeq.data.ase_files import DataError, read_structures
from atomeq.files import write_atomically
from atomeq.propagation.molecule import motion_of
from atomeq.propagation.nbody import FRAME_TIME, NBodyRecipe, simulate
from atomeq.propagation.particles import Kind

NUMBERS: dict[str, Kind] = {"charges": "charged", "masses": "gravity"}  # what an .npz calls them
_TIME_ERROR = 1e-6  # of a long step, between times that are meant to be equal


@dataclass(frozen=True)
class Recording:
    """Systems of equal size at some times.

    Attributes:
        kind: ``charged``, ``gravity`` or ``molecule``.
        pos: Positions, (n_systems, n_frames, n_particles, 3); Å for atoms.
        velocities: Velocities, of the same shape; Å/fs for atoms.
        numbers: Charges, masses or atomic numbers, (n_systems, n_particles).
        times: Of the frames, (n_frames,); fs for atoms.
    """

    kind: Kind
    pos: Tensor
    velocities: Tensor
    numbers: Tensor
    times: tuple[float, ...]

    def frame(self, index: int) -> "Recording":
        """Return the recording of one frame, counted from the end where the index is negative.

        Raises:
            ValueError: There is no such frame.
        """
        n_frames = len(self.times)
        if not -n_frames <= index < n_frames:
            raise ValueError(f"there is no frame {index}: the file has {n_frames}")
        k = index % n_frames
        chosen = slice(k, k + 1)
        return Recording(
            self.kind,
            self.pos[:, chosen],
            self.velocities[:, chosen],
            self.numbers,
            self.times[chosen],
        )

    def index_at(self, time: float, tolerance: float) -> int | None:
        """Return the index of the frame at a time, or None."""
        distances = np.abs(np.array(self.times) - time)
        nearest = int(distances.argmin())
        return nearest if distances[nearest] <= tolerance * _TIME_ERROR else None


def read_recording(path: str | os.PathLike[str], *, frame_time: float | None = None) -> Recording:
    """Read recorded motion.

    Args:
        path: ``.npz`` with ``pos`` and ``velocities``, (n_systems, n_frames, n_bodies, 3), or
            (n_systems, n_bodies, 3) or (n_bodies, 3) of one frame, ``charges`` or ``masses``,
            (n_systems, n_bodies) or (n_bodies,), and ``times``, (n_frames,), of more than one; or
            structures of one molecule, with ``time_fs``.
        frame_time: Time between the frames of a molecule that do not say it, fs.

    Raises:
        DataError: The file is missing or damaged, or lacks velocities or times.
    """
    if Path(path).suffix == ".npz":
        return _read_systems(Path(path))
    frames = list(read_structures(path))
    if len(frames) == 1:
        return _single_frame(frames[0], str(path))
    motion = motion_of(frames, name=str(path), frame_time=frame_time)
    first = float(frames[0].info.get("time_fs", 0.0))
    return Recording(
        "molecule",
        motion.pos[None],
        motion.velocities[None],
        torch.tensor([motion.atomic_numbers], dtype=torch.float64),
        tuple(first + k * motion.frame_time for k in range(len(motion.pos))),
    )


def write_systems(path: str | os.PathLike[str], recording: Recording) -> None:
    """Write few-body systems as .npz, in a form that :func:`read_recording` reads."""
    name = next(name for name, kind in NUMBERS.items() if kind == recording.kind)
    arrays = {
        "pos": recording.pos.double().numpy(),
        "velocities": recording.velocities.double().numpy(),
        name: recording.numbers.double().numpy(),
        "times": np.array(recording.times),
    }
    with write_atomically(Path(path)) as partial, partial.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def structures_of(recording: Recording) -> list[Atoms]:
    """Return the frames of a molecule as structures with velocities, ``time_fs`` in their info."""
    numbers = recording.numbers[0].long().numpy()
    frames = []
    for k, time in enumerate(recording.times):
        atoms = Atoms(numbers, recording.pos[0, k].numpy(), info={"time_fs": time})
        atoms.set_velocities(recording.velocities[0, k].numpy() / fs)
        frames.append(atoms)
    return frames


def simulated(recipe: NBodyRecipe) -> Recording:
    """Simulate the training trajectories of a recipe as a recording."""
    part = simulate(recipe)["train"]
    times = tuple(frame * FRAME_TIME for frame in part.frames)
    return Recording(recipe.system, part.pos, part.velocities, part.charges, times)


def _single_frame(atoms: Atoms, name: str) -> Recording:
    if not (atoms.has("momenta") or "velocities" in atoms.arrays):
        raise DataError(
            f"{name} has a single frame and no velocities; long steps need them (momenta, as "
            "`atomeq md` writes them, or an array velocities in Å/fs)"
        )
    motion = motion_of([atoms], name=name, frame_time=1.0)
    numbers = torch.tensor([motion.atomic_numbers], dtype=torch.float64)
    time = float(atoms.info.get("time_fs", 0.0))
    return Recording("molecule", motion.pos[None], motion.velocities[None], numbers, (time,))


def _read_systems(path: Path) -> Recording:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: np.asarray(stored[name]) for name in stored.files}
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except Exception as error:  # zipfile, zlib and NumPy raise what they like on damaged files
        raise DataError(f"{path} is damaged or no .npz of numbers: {error}") from error
    found = [name for name in NUMBERS if name in arrays]
    if len(found) != 1 or not {"pos", "velocities"} <= arrays.keys():
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; few-body systems are pos, velocities, "
            "charges or masses, and times"
        )
    fields = {name: _numbers(arrays[name], f"{path}: {name}") for name in arrays}
    pos, velocities, numbers = fields["pos"], fields["velocities"], fields[found[0]]
    if pos.ndim < 2 or pos.shape[-1] != 3 or pos.ndim > 4 or pos.shape != velocities.shape:
        raise DataError(
            f"{path}: pos has shape {pos.shape}, velocities {velocities.shape}; both are "
            "(n_systems, n_frames, n_bodies, 3)"
        )
    if pos.ndim < 4:  # one frame of one system, or of some
        shape = (-1, 1, *pos.shape[-2:])
        pos, velocities = pos.reshape(shape), velocities.reshape(shape)
    n_systems, n_frames, n_bodies = (int(length) for length in pos.shape[:3])
    numbers = np.atleast_2d(numbers)
    if numbers.shape != (n_systems, n_bodies) or n_bodies < 2:
        raise DataError(
            f"{path}: {found[0]} has shape {numbers.shape}, but there are {n_systems} systems of "
            f"{n_bodies} bodies (at least two)"
        )
    times = fields.get("times", np.zeros(1))
    if times.shape != (n_frames,) or (np.diff(times) <= 0).any():
        raise DataError(f"{path} has {n_frames} frames; times are as many, and rise")
    return Recording(
        NUMBERS[found[0]],
        torch.from_numpy(pos),
        torch.from_numpy(velocities),
        torch.from_numpy(numbers),
        tuple(times.tolist()),
    )


def _numbers(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise DataError(f"{name} holds something else than finite numbers")
    return array.astype(np.float64)
