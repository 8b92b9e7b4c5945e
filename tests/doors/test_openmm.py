"""OpenMM moves atoms by our calculator, which OpenMM-ML takes; skipped where they are missing."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator

NEEDED = "OpenMM-ML is not installed: pip install atomeq[openmm]"
openmm = pytest.importorskip("openmm", reason=NEEDED)
app = pytest.importorskip("openmm.app", reason=NEEDED)
MLPotential = pytest.importorskip("openmmml", reason=NEEDED).MLPotential
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KJ = units.kJ / units.mol  # eV
ROUNDING = 1e-7  # eV, eV/Å; kJ/mol and nm there and back
STEP = 1.0  # fs


def crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=0)
    return atoms


def cluster() -> Atoms:
    atoms = crystal()
    return Atoms(atoms.symbols, atoms.positions)


def started(atoms: Atoms):
    """A context of OpenMM with the atoms where they are."""
    topology = app.Topology()
    residue = topology.addResidue("all", topology.addChain())
    for symbol in atoms.symbols:
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    if atoms.pbc.all():
        topology.setPeriodicBoxVectors(atoms.cell.array / 10 * openmm.unit.nanometer)
    potential = MLPotential("ase")
    calculator = AtomeqCalculator(small_potential())
    system = potential.createSystem(topology, calculator=calculator, removeCMMotion=False)
    for number, mass in enumerate(atoms.get_masses()):
        system.setParticleMass(number, mass)
    integrator = openmm.VerletIntegrator(STEP * 1e-3)  # ps
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions / 10)
    return context, integrator


def state_of(context) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces and positions, eV and Å."""
    state = context.getState(positions=True, energy=True, forces=True)
    energy = state.getPotentialEnergy()._value * KJ
    forces = state.getForces(asNumpy=True)._value * (KJ / 10)
    return energy, forces, state.getPositions(asNumpy=True)._value * 10


@pytest.mark.parametrize("make", [crystal, cluster])
def test_energy_and_forces_are_those_of_ase(make):
    atoms = make()
    energy, forces, _ = state_of(started(atoms)[0])
    atoms.calc = AtomeqCalculator(small_potential())
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=ROUNDING)
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=ROUNDING)


def test_motion_is_that_of_ase():
    atoms = crystal()
    context, integrator = started(atoms)
    # OpenMM's velocities are half a step behind: at rest there, they are not at rest here.
    atoms.calc = AtomeqCalculator(small_potential())
    half = atoms.get_forces() / atoms.get_masses()[:, None] * (STEP * units.fs / 2)
    atoms.set_velocities(half)
    integrator.step(20)
    with VelocityVerlet(atoms, STEP * units.fs) as dynamics:
        dynamics.run(20)
    energy, forces, positions = state_of(context)
    assert np.abs(positions - crystal().positions).max() > 1e-3
    np.testing.assert_allclose(positions, atoms.positions, atol=1e-6)
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-5)
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
