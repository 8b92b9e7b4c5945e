"""The topology that a hypergraph potential sees is fixed where a motion starts."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.torchsim import torchsim_model
from atomeq.check.calculator import check_calculator
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet as BatchedVerlet
from atomeq.dynamics.run import relax, simulate
from atomeq.dynamics.state import prepare
from atomeq.graph.builders import HyperGraph
from atomeq.graph.convert import StructureError
from atomeq.graph.hyperedges import INFO_KEY, Hyperedges, fix_topology, perceive_hyperedges
from atomeq.graph.topology import KeptTopologies
from atomeq.models.egnn import EGNN
from atomeq.models.equihgnn import EquiHGNN
from atomeq.potential.potential import Potential

pytest.importorskip("rdkit.Chem", reason="RDKit is of the extra chemistry")

SAME = 1e-12  # float64 rounding through the network
LEAVING = 1.3  # times the first O-H bond: 0.02 Å below where perception gives it up


@pytest.fixture(scope="module")
def potential() -> Potential:
    """An EquiHGNN that perceives, its default, with weights that make every hyperedge count."""
    torch.manual_seed(0)
    encoder = EGNN(4.0, num_layers=1, hidden_channels=8)
    made = Potential(EquiHGNN(encoder, num_layers=1, hidden_channels=8)).double().eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.fixture
def calculator(potential: Potential) -> AtomeqCalculator:
    return AtomeqCalculator(potential)


def stretched(factor: float) -> Atoms:
    """Water with one of its bonds pulled."""
    atoms = molecule("H2O")
    atoms.positions[1] = atoms.positions[0] + factor * (atoms.positions[1] - atoms.positions[0])
    return atoms


def test_perception_gives_the_bond_up_on_the_way():
    """What the tests below stand on."""
    counts = [
        len(perceive_hyperedges(atoms.numbers, atoms.positions).of_type(0))
        for atoms in (stretched(LEAVING), stretched(1.4))
    ]
    assert counts == [2, 1]


def test_an_object_keeps_its_topology_as_it_moves(calculator: AtomeqCalculator):
    moving = molecule("H2O")
    moving.calc = calculator
    energies: dict[str, list[float]] = {"moving": [], "new": []}
    for factor in np.linspace(1.2, 1.5, 31):
        new = stretched(factor)
        moving.positions[:] = new.positions
        new.calc = calculator
        energies["moving"].append(moving.get_potential_energy())
        energies["new"].append(new.get_potential_energy())
    steps = {name: np.abs(np.diff(values, 2)).max() for name, values in energies.items()}
    assert steps["moving"] < 1e-2 * steps["new"]
    assert INFO_KEY not in moving.info


def test_newtons_equations_conserve_energy_across_a_breaking_bond(calculator: AtomeqCalculator):
    atoms = stretched(LEAVING)
    atoms.calc = calculator
    atoms.set_velocities(0.05 * (atoms.positions - atoms.positions[0]) / units.fs)
    dynamics = VelocityVerlet(atoms, timestep=0.1 * units.fs)
    totals = [atoms.get_total_energy() for _ in dynamics.irun(60)]
    assert atoms.get_distance(0, 1) > 1.4 * molecule("H2O").get_distance(0, 1)
    jump = abs(calculator.get_property("energy", atoms) - energy(calculator, atoms.copy()))
    assert np.ptp(totals) < 1e-2 * jump


def energy(calculator: AtomeqCalculator, atoms: Atoms) -> float:
    atoms.calc = calculator
    return atoms.get_potential_energy()


def test_check_measures_the_drift_of_a_molecule(potential: Potential):
    (result,) = check_calculator(
        lambda: AtomeqCalculator(potential),
        elements=["H", "C", "O"],
        only=["NVE drift"],
        dynamics_structure=molecule("CH3CH2OH"),
        dynamics_picoseconds=0.01,
        timestep=0.25,
    )
    assert result.passed, result


def test_what_came_before_changes_nothing(calculator: AtomeqCalculator, potential: Potential):
    """The same place has the energy of its own bonds, whoever was there with others before."""
    moved = molecule("H2O")
    energy(calculator, moved)
    moved.positions[:] = stretched(1.5).positions
    kept = energy(calculator, moved)
    alone = energy(AtomeqCalculator(potential), stretched(1.5))
    assert abs(kept - alone) > 1e-6
    assert energy(calculator, stretched(1.5)) == pytest.approx(alone, abs=SAME)
    assert energy(calculator, moved) == pytest.approx(kept, abs=SAME)
    batch = calculator.evaluate([moved, stretched(1.5)])
    assert [one["energy"] for one in batch] == pytest.approx([kept, alone], abs=SAME)


def test_fix_topology_rebuilds(calculator: AtomeqCalculator):
    moved = molecule("H2O")
    energy(calculator, moved)
    moved.positions[:] = stretched(1.5).positions
    kept = energy(calculator, moved)
    fix_topology(moved)
    rebuilt = energy(calculator, moved)
    assert rebuilt == pytest.approx(energy(calculator, stretched(1.5)), abs=SAME)
    assert abs(rebuilt - kept) > 1e-6


def test_copies_and_other_elements_start_anew(calculator: AtomeqCalculator):
    moved = molecule("H2O")
    energy(calculator, moved)
    moved.positions[:] = stretched(1.5).positions
    fresh = energy(calculator, stretched(1.5))
    assert energy(pickle.loads(pickle.dumps(calculator)), moved) == pytest.approx(fresh, abs=SAME)
    assert energy(copy.deepcopy(calculator), moved) == pytest.approx(fresh, abs=SAME)
    moved.numbers[0] = 16
    sulfide = stretched(1.5)
    sulfide.numbers[0] = 16
    assert energy(calculator, moved) == pytest.approx(energy(calculator, sulfide), abs=SAME)


def test_deleted_objects_are_forgotten():
    topologies = KeptTopologies()
    atoms, other = molecule("H2O"), molecule("CH4")
    topologies.of(atoms)
    topologies.of(other)
    del atoms
    gc.collect()
    assert [kept.structure() for kept in topologies._kept.values()] == [other]


def test_structures_without_topology_are_refused(calculator: AtomeqCalculator):
    atoms = molecule("H2O")
    atoms.set_cell([9.0, 9.0, 9.0])
    atoms.pbc = True
    with pytest.raises(StructureError, match=r"structure 1 .*periodic"):
        calculator.evaluate([molecule("H2O"), atoms])
    atoms.info[INFO_KEY] = {"members": [[0, 1], [0, 2]], "types": [0, 0]}
    assert np.isfinite(energy(calculator, atoms))


@pytest.mark.parametrize("given", [False, True], ids=["perceived", "in info"])
def test_batched_dynamics_keeps_the_first_topology(potential: Potential, given: bool):
    structures = [stretched(LEAVING), molecule("CH3OH")]
    if given:  # another one than perception finds
        structures[0].info[INFO_KEY] = {"members": [[0, 1], [0, 2], [0, 1, 2]], "types": [0, 0, 5]}
    structures[0].set_velocities(
        0.1 * (structures[0].positions - structures[0].positions[0]) / units.fs
    )
    structures[1].set_velocities(np.zeros((6, 3)) + 1e-3)
    motion = BatchedVerlet(timestep=0.1)
    together = {one.index: one for one in simulate(structures, potential, motion, n_steps=60)}
    for k, atoms in enumerate(structures):
        (alone,) = simulate([atoms], potential, motion, n_steps=60)
        outcome = together[k]
        assert outcome.status == alone.status == "completed", outcome.reason
        assert outcome.graph is not None
        assert alone.energy == pytest.approx(outcome.energy, abs=SAME)
        start = HyperGraph(4.0)(atoms)
        assert torch.equal(outcome.graph.hyperedge_index, start.hyperedge_index)
        # Its energy is that of the structure it returns, file or not.
        assert energy(AtomeqCalculator(potential), outcome.atoms) == pytest.approx(
            outcome.energy, abs=SAME
        )
    assert together[0].atoms.get_distance(0, 1) > 1.4 * molecule("H2O").get_distance(0, 1)


def test_batched_relaxation_follows_ase(potential: Potential):
    atoms = molecule("CH3OH")
    (outcome,) = relax([atoms], potential, fmax=1e-3, max_steps=1000)
    atoms.calc = AtomeqCalculator(potential)
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=500)
    assert outcome.status == "converged", outcome.reason
    assert outcome.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)


def test_what_cannot_be_perceived_is_refused_alone(potential: Potential):
    crystal = molecule("H2O")
    crystal.set_cell([9.0, 9.0, 9.0])
    crystal.pbc = True
    outcomes = {one.index: one for one in relax([crystal, molecule("H2")], potential, max_steps=2)}
    assert outcomes[0].status == "refused"
    assert "periodic" in outcomes[0].reason
    assert outcomes[1].graph is not None


def test_a_batch_without_topology_is_an_error(potential: Potential):
    with pytest.raises(ValueError, match="no hyperedges"):
        Evaluator(potential)(prepare(molecule("H2O")))


def test_torchsim_is_refused_what_it_cannot_keep(potential: Potential):
    with pytest.raises(ValueError, match="cannot keep"):
        torchsim_model(potential)


def test_laws_of_molecules_hold_for_a_potential_of_molecules(potential: Potential):
    """Each by the molecule it is about; those of crystals say that they do not apply."""
    names = {"forces are -dE/dx": True, "single atom": True, "wrapping": None}
    names |= {"changes in place": True, "pbc without a cell refused": None}
    results = check_calculator(
        lambda: AtomeqCalculator(potential), elements=["C", "H", "N", "O"], only=names
    )
    assert {result.name: result.passed for result in results} == names


@pytest.mark.slow
def test_a_dimer_pulled_apart_is_one_structure(potential: Potential):
    (result,) = check_calculator(
        lambda: AtomeqCalculator(potential), elements=["C", "O"], only=["smooth at the cutoff"]
    )
    assert result.passed, result


def test_files_keep_hyperedges(tmp_path):
    atoms = molecule("CH3OH")
    fixed = fix_topology(atoms)
    write(tmp_path / "methanol.extxyz", atoms)
    again = read(tmp_path / "methanol.extxyz")
    assert Hyperedges.from_info(again.info[INFO_KEY]) == fixed
