"""Systems of few bodies, charged or heavy, simulated here: training data of learned propagators.

The recipe of the charged set is that of EGNN's n-body experiment (arXiv:2102.09844, section 5.1,
after Kipf et al., arXiv:1802.04687), that of the gravity set SEGNN's (Brandstetter et al.,
arXiv:2110.02905; reference: RobDHess/Steerable-E3-GNN, commit a650d36), random streams included.
Both draw the same systems from the same seed as their references. All trajectories of a chunk
advance together, in float64.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atomeq.files import write_atomically

logger = logging.getLogger(__name__)

System = Literal["charged", "gravity"]
Part = Literal["train", "val", "test"]
Array = np.ndarray

TIME_STEP = 1e-3
STEPS_PER_FRAME = 100
FRAME_TIME = TIME_STEP * STEPS_PER_FRAME  # in the unit of time of the velocities
SPEED = 0.5  # of every charge at the start
LARGEST_FORCE = 0.1 / TIME_STEP  # of each component on a charge
SOFTENING = 0.1  # length that keeps gravity finite; the reference's default
# The references add noise of variance zero to what they store; so much of the stream goes by.
NOISE: dict[System, int] = {"charged": 2 * 49, "gravity": 3 * 50}  # numbers by coordinate
CHUNK = 500  # trajectories that advance together: their arrays stay in the processor's cache

#: Which frames the published experiments predict from and to; a frame is 0.1 units of time.
FRAMES: dict[System, tuple[int, ...]] = {"charged": (30, 40, 45, 50), "gravity": (0, 10, 15, 20)}


@dataclass(frozen=True)
class NBodyRecipe:
    """What to simulate.

    Attributes:
        system: ``charged``: charges ±1 under Coulomb forces; ``gravity``: equal masses.
        n_bodies: Bodies of a system.
        num_train: Trajectories to train on.
        num_val: Trajectories to validate on.
        num_test: Trajectories to test on.
        seed: Of the random stream; train, val and test follow each other in it.
        frames: Frames that are kept; by default those of the published experiments.
    """

    system: System = "charged"
    n_bodies: int = 5
    num_train: int = 10_000
    num_val: int = 2_000
    num_test: int = 2_000
    seed: int = 43
    frames: tuple[int, ...] | None = None

    def kept_frames(self) -> tuple[int, ...]:
        """Return the frames that are kept, in ascending order."""
        return tuple(sorted(set(FRAMES[self.system] if self.frames is None else self.frames)))

    def counts(self) -> dict[Part, int]:
        """Return the number of trajectories of each part."""
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}


@dataclass(frozen=True)
class Trajectories:
    """Trajectories at some of their frames.

    Attributes:
        pos: Positions, (n_systems, n_frames, n_bodies, 3).
        velocities: Velocities, of the same shape.
        charges: Charges or masses, (n_systems, n_bodies).
        frames: Number of each frame, (n_frames,).
    """

    pos: Tensor
    velocities: Tensor
    charges: Tensor
    frames: tuple[int, ...]

    def at(self, frame: int) -> tuple[Tensor, Tensor]:
        """Return positions and velocities, each (n_systems, n_bodies, 3), at a frame.

        Raises:
            ValueError: The frame was not kept.
        """
        if frame not in self.frames:
            raise ValueError(f"frame {frame} was not kept; there are {self.frames}")
        index = self.frames.index(frame)
        return self.pos[:, index], self.velocities[:, index]


def load_nbody(recipe: NBodyRecipe, folder: str | Path) -> dict[Part, Trajectories]:
    """Read the trajectories of a recipe, simulating and saving them the first time.

    Args:
        recipe: What to simulate.
        folder: Where sets are kept, one file for each recipe.

    Returns:
        Float32 trajectories of the three parts.
    """
    folder = Path(folder)
    path = folder / f"{recipe.system}-{_fingerprint(recipe)}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("simulating %d systems into %s", sum(recipe.counts().values()), path)
        parts = simulate(recipe)
        tensors = {
            f"{name}.{field}": getattr(part, field).float().contiguous()
            for name, part in parts.items()
            for field in ("pos", "velocities", "charges")
        }
        with write_atomically(path) as partial:
            save_file(tensors, partial, metadata={"recipe": json.dumps(asdict(recipe))})
    tensors, frames = load_file(path), recipe.kept_frames()
    return {
        name: Trajectories(
            tensors[f"{name}.pos"],
            tensors[f"{name}.velocities"],
            tensors[f"{name}.charges"],
            frames,
        )
        for name in recipe.counts()
    }


def simulate(recipe: NBodyRecipe) -> dict[Part, Trajectories]:
    """Simulate a recipe's trajectories, in float64.

    Raises:
        ValueError: An unknown system, fewer than two bodies, no trajectories or negative frames.
    """
    frames = recipe.kept_frames()
    if recipe.system not in FRAMES:
        raise ValueError(f"system {recipe.system!r} is unknown; there are {', '.join(FRAMES)}")
    counts = recipe.counts()
    if recipe.n_bodies < 2 or min(counts.values()) < 0 or not frames or frames[0] < 0:
        raise ValueError(f"nothing to simulate in {recipe}")
    draw, run = _SYSTEMS[recipe.system]
    # RandomState's stream is frozen by NumPy for good, and the published sets were drawn from it.
    rng = np.random.RandomState(recipe.seed)
    charges, pos, velocities = draw(rng, sum(counts.values()), recipe.n_bodies)
    chosen = [slice(first, first + CHUNK) for first in range(0, len(charges), CHUNK)]
    chunks = [run(charges[k], pos[k], velocities[k], frames) for k in chosen]
    all_pos, all_velocities = (
        torch.from_numpy(np.concatenate(field)) for field in zip(*chunks, strict=True)
    )
    parts: dict[Part, Trajectories] = {}
    first = 0
    for name, count in counts.items():
        part = slice(first, first + count)
        parts[name] = Trajectories(
            all_pos[part], all_velocities[part], torch.from_numpy(charges[part]), frames
        )
        first += count
    return parts


Start = tuple[Array, Array, Array]  # charges (n, N), positions (n, N, 3), velocities (n, N, 3)
Frames = tuple[Array, Array]  # positions and velocities, (n, n_frames, N, 3)


def draw_charged(rng: np.random.RandomState, n_systems: int, n_bodies: int) -> Start:
    """Draw charges ±1, normal positions and velocities of equal length, system by system."""
    charges = np.empty((n_systems, n_bodies))
    pos, velocities = np.empty((2, n_systems, n_bodies, 3))
    for k in range(n_systems):
        charges[k] = rng.choice([-1.0, 0.0, 1.0], size=(n_bodies, 1), p=[0.5, 0.0, 0.5])[:, 0]
        pos[k] = rng.randn(3, n_bodies).T
        velocities[k] = rng.randn(3, n_bodies).T
        rng.randn(NOISE["charged"] * 3 * n_bodies)
    velocities *= SPEED / np.linalg.norm(velocities, axis=2, keepdims=True)
    return charges, pos, velocities


def run_charged(charges: Array, pos: Array, velocities: Array, frames: tuple[int, ...]) -> Frames:
    """Advance charges by semi-implicit Euler; frame k is step 100 (k + 1)."""
    first, second = np.triu_indices(charges.shape[1], k=1)
    product = np.ascontiguousarray((charges[:, first] * charges[:, second]).T)  # (n_pairs, n)
    total = _sum_over_pairs(charges.shape[1])
    x, v = _bodies_first(pos), _bodies_first(velocities)

    def kick() -> None:
        difference = x[:, first] - x[:, second]  # (3, n_pairs, n)
        squared = np.einsum("cpn,cpn->pn", difference, difference)
        difference *= product / (squared * np.sqrt(squared))
        force = np.matmul(total, difference)  # (3, N, n)
        np.clip(force, -LARGEST_FORCE, LARGEST_FORCE, out=force)
        force *= TIME_STEP
        np.add(v, force, out=v)

    kept, wanted = [], {STEPS_PER_FRAME * (frame + 1) for frame in frames}
    kick()
    for step in range(1, max(wanted) + 1):
        np.add(x, TIME_STEP * v, out=x)
        if step in wanted:
            kept.append((_systems_first(x), _systems_first(v)))
        kick()
    return _stacked(kept)


def draw_gravity(rng: np.random.RandomState, n_systems: int, n_bodies: int) -> Start:
    """Draw unit masses, normal positions and velocities, the centre of mass at rest."""
    pos, velocities = np.empty((2, n_systems, n_bodies, 3))
    for k in range(n_systems):
        pos[k] = rng.randn(n_bodies, 3)
        velocities[k] = rng.randn(n_bodies, 3)
        rng.randn(NOISE["gravity"] * 3 * n_bodies)
    velocities -= velocities.mean(axis=1, keepdims=True)
    return np.ones((n_systems, n_bodies)), pos, velocities


def run_gravity(masses: Array, pos: Array, velocities: Array, frames: tuple[int, ...]) -> Frames:
    """Advance masses by leapfrog under softened gravity; frame k is step 100 k."""
    first, second = np.triu_indices(masses.shape[1], k=1)
    total = _sum_over_pairs(masses.shape[1])
    x, v = _bodies_first(pos), _bodies_first(velocities)

    def half_kick() -> Array:
        difference = x[:, second] - x[:, first]  # (3, n_pairs, n), towards the second
        squared = np.einsum("cpn,cpn->pn", difference, difference) + SOFTENING**2
        difference /= squared * np.sqrt(squared)
        return np.matmul(total, difference) * (TIME_STEP / 2)

    kept, wanted = [], {STEPS_PER_FRAME * frame for frame in frames}
    change = half_kick()
    for step in range(max(wanted) + 1):
        if step in wanted:
            kept.append((_systems_first(x), _systems_first(v)))
        np.add(v, change, out=v)
        np.add(x, TIME_STEP * v, out=x)
        change = half_kick()
        np.add(v, change, out=v)
    return _stacked(kept)


Draw = Callable[[np.random.RandomState, int, int], Start]
Run = Callable[[Array, Array, Array, tuple[int, ...]], Frames]
_SYSTEMS: dict[System, tuple[Draw, Run]] = {
    "charged": (draw_charged, run_charged),
    "gravity": (draw_gravity, run_gravity),
}


def _sum_over_pairs(n_bodies: int) -> Array:
    """Return the matrix (n_bodies, n_pairs) that adds a pair's force to one, minus it to the other.

    All of unit mass or charge: action equals reaction.
    """
    first, second = np.triu_indices(n_bodies, k=1)
    bodies = np.arange(n_bodies)[:, None]
    return (bodies == first).astype(float) - (bodies == second)


def _bodies_first(array: Array) -> Array:
    return np.ascontiguousarray(array.transpose(2, 1, 0))  # (3, N, n): systems are contiguous


def _systems_first(array: Array) -> Array:
    return array.transpose(2, 1, 0).copy()


def _stacked(kept: list[tuple[Array, Array]]) -> Frames:
    pos, velocities = zip(*kept, strict=True)
    return np.stack(pos, axis=1), np.stack(velocities, axis=1)


def _fingerprint(recipe: NBodyRecipe) -> str:
    known = {**asdict(recipe), "frames": recipe.kept_frames(), "noise": NOISE[recipe.system]}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
