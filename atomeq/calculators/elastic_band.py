"""ASE's nudged elastic band with all images evaluated in one batch per step."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.mep.neb import NEB
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator


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
