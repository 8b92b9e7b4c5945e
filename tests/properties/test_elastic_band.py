"""Elastic bands: in one batch as one by one, and over a barrier that is known."""

import analytic_potentials
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.mep.neb import NEB
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.elastic_band import (
    BatchedNEB,
    interpolated,
    neb,
    path_lengths,
    refuse_no_band,
)

EXACT = 1e-10


def hop() -> list[Atoms]:
    start = bulk("Cu", cubic=True).repeat((2, 1, 1))
    del start[0]
    start.rattle(0.03, seed=0)
    end = start.copy()
    end.positions[0] += (0.3, -0.4, -0.5)
    images = [start, *(start.copy() for _ in range(3)), end]
    NEB(images, method="improvedtangent").interpolate()
    return images


@pytest.mark.parametrize("climb", [False, True])
def test_a_band_in_one_batch_has_the_forces_of_single_images(climb):
    calculator = AtomeqCalculator(small_potential())
    batched = BatchedNEB(hop(), calculator, climb=climb)
    images = hop()
    for image in images:
        image.calc = AtomeqCalculator(small_potential())
    single = NEB(images, k=0.1, climb=climb, method="improvedtangent")
    for step in range(2):
        forces = batched.get_forces()
        np.testing.assert_allclose(forces, single.get_forces(), atol=EXACT)
        for band in (batched, single):
            band.set_positions(band.get_positions() + 0.01 * forces)
        assert batched.n_evaluations == step + 1
    assert np.all(np.diff(path_lengths(batched.images)) > 0)


def test_a_band_needs_images():
    with pytest.raises(ValueError, match="at least three"):
        BatchedNEB(hop()[:2], AtomeqCalculator(small_potential()))


def test_a_climbing_band_goes_over_the_pass():
    """The straight line between the wells, from which it starts, is higher than the pass."""
    calculator = AtomeqCalculator(analytic_potentials.of(analytic_potentials.Pass(height=0.5)))
    images = [Atoms("H", [[x, 0, 0]]) for x in np.linspace(-1, 1, 7)]
    seen = []
    path = neb(
        images,
        calculator,
        fmax=1e-3,
        observe=lambda band, n_steps: seen.append(n_steps),
    )
    assert path.converged
    assert path.barrier == pytest.approx(0.5, abs=1e-5)
    np.testing.assert_allclose(path.images[3].positions[0], [0, 1, 0], atol=1e-2)
    assert path.lengths[-1] > 2.5  # around the hill
    assert seen[0] == 0
    assert seen[-1] == path.n_steps
    slow = neb(images, calculator, optimizer="bfgs", fmax=1e-12, max_steps=2)
    assert (slow.converged, slow.n_steps) == (False, 2)


def test_ends_of_a_path_belong_together():
    crystal = bulk("Cu")
    with pytest.raises(ValueError, match="its two ends"):
        refuse_no_band([crystal])
    with pytest.raises(ValueError, match="same atoms in the same order"):
        interpolated(crystal, bulk("Al"), 3)
    with pytest.raises(ValueError, match="are the same"):
        interpolated(crystal, crystal.copy(), 3)
    with pytest.raises(ValueError, match="0 and 1 have different cells"):
        interpolated(crystal, bulk("Cu", a=4.0), 3)
