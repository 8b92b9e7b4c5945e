"""Elastic bands: paths of least energy between two structures, all images in one batch a step."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.mep.neb import NEB
from ase.optimize import BFGS, FIRE
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.graph.convert import StructureError

_OPTIMIZERS = {"fire": FIRE, "bfgs": BFGS}
_BEFORE_CLIMBING = 5.0  # times fmax: a band that is nearly there knows which image is highest
_SAME = 1e-3  # Å, of cells that are the same


@dataclass(frozen=True)
class EnergyPath:
    """A band that was relaxed.

    Attributes:
        images: Both ends included, with energy (eV) and forces.
        n_steps: Steps of the optimizer.
        n_evaluations: Batches that were computed.
        converged: Whether the largest force of the band fell below the threshold.
    """

    images: list[Atoms]
    n_steps: int
    n_evaluations: int
    converged: bool

    @property
    def energies(self) -> NDArray[np.float64]:
        """Energies of the images, (n_images,), eV."""
        return np.array([image.get_potential_energy() for image in self.images])

    @property
    def lengths(self) -> NDArray[np.float64]:
        """How far along the path each image lies, (n_images,), Å in the space of all atoms."""
        return path_lengths(self.images)

    @property
    def barrier(self) -> float:
        """Energy of the highest image above the first, eV."""
        return float(self.energies.max() - self.energies[0])


def neb(
    images: Sequence[Atoms],
    calculator: AtomeqCalculator,
    *,
    spring: float = 0.1,
    climb: bool = True,
    optimizer: Literal["fire", "bfgs"] = "fire",
    fmax: float = 0.05,
    max_steps: int = 300,
    observe: Callable[["BatchedNEB", int], None] | None = None,
) -> EnergyPath:
    """Relax a nudged elastic band, at first without climbing.

    Args:
        images: The band, both ends included, as :func:`interpolated` makes it; changed in place.
        calculator: Evaluates all images together.
        spring: eV/Å².
        climb: Drive the highest image up to the saddle point.
        optimizer: ASE's.
        fmax: Largest force left, eV/Å.
        max_steps: Steps after which it ends anyhow.
        observe: Called with the band and the number of steps, at first 0, after each step.

    Returns:
        The path, converged or not.

    Raises:
        ValueError: The images are no band, or one of them went where no potential is.

    Example:
        >>> images = interpolated(start, end, 7)  # doctest: +SKIP
        >>> neb(images, AtomeqCalculator("cu-pbe")).barrier  # doctest: +SKIP
    """
    refuse_no_band(images)
    band = BatchedNEB(images, calculator, spring=spring)
    phases = [(False, _BEFORE_CLIMBING * fmax), (True, fmax)] if climb else [(False, fmax)]
    done, converged = 0, False
    for climbing, threshold in phases:
        band.climb = climbing
        driver = _OPTIMIZERS[optimizer](band, logfile=None)
        steps = 0
        try:
            for state in driver.irun(fmax=threshold, steps=max_steps - done):
                converged, steps = bool(state), driver.nsteps
                if observe is not None:
                    observe(band, done + steps)
        except StructureError as error:
            raise ValueError(
                f"the band went astray: {error}; take more images, or start from a whole band"
            ) from error
        done += steps
    return EnergyPath(band.images, done, band.n_evaluations, converged)


def interpolated(start: Atoms, end: Atoms, n_images: int, *, mic: bool = True) -> list[Atoms]:
    """Return a band between two structures, by the image-dependent pair potential.

    Args:
        start: One end.
        end: The other.
        n_images: Images between them.
        mic: Take the shortest way through periodic boundaries.

    Raises:
        ValueError: The ends are not of the same atoms in the same cell, or are the same.
    """
    refuse_no_band([start, end])
    images = [start, *(start.copy() for _ in range(n_images)), end]
    NEB(images, method="improvedtangent").interpolate(
        method="idpp", mic=bool(start.pbc.any()) and mic, apply_constraint=False
    )
    for image in images:
        image.calc = None  # the interpolation's own
    return images


def refuse_no_band(images: Sequence[Atoms]) -> None:
    """Refuse structures that cannot be the images of one path.

    Raises:
        ValueError: A single one, other atoms or cells, or ends that are the same.
    """
    if len(images) < 2:
        raise ValueError(f"there are {len(images)} structures; a path needs its two ends")
    first, last = images[0], images[-1]
    for number, atoms in enumerate(images[1:], start=1):
        if not np.array_equal(atoms.numbers, first.numbers):
            raise ValueError(
                f"structure 0 is {first.symbols} and structure {number} is {atoms.symbols}; the "
                "structures of a path hold the same atoms in the same order"
            )
        if not np.allclose(atoms.cell.array, first.cell.array, atol=_SAME):
            raise ValueError(
                f"structures 0 and {number} have different cells; a path keeps its cell"
            )
    if np.allclose(first.positions, last.positions, atol=_SAME):
        raise ValueError("the first and the last structure of the path are the same")


class BatchedNEB(NEB):
    """A nudged elastic band: improved tangent, and a climbing image if asked.

    Every ASE optimizer drives it. The images hold the results of the last evaluation.

    Args:
        images: The band, both ends included.
        calculator: Evaluates all images together.
        spring: eV/Å².
        climb: Drive the highest image up to the saddle point.

    Raises:
        ValueError: There are fewer than three images, or they are not of the same atoms.
    """

    def __init__(
        self,
        images: Sequence[Atoms],
        calculator: AtomeqCalculator,
        *,
        spring: float = 0.1,
        climb: bool = False,
    ) -> None:
        if len(images) < 3:
            raise ValueError(f"a band needs at least three images, and has {len(images)}")
        super().__init__(list(images), k=spring, climb=climb, method="improvedtangent")
        self.calculator = calculator
        self.n_evaluations = 0
        self._ends: list[dict[str, Any]] | None = None
        self._evaluated: NDArray[np.float64] | None = None

    def get_forces(self) -> NDArray[np.float64]:
        """Return the forces of the band, evaluating its images where they have moved."""
        positions = self.get_positions()
        if self._evaluated is None or not np.array_equal(positions, self._evaluated):
            self._evaluate()
            self._evaluated = positions
        return super().get_forces()

    def _evaluate(self) -> None:
        """Give every image its results; the ends, which stay, are computed once."""
        inner = self.images[1:-1]
        if self._ends is None:
            start, *found, end = self.calculator.evaluate(self.images)
            self._ends = [start, end]
        else:
            found = self.calculator.evaluate(inner)
        self.n_evaluations += 1
        start, end = self._ends
        for image, results in zip(self.images, [start, *found, end], strict=True):
            image.calc = SinglePointCalculator(
                image,
                energy=results["energy"],
                free_energy=results["energy"],
                forces=results["forces"].copy(),
            )


def path_lengths(images: Sequence[Atoms]) -> NDArray[np.float64]:
    """Return how far along the path each image lies: (n_images,), Å in the space of all atoms."""
    steps = [
        np.linalg.norm(other.positions - one.positions) for one, other in itertools.pairwise(images)
    ]
    return np.concatenate(([0.0], np.cumsum(steps)))
