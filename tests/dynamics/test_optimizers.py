"""FIRE and L-BFGS against ASE's, step for step, and batches against single runs."""

from functools import partial

import numpy as np
import pytest
import torch
from analytic_potentials import Pairs, cluster, crystal, of
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE as ASE_FIRE
from ase.optimize import LBFGS as ASE_LBFGS

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.dynamics.cell import FrechetCell
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.optimizers import FIRE, LBFGS
from atomeq.dynamics.run import relax
from atomeq.dynamics.state import prepare
from atomeq.graph.convert import StructureError
from atomeq.units import GPA

SAME = 1e-8  # eV, Å: the law for float64; what is found is 1e-13
ASE = {FIRE: ASE_FIRE, LBFGS: ASE_LBFGS}
AS_ASE = {FIRE: FIRE, LBFGS: partial(LBFGS, rescale=False)}
FMAX = 5e-3
STEPS = 40  # enough to be far from the start; rounding grows along a path, as in any dynamics


@pytest.fixture(scope="module")
def potential():
    return of(Pairs())


def held(n_atoms, seed):
    atoms = cluster(n_atoms, seed)
    atoms.set_constraint(FixAtoms([0, 3]))
    return atoms


CLUSTERS = [cluster(5, 1), held(7, 2), cluster(2, 3), cluster(9, 4)]
CRYSTALS = [crystal(seed=1), crystal(seed=2, repeat=(2, 1, 1), a=3.5), crystal(seed=3)]
MASK = ((True, False, False), (False, True, False), (False, False, False))
CELLS = {
    "pressure": (FrechetCell(pressure=4 * GPA), {"scalar_pressure": 4 * GPA}),
    "mask": (FrechetCell(mask=MASK), {"mask": np.array(MASK)}),
    "hydrostatic": (FrechetCell(hydrostatic=True), {"hydrostatic_strain": True}),
    "volume": (FrechetCell(constant_volume=True), {"constant_volume": True}),
}


def relaxed(structures, potential, optimizer, **options):
    return sorted(
        relax(
            structures,
            potential,
            optimizer=optimizer,
            fmax=FMAX,
            **{"max_steps": STEPS, **options},
        ),
        key=lambda outcome: outcome.index,
    )


def ase_run(atoms, potential, optimizer, cell=None, n_steps=STEPS):
    atoms = atoms.copy()
    atoms.calc = AtomeqCalculator(potential)
    target = atoms if cell is None else FrechetCellFilter(atoms, **cell)
    run = ASE[optimizer](target, logfile=None)
    run.run(fmax=FMAX, steps=n_steps)
    return atoms, run.nsteps


def assert_as_ase(outcome, atoms, n_steps):
    assert outcome.n_steps == n_steps
    assert outcome.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(outcome.atoms.positions, atoms.positions, atol=1e-7)
    np.testing.assert_allclose(outcome.atoms.cell.array, atoms.cell.array, atol=1e-7)


@pytest.mark.parametrize("optimizer", [FIRE, LBFGS])
def test_a_batch_takes_the_steps_of_ase(optimizer, potential):
    outcomes = relaxed(CLUSTERS, potential, AS_ASE[optimizer]())
    for outcome, atoms in zip(outcomes, CLUSTERS, strict=True):
        assert_as_ase(outcome, *ase_run(atoms, potential, optimizer))


def test_converged_energies_are_those_of_ase(potential):
    (outcome,) = relaxed([cluster(5, 1)], potential, FIRE(), max_steps=500)
    atoms, _ = ase_run(cluster(5, 1), potential, FIRE, n_steps=500)
    assert outcome.status == "converged"
    assert outcome.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_cells_relax_as_in_ase(name, potential):
    ours, theirs = CELLS[name]
    optimizer = LBFGS if name == "pressure" else FIRE
    outcomes = relaxed(CRYSTALS[:2], potential, AS_ASE[optimizer](cell=ours))
    for outcome, atoms in zip(outcomes, CRYSTALS[:2], strict=True):
        assert_as_ase(outcome, *ase_run(atoms, potential, optimizer, theirs))


def test_the_pressure_inside_ends_at_the_pressure_outside(potential):
    (outcome,) = relaxed(
        [crystal()], potential, LBFGS(cell=FrechetCell(pressure=2 * GPA)), max_steps=200
    )
    assert outcome.status == "converged"
    stress = outcome.graph.stress[0] / GPA
    torch.testing.assert_close(stress, -2.0 * torch.eye(3, dtype=torch.float64), atol=0.1, rtol=0)


@pytest.mark.parametrize("cell", [None, FrechetCell()])
def test_a_rescaled_hessian_spares_steps_to_the_same_minimum(cell, potential):
    ours, as_ase = (
        relaxed(CRYSTALS, potential, LBFGS(cell=cell, rescale=rescale), max_steps=100)
        for rescale in (True, False)
    )
    for one, other in zip(ours, as_ase, strict=True):
        assert one.status == other.status == "converged"
        assert one.energy == pytest.approx(other.energy, abs=1e-4)  # forces up to FMAX are left
        assert one.n_steps < 0.6 * other.n_steps


@pytest.mark.parametrize("optimizer", [FIRE(), LBFGS(), FIRE(cell=FrechetCell())])
def test_a_batch_in_flight_equals_single_runs(optimizer, potential):
    structures = CRYSTALS if optimizer.cell else CLUSTERS
    two = 2 * max(potential.build_graph(atoms).n_edges for atoms in structures)
    batch = relaxed(structures, potential, optimizer, max_edges=two)
    for atoms, together in zip(structures, batch, strict=True):
        (alone,) = relaxed([atoms], potential, optimizer)
        assert together.n_steps == alone.n_steps
        assert together.energy == pytest.approx(alone.energy, abs=SAME)
        for name in ("pos", "cell", "forces"):
            torch.testing.assert_close(together.graph[name], alone.graph[name], atol=SAME, rtol=0)


@pytest.mark.parametrize("optimizer", [FIRE(), LBFGS()])
def test_fixed_atoms_do_not_move(optimizer, potential):
    (outcome,) = relaxed([held(7, 2)], potential, optimizer)
    moved = np.abs(outcome.atoms.positions - held(7, 2).positions).max(axis=1)
    assert (moved[[0, 3]] == 0).all()
    assert (moved[[1, 2, 4]] > 0).all()
    assert outcome.atoms.constraints[0].index.tolist() == [0, 3]


def test_cell_forces_are_minus_the_gradient_of_the_enthalpy(potential):
    evaluate, cell = Evaluator(potential), FrechetCell(pressure=3 * GPA)
    graph = prepare(crystal())
    random = torch.Generator().manual_seed(0)
    coordinates = 0.3 * torch.randn(1, 3, 3, generator=random, dtype=torch.float64)

    def enthalpy(at):
        placed = cell.place(graph, graph.pos, at, graph.cell)
        return evaluate(placed).energy + cell.pressure * placed.volume()

    placed = evaluate(cell.place(graph, graph.pos, coordinates, graph.cell), stress=True)
    forces = cell.forces(placed, coordinates)[1]
    for k in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[k] = 1e-4
        rise = enthalpy(coordinates + step.view(1, 3, 3)) - enthalpy(
            coordinates - step.view(1, 3, 3)
        )
        # The shift of N log F is not divided by N in ASE's forces, which are 1/N of the gradient
        # of what moves F by 1/N: both carry one N, so the gradient here is theirs.
        assert -float(rise) / 2e-4 == pytest.approx(float(forces.flatten()[k]), abs=1e-7)


def test_a_structure_without_volume_cannot_relax_its_cell(potential):
    with pytest.raises(StructureError, match="periodic in three directions"):
        FIRE(cell=FrechetCell()).init(prepare(cluster(4)), Evaluator(potential))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FIRE(max_step=0),
        lambda: FrechetCell(mask=((True, False, False),) * 3),
        lambda: FrechetCell(hydrostatic=True, constant_volume=True),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match=r"must be|leave nothing"):
        make()
