"""Forces where an edge lies on the axis of the frames: published codes cut their gradient there."""

import numpy as np
from ase import Atoms
from scipy.spatial.transform import Rotation

from atomeq.potential.potential import Potential

# Published forces across such an edge are off by 0.1 of their size.
FORCE_TOLERANCE = 1e-8  # eV/Å, of differences of a float64 energy
STEP = 1e-4  # Å
FIVE_POINTS = ((2, 1), (1, -8), (-1, 8), (-2, -1))  # steps and 12 times minus their weights


def computed(potential: Potential, atoms: Atoms) -> tuple[float, np.ndarray]:
    """Return energy and forces."""
    result = potential(potential.build_graph(atoms), ("energy", "forces"))
    return float(result["energy"].detach()), result["forces"].detach().numpy()


def check_forces_beside_y(potential: Potential, angle: float) -> None:
    """Hold the forces of a molecule with a bond some degrees off y to differences of its energy."""
    tilt = np.radians(angle)
    bond = 1.2 * np.array([np.sin(tilt), np.cos(tilt), 0.0])
    atoms = Atoms("COHH", [[0, 0, 0], bond, [0.9, -0.5, 0.3], [-0.6, -0.7, -0.5]])
    _, forces = computed(potential, atoms)
    differences = np.zeros_like(forces)
    for index in np.ndindex(forces.shape):
        for sign, weight in FIVE_POINTS:
            moved = atoms.copy()
            moved.positions[index] += sign * STEP
            differences[index] += weight / (12 * STEP) * computed(potential, moved)[0]
    assert np.abs(forces[:2, [0, 2]]).max() > 1e-3  # there are transverse forces to get wrong
    np.testing.assert_allclose(forces, differences, atol=FORCE_TOLERANCE)
    turn = Rotation.from_rotvec([0.4, 0.2, -0.7]).as_matrix()
    turned = Atoms(atoms.symbols, atoms.positions @ turn.T)
    np.testing.assert_allclose(computed(potential, turned)[1] @ turn, forces, atol=1e-12)
