"""Hessians, committees and batches of the calculator."""

import copy
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.vibrations import Vibrations
from pymatgen.io.ase import AseAtomsAdaptor
from small_potential import small_potential
from structures import rattled_crystal, rattled_molecule

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.graph.convert import StructureError
from atomeq.models.egnn import EGNN
from atomeq.potential.derivatives import force_constants
from atomeq.potential.potential import Potential

EXACT = 1e-11  # the same arithmetic, sums in another order
CENTRAL = 1e-6  # eV/Å²: error of central differences of forces with steps of 1e-4 Å
WAVENUMBER = 1e-2  # cm⁻¹, of Vibrations' finite displacements of 1e-3 Å


def molecule() -> Atoms:
    positions = [[0, 0, 0], [2.4, 0.1, 0], [1.1, 2.2, 0.2], [1.0, 0.9, 2.1]]
    return Atoms("Cu2AlCu", positions)


def members(count: int = 3) -> list[Potential]:
    potentials = [small_potential() for _ in range(count)]
    for number, potential in enumerate(potentials):
        generator = torch.Generator().manual_seed(number)
        for parameter in potential.parameters():
            parameter.data += 0.05 * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
    return potentials


def numerical_hessian(atoms: Atoms, calculator: AtomeqCalculator, step: float = 1e-4):
    rows = []
    for coordinate in range(3 * len(atoms)):
        moved = []
        for sign in (1, -1):
            shifted = atoms.copy()
            shifted.positions.flat[coordinate] += sign * step
            moved.append(shifted)
        plus, minus = calculator.evaluate(moved)
        rows.append(-(plus["forces"] - minus["forces"]).ravel() / (2 * step))
    return np.array(rows)


@pytest.mark.parametrize("atoms", [molecule(), bulk("Cu", cubic=True)], ids=["molecule", "crystal"])
def test_hessian_is_the_derivative_of_the_forces(atoms):
    atoms.rattle(0.05, seed=0)
    calculator = AtomeqCalculator(small_potential())
    hessian = calculator.get_hessian(atoms)
    assert np.abs(hessian).max() > 0.1
    np.testing.assert_allclose(hessian, numerical_hessian(atoms, calculator), atol=CENTRAL)
    assert np.array_equal(hessian, hessian.T)
    # Moving everything moves nothing: three sums over atoms vanish.
    sums = hessian.reshape(-1, len(atoms), 3).sum(axis=1)
    np.testing.assert_allclose(sums, 0, atol=1e-9)


def test_hessian_does_not_depend_on_the_number_of_replicas():
    potential = small_potential()
    graph = potential.build_graph(molecule())
    whole = force_constants(potential, graph, max_edges=10**6)
    for max_edges in (1, 5 * graph.n_edges):
        part = force_constants(potential, graph, max_edges=max_edges)
        torch.testing.assert_close(part, whole, atol=EXACT, rtol=0)


def test_hessian_of_a_lone_atom_is_zero():
    hessian = AtomeqCalculator(small_potential()).get_hessian(Atoms("Cu"))
    assert np.array_equal(hessian, np.zeros((3, 3)))


def test_vibrations_are_those_of_finite_differences(tmp_path):
    atoms = molecule()
    atoms.set_constraint(FixAtoms([3]))
    calculator = AtomeqCalculator(small_potential())
    atoms.calc = calculator
    finite = Vibrations(atoms, name=str(tmp_path / "vib"), delta=1e-3, nfree=4)
    finite.run()
    exact = calculator.get_vibrations(atoms).get_energies()
    assert len(exact) == 9
    np.testing.assert_allclose(exact, finite.get_energies(), atol=WAVENUMBER * 1.24e-4)


def test_committee_gives_mean_and_spread():
    potentials = members()
    atoms = rattled_crystal()
    atoms.numbers[:] = 29
    each = [AtomeqCalculator(one).evaluate([atoms], ("forces", "stress"))[0] for one in potentials]
    atoms.calc = AtomeqCalculator(potentials)
    for name in ("energy", "energies", "forces", "stress"):
        values = np.array([one[name] for one in each])
        found = atoms.calc.get_property(name, atoms)
        np.testing.assert_allclose(found, values.mean(axis=0), atol=EXACT)
        spread = atoms.calc.get_property(f"{name}_std", atoms)
        np.testing.assert_allclose(spread, values.std(axis=0, ddof=1), atol=EXACT)
        assert np.max(spread) > 1e-6
    assert atoms.calc.results["energy_std"] > 0


def test_forces_of_a_committee_are_the_gradient_of_its_energy():
    atoms = molecule()
    calculator = AtomeqCalculator(members())
    forces = calculator.get_forces(atoms)
    step = 1e-4
    moved = [atoms.copy(), atoms.copy()]
    moved[0].positions[1, 0] += step
    moved[1].positions[1, 0] -= step
    plus, minus = (one["energy"] for one in calculator.evaluate(moved))
    assert forces[1, 0] == pytest.approx(-(plus - minus) / (2 * step), abs=1e-7)
    hessian = calculator.get_hessian(atoms)
    np.testing.assert_allclose(hessian, numerical_hessian(atoms, calculator), atol=CENTRAL)


def test_committee_of_different_cutoffs_pickles():
    potentials = [small_potential(), small_potential(cutoff=3.5)]
    calculator = AtomeqCalculator(potentials)
    atoms = molecule()
    energies = [AtomeqCalculator(one).get_potential_energy(atoms) for one in potentials]
    assert energies[0] != pytest.approx(energies[1], abs=1e-6)
    for twin in (calculator, copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert twin.get_potential_energy(atoms) == pytest.approx(np.mean(energies), abs=EXACT)
    assert len(calculator.provenance["members"]) == 2


def test_committee_of_none_is_refused():
    with pytest.raises(ValueError, match="at least one potential"):
        AtomeqCalculator([])


@pytest.mark.parametrize("max_edges", [1, 100, 10**6])
def test_batches_give_what_single_calculations_give(max_edges):
    calculator = AtomeqCalculator(small_potential())
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=1)
    other = crystal.repeat((2, 1, 1))
    other.rattle(0.05, seed=2)
    structures = [crystal, other, AseAtomsAdaptor.get_structure(crystal)]
    found = calculator.evaluate(structures, ("energy", "forces", "stress"), max_edges=max_edges)
    for atoms, results in zip([crystal, other, crystal], found, strict=True):
        for name in ("energy", "free_energy", "energies", "forces", "stress"):
            expected = calculator.get_property(name, atoms)
            np.testing.assert_allclose(results[name], expected, atol=EXACT)


def test_batches_refuse_what_they_cannot_give():
    calculator = AtomeqCalculator(small_potential())
    with pytest.raises(StructureError, match="structure 1: stress needs"):
        calculator.evaluate([bulk("Cu"), molecule()], ("stress",))
    with pytest.raises(StructureError, match="structure 1"):
        calculator.evaluate([bulk("Cu"), Atoms("Xe")])
    with pytest.raises(ValueError, match="'hessian'"):
        calculator.evaluate([bulk("Cu")], ("hessian",))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_are_float64_whatever_the_network_computes_in(dtype):
    calculator = AtomeqCalculator(members(2), dtype=dtype)
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    for name in ("energies", "forces", "stress", "hessian", "forces_std"):
        assert calculator.get_property(name, atoms).dtype == np.float64
    reference = AtomeqCalculator(members(2)).get_hessian(atoms)
    tolerance = 1e-3 if dtype == "float32" else EXACT
    np.testing.assert_allclose(calculator.get_hessian(atoms), reference, atol=tolerance)


def test_info_and_arrays_stay_untouched():
    atoms = rattled_molecule()
    atoms.numbers[:] = 29
    atoms.info.update(energy=float("nan"), charge=0, note="mine")
    before, names = dict(atoms.info), set(atoms.arrays)
    calculator = AtomeqCalculator(Potential(EGNN(cutoff=3.0, num_layers=1, hidden_channels=4)))
    calculator.evaluate([atoms])
    calculator.get_hessian(atoms)
    assert str(atoms.info) == str(before)
    assert set(atoms.arrays) == names
