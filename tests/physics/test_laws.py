"""The laws of physics every model keeps, in float64 over configs/model/*.yaml.

A new model gets these tests by its YAML alone.
"""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from bonded import BondedHyperGraph
from scipy.spatial.transform import Rotation
from structures import RATTLED, rattled_crystal, rattled_molecule

from atomeq.graph.builders import HyperGraph
from atomeq.potential.potential import Potential

EXACT = 1e-10  # float64 rounding through a network of some layers, relative to values of order one
DIFFERENCE = 1e-6  # central differences at a step of 1e-4: truncation dominates


def compute(potential: Potential, atoms, *properties: str) -> dict[str, np.ndarray]:
    graph = potential.build_graph(atoms)
    results = potential(graph, properties or ("energy", "forces"))
    return {key: value.detach().numpy() for key, value in results.items()}


def energy(potential: Potential, atoms: Atoms) -> float:
    return float(compute(potential, atoms, "energy")["energy"][0])


def transformed(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ matrix.T)
    moved.set_positions(atoms.positions @ matrix.T)
    return moved


ROTATION = Rotation.from_rotvec([0.7, -1.3, 0.4]).as_matrix()


@pytest.mark.parametrize(
    "matrix",
    [ROTATION, -np.eye(3), ROTATION @ np.diag([1.0, -1.0, 1.0])],
    ids=["rotation", "inversion", "improper"],
)
def test_energy_is_invariant_and_forces_turn_along(potential, structure, matrix):
    before = compute(potential, structure)
    after = compute(potential, transformed(structure, matrix))
    np.testing.assert_allclose(after["energy"], before["energy"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(after["forces"], before["forces"] @ matrix.T, rtol=0, atol=EXACT)


def test_stress_turns_along(potential):
    structure = rattled_crystal()
    before = compute(potential, structure, "stress")["stress"][0]
    after = compute(potential, transformed(structure, ROTATION), "stress")["stress"][0]
    np.testing.assert_allclose(after, ROTATION @ before @ ROTATION.T, rtol=0, atol=EXACT)


def test_translation_and_lattice_shifts_change_nothing(potential, structure):
    before = compute(potential, structure)
    moved = structure.copy()
    moved.positions += [13.7, -5.1, 2.2]
    for axis in range(3):
        if moved.pbc[axis]:
            moved.positions[0] += 2 * moved.cell.array[axis]
    after = compute(potential, moved)
    np.testing.assert_allclose(after["energy"], before["energy"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(after["forces"], before["forces"], rtol=0, atol=EXACT)


def test_permutation_permutes_forces(potential, structure):
    order = np.random.default_rng(0).permutation(len(structure))
    before = compute(potential, structure)
    after = compute(potential, structure[order])
    np.testing.assert_allclose(after["energy"], before["energy"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(after["forces"], before["forces"][order], rtol=0, atol=EXACT)


def test_batch_equals_single(potential):
    structures = [make() for make in RATTLED.values()]
    together = compute(potential, structures)
    apart = [compute(potential, structure) for structure in structures]
    for key in ("energy", "forces"):
        expected = np.concatenate([result[key] for result in apart])
        np.testing.assert_allclose(together[key], expected, rtol=0, atol=EXACT)


def test_forces_are_minus_energy_gradient(potential, structure):
    forces = compute(potential, structure)["forces"]
    step = 1e-4
    for atom, axis in [(0, 0), (1, 1), (len(structure) - 1, 2)]:
        values = []
        for sign in (1, -1):
            moved = structure.copy()
            moved.positions[atom, axis] += sign * step
            values.append(energy(potential, moved))
        difference = -(values[0] - values[1]) / (2 * step)
        assert forces[atom, axis] == pytest.approx(difference, abs=DIFFERENCE)


def test_stress_is_the_strain_derivative(potential):
    structure = rattled_crystal()
    stress = compute(potential, structure, "stress")["stress"][0]
    step = 1e-5
    for i, j in [(0, 0), (1, 1), (0, 1), (1, 2)]:
        values = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            moved = structure.copy()
            moved.set_cell(structure.cell.array @ strain, scale_atoms=True)
            values.append(energy(potential, moved))
        difference = (values[0] - values[1]) / (2 * step) / structure.get_volume()
        assert stress[i, j] == pytest.approx(difference, abs=DIFFERENCE)
    np.testing.assert_allclose(stress, stress.T, rtol=0, atol=EXACT)


def test_forces_sum_to_zero(potential, structure):
    forces = compute(potential, structure)["forces"]
    np.testing.assert_allclose(forces.sum(axis=0), 0.0, rtol=0, atol=EXACT)


def test_energy_and_forces_are_smooth_at_the_cutoff(potential):
    """An atom that crosses the cutoff of another: nothing may jump, slopes neither."""
    cutoff = potential.cutoff
    steps = np.linspace(-1e-3, 1e-3, 9) + 1.3e-5
    results = []
    for step in steps:
        atoms = Atoms("OCH", [[0, 0, 0], [-0.3, 1.1, 0.2], [cutoff + step, 0, 0]])
        results.append(compute(potential, atoms))
    energies = np.array([r["energy"][0] for r in results])
    forces = np.array([r["forces"][2, 0] for r in results])
    # u, u' and u'' vanish at the cutoff: 1e-3 Å inside it the energy of the pair is O(1e-9).
    assert np.ptp(energies - energies[-1]) < 1e-6
    assert np.ptp(np.diff(forces)) < 1e-4
    assert np.abs(forces[steps > 0]).max() == 0.0


def test_supercell_is_extensive(potential):
    structure = rattled_crystal()
    supercell = make_supercell(structure, np.array([[2, 0, 0], [0, 1, 0], [1, 0, 1]]))
    one = compute(potential, structure, "energy", "forces", "stress")
    two = compute(potential, supercell, "energy", "forces", "stress")
    assert two["energy"][0] == pytest.approx(2 * one["energy"][0], abs=EXACT * 10)
    np.testing.assert_allclose(two["stress"], one["stress"], rtol=0, atol=EXACT)
    # Which atom of the small cell each atom of the large one is a copy of.
    fractional = structure.cell.scaled_positions(supercell.positions)[:, None]
    apart = fractional - structure.cell.scaled_positions(structure.positions)
    origin = np.abs(apart - np.round(apart)).max(axis=2).argmin(axis=1)
    assert np.bincount(origin).tolist() == [2] * len(structure)
    np.testing.assert_allclose(two["forces"], one["forces"][origin], rtol=0, atol=EXACT)


def test_separated_fragments_are_additive(potential):
    left, right = rattled_molecule(), Atoms("HOH", [[0, 0, 0], [0, 0, 0.97], [0.9, 0, 1.2]])
    far = right.copy()
    far.positions += [60.0, 35.0, 0.0]
    together = compute(potential, left + far)
    apart = [compute(potential, left), compute(potential, right)]
    total = sum(float(result["energy"][0]) for result in apart)
    assert float(together["energy"][0]) == pytest.approx(total, abs=EXACT)
    forces = np.concatenate([result["forces"] for result in apart])
    np.testing.assert_allclose(together["forces"], forces, rtol=0, atol=EXACT)


@pytest.mark.parametrize("tilt", [0.0, 1e-8, 1e-4], ids=["pole", "beside it", "near it"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_edges_on_the_poles(potential, axis, tilt):
    """Collinear atoms along a coordinate axis, y being the polar axis of the edge frames."""
    line = np.zeros((3, 3))
    line[:, axis] = [-1.2, 0.0, 1.1]
    line[2, (axis + 1) % 3] += tilt
    atoms = Atoms("OCS", line)
    on_pole = compute(potential, atoms)
    turned = compute(potential, transformed(atoms, ROTATION))
    np.testing.assert_allclose(turned["energy"], on_pole["energy"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(
        turned["forces"], on_pole["forces"] @ ROTATION.T, rtol=0, atol=EXACT * 10
    )


def test_energy_is_continuous_at_symmetric_structures(potential):
    """Without forces, a push of 1e-4 Å changes the energy by some 1e-8 eV for springs."""
    perfect = bulk("Cu", cubic=True)
    pushed = perfect.copy()
    pushed.positions += 1e-4 * np.random.default_rng(0).normal(size=(4, 3))
    assert abs(energy(potential, pushed) - energy(potential, perfect)) / 4 <= 1e-6


def test_single_atom_has_an_energy_and_no_force(potential):
    result = compute(potential, Atoms("O"))
    assert np.isfinite(result["energy"]).all()
    np.testing.assert_array_equal(result["forces"], 0.0)


def test_hessian_is_the_gradient_of_the_forces(potential):
    """The second derivative, on which force training stands, against differences of forces."""
    structure = rattled_molecule()
    graph = potential.build_graph(structure)
    graph = graph.replace(pos=graph.pos.clone().requires_grad_())
    forces = potential(graph, ("forces",), create_graph=True)["forces"]
    row = torch.autograd.grad(forces[0, 0], graph.pos)[0].numpy()
    step = 1e-4
    for atom, axis in [(0, 0), (1, 2), (5, 1)]:
        values = []
        for sign in (1, -1):
            moved = structure.copy()
            moved.positions[atom, axis] += sign * step
            values.append(compute(potential, moved)["forces"][0, 0])
        difference = (values[0] - values[1]) / (2 * step)
        assert row[atom, axis] == pytest.approx(difference, abs=10 * DIFFERENCE)


def test_gradient_of_a_force_loss_is_its_derivative_along_any_weight(potential):
    """Training on forces differentiates forces by weights; differences know the right answer."""
    graph = potential.build_graph(rattled_crystal())
    parameters = [p for p in potential.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss(create_graph: bool) -> torch.Tensor:
        forces = potential(graph, ("forces",), create_graph=create_graph)["forces"]
        return (forces**2).mean()

    gradients = torch.autograd.grad(loss(True), parameters, materialize_grads=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    step, values = 1e-5, []
    # Four points: some models bend so much that two would leave an error of the tolerance's size.
    for shift in (1, -1, 2, -2):
        for p, d in zip(parameters, direction, strict=True):
            p.data += shift * step * d
        values.append(loss(False))
        for p, d in zip(parameters, direction, strict=True):
            p.data -= shift * step * d
    near, far = values[0] - values[1], values[2] - values[3]
    difference = float(8 * near - far) / (12 * step)
    assert slope == pytest.approx(difference, rel=1e-5)


def test_hyperedges_count_where_there_are_some(potential, structure):
    """Else the laws would say nothing about them."""
    if not isinstance(potential._builder, BondedHyperGraph):
        assert not int(potential.build_graph(structure).get("num_hyperedges", torch.zeros(1)).sum())
        return
    graph = potential.build_graph(structure)
    assert int(graph.num_hyperedges) > len(structure)
    bare = HyperGraph(potential.cutoff, perceive=False)(structure)
    energies = [float(potential(one, ("energy",))["energy"].detach()) for one in (graph, bare)]
    assert abs(energies[0] - energies[1]) > 1e-6


def test_exemptions_name_laws_that_are_tested(potential):
    """A misspelt exemption would exempt from nothing and be forgotten."""
    laws = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(potential.model.exempt_laws) <= laws
    assert all(potential.model.exempt_laws.values())
