"""The laws of motion, of heat and of pressure, on potentials whose averages are known."""

import dataclasses

import numpy as np
import pytest
import torch
from analytic_potentials import Gas, Pairs, Tethers, cluster, crystal, of
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLength

from atomeq.dynamics.barostat import LangevinNPT
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import Bussi, Langevin, NoseHoover, Ramp, VelocityVerlet
from atomeq.dynamics.kinetics import standard_normal, thermal_velocities
from atomeq.dynamics.run import simulate
from atomeq.dynamics.state import per_system, prepare
from atomeq.graph.convert import StructureError
from atomeq.units import BOLTZMANN, GPA

SAME = 1e-8  # Å, Å/fs: the law for float64
T = 300.0
KT = BOLTZMANN * T
INTEGRATORS = {
    "nve": VelocityVerlet(2.0, T),
    "langevin": Langevin(2.0, T, friction_time=50.0),
    "chain": NoseHoover(2.0, T, relaxation_time=30.0),
    "bussi": Bussi(2.0, T, relaxation_time=30.0),
    "npt": LangevinNPT(2.0, T, barostat="full", barostat_time=100.0),
}


@pytest.fixture(scope="module")
def pairs():
    return of(Pairs())


def started(integrator, structures, potential):
    evaluate = Evaluator(potential)
    return integrator.init(prepare(structures), evaluate), evaluate


def run(integrator, structures, potential, n_steps):
    state, evaluate = started(integrator, structures, potential)
    for _ in range(n_steps):
        state = integrator.step(state, evaluate)
    return state


def held(n_atoms=8):
    atoms = cluster(n_atoms, 2)
    atoms.set_constraint(FixAtoms([0, 3]))
    return atoms


@pytest.mark.parametrize("name", INTEGRATORS)
def test_a_batch_in_flight_equals_single_runs(name, pairs):
    structures = [crystal(seed=1), crystal(seed=2, a=3.7), crystal(seed=3, repeat=(2, 1, 1))]
    if name != "npt":
        structures += [held(), cluster(2, 1)]
    options = {"n_steps": 12, "seed": 5}
    largest = max(pairs.build_graph(atoms).n_edges for atoms in structures)
    batch = list(simulate(structures, pairs, INTEGRATORS[name], max_edges=2 * largest, **options))
    assert {outcome.index for outcome in batch} == set(range(len(structures)))
    for together in batch:
        # Alone, but at its place in the stream, which decides its seed.
        alone = next(
            outcome
            for outcome in simulate(
                structures[: together.index + 1],
                pairs,
                INTEGRATORS[name],
                max_edges=largest,
                **options,
            )
            if outcome.index == together.index
        )
        for field in ("pos", "velocities", "cell"):
            torch.testing.assert_close(together.graph[field], alone.graph[field], atol=SAME, rtol=0)


@pytest.mark.parametrize("integrator", [VelocityVerlet, NoseHoover])
def test_what_is_conserved_strays_with_the_square_of_the_timestep(integrator, pairs):
    strays = []
    for timestep in (4.0, 2.0):
        motion = integrator(timestep, T)
        state, evaluate = started(motion, [crystal(seed=1), cluster(12, 3)], pairs)
        first = motion.conserved(state)
        stray = torch.zeros(2, dtype=torch.float64)
        for _ in range(int(160 / timestep)):
            state = motion.step(state, evaluate)
            stray = torch.maximum(stray, (motion.conserved(state) - first).abs())
        strays.append(stray)
    ratio = strays[0] / strays[1]
    assert ((ratio > 3.5) & (ratio < 4.5)).all(), ratio
    assert (strays[1] < 2e-3).all()


def test_verlet_runs_backwards(pairs):
    motion = INTEGRATORS["nve"]
    state, evaluate = started(motion, [crystal(seed=1), held()], pairs)
    first = state
    for _ in range(2):
        for _ in range(20):
            state = motion.step(state, evaluate)
        turned = state.graph.replace(velocities=-state.graph["velocities"])
        state = dataclasses.replace(state, graph=turned)
    torch.testing.assert_close(state.graph.pos, first.graph.pos, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ["nve", "chain", "bussi"])
def test_momentum_stays_zero_where_no_atom_is_fixed(name, pairs):
    graph = run(INTEGRATORS[name], [crystal(seed=1), cluster(5)], pairs, 20).graph
    momentum = per_system(graph["masses"][:, None] * graph["velocities"], graph)
    assert momentum.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["nve", "langevin", "chain", "bussi"])
def test_fixed_atoms_stay(name, pairs):
    atoms = held()
    graph = run(INTEGRATORS[name], [atoms, cluster(4)], pairs, 10).graph
    assert np.array_equal(graph.pos[[0, 3]].numpy(), atoms.positions[[0, 3]])
    assert not graph["velocities"][[0, 3]].any()
    assert (graph.pos[[1, 2]] != torch.tensor(atoms.positions[[1, 2]])).all()


@pytest.mark.parametrize(
    ("name", "degrees"),
    [(name, [24, 6, 18]) for name in ("nve", "chain", "bussi")] + [("langevin", [27, 9, 18])],
)
def test_degrees_of_freedom_are_counted(name, degrees, pairs):
    state, _ = started(INTEGRATORS[name], [cluster(9), cluster(3), held()], pairs)
    assert state.degrees.tolist() == degrees


def gases(n_atoms, n_systems, volume):
    random = np.random.default_rng(0)
    edge = [volume ** (1 / 3)] * 3
    return [
        Atoms(f"Cu{n_atoms}", cell=edge, pbc=True, scaled_positions=random.random((n_atoms, 3)))
        for _ in range(n_systems)
    ]


@pytest.mark.parametrize("name", ["langevin", "chain", "bussi"])
def test_harmonic_atoms_have_the_canonical_energies(name):
    """⟨K⟩ = n kT/2, ⟨K²⟩ - ⟨K⟩² = n (kT)²/2, ⟨U⟩ as K: equipartition and its fluctuation."""
    random = np.random.default_rng(1)
    structures = [Atoms("Cu4", random.normal(0, 0.2, (4, 3))) for _ in range(100)]
    motion = dataclasses.replace(INTEGRATORS[name], timestep=8.0)
    state, evaluate = started(motion, structures, of(Tethers()))
    kinetic, potential = [], []
    for step in range(250):
        state = motion.step(state, evaluate)
        if step > 50:
            kinetic.append(state.kinetic_energy())
            potential.append(state.graph.energy)
    kinetic, potential = torch.stack(kinetic), torch.stack(potential)
    degrees = state.degrees.double()
    # 100 structures of about ten independent samples each: 1 % of 12 degrees' mean.
    assert float((kinetic / degrees).mean()) == pytest.approx(KT / 2, rel=0.05)
    assert float(kinetic.var(unbiased=False) / degrees.mean()) == pytest.approx(KT**2 / 2, rel=0.2)
    if name == "langevin":  # the chain holds the centre of mass where it began
        assert float((potential / degrees).mean()) == pytest.approx(KT / 2, rel=0.07)


def test_bussi_rescales_as_the_paper_says(pairs):
    """⟨K'⟩ and var K' of one thermostat step from one K, eq. A7, over many structures."""
    n_systems, keep = 4000, 0.6
    motion = Bussi(1.0, T, relaxation_time=-1 / np.log(keep))
    state, _ = started(motion, [Atoms("Cu2", [[0, 0, 0], [0, 0, 30]])] * n_systems, of(Gas()))
    twice = torch.full((n_systems,), 5 * KT, dtype=torch.float64)  # of three degrees
    scale = motion._scale(state, twice)
    after = scale.square() * twice / KT
    mean = keep * 5 + (1 - keep) * 3
    variance = 2 * 3 * (1 - keep) ** 2 + 4 * keep * (1 - keep) * 5
    assert float(after.mean()) == pytest.approx(mean, abs=4 * (variance / n_systems) ** 0.5)
    assert float(after.var()) == pytest.approx(variance, rel=0.12)


def test_what_bussi_gives_is_accounted_for(pairs):
    """Total energy minus heat stays within the error of velocity Verlet, which goes with dt²."""
    motion = Bussi(1.0, T, relaxation_time=20.0)
    state, evaluate = started(motion, [crystal(seed=1), cluster(12, 3)], pairs)
    first, total = motion.conserved(state), state.total_energy()
    for _ in range(100):
        state = motion.step(state, evaluate)
        assert (motion.conserved(state) - first).abs().max() < 2e-3
    assert (state.total_energy() - total).abs().min() > 0.02


@pytest.mark.parametrize("name", ["langevin", "chain", "bussi"])
def test_a_ramp_heats_as_it_says(name):
    random = np.random.default_rng(1)
    structures = [Atoms("Cu4", random.normal(0, 0.2, (4, 3))) for _ in range(100)]
    motion = dataclasses.replace(INTEGRATORS[name], timestep=8.0, temperature=Ramp(T, 3 * T, 150))
    state, evaluate = started(motion, structures, of(Tethers()))
    assert torch.allclose(state.temperature(), torch.full((100,), T, dtype=torch.float64))
    found = []
    for _ in range(200):
        state = motion.step(state, evaluate)
        found.append(float(state.temperature().mean()))
    # 100 structures of 9 to 12 degrees: 4 % of the mean at a step, averaged over 40 of them.
    assert np.mean(found[55:95]) == pytest.approx(2 * T, rel=0.12)
    assert np.mean(found[-40:]) == pytest.approx(3 * T, rel=0.12)


def test_other_constraints_are_refused(pairs):
    atoms = cluster(4)
    atoms.set_constraint(FixBondLength(0, 1))
    (outcome,) = simulate(atoms, pairs, VelocityVerlet(), n_steps=1)
    assert outcome.status == "refused"
    assert "is no constraint that dynamics keeps" in outcome.reason


def test_an_ideal_gas_takes_the_volume_of_its_pressure():
    """p(V) ~ V^N exp(-PV/kT): ⟨V⟩ = (N + 1) kT/P and var V = (N + 1) (kT/P)²."""
    n_atoms, pressure = 8, 0.01
    volume = (n_atoms + 1) * KT / pressure
    motion = LangevinNPT(5.0, T, friction_time=40.0, pressure=pressure, barostat_time=40.0)
    state, evaluate = started(motion, gases(n_atoms, 150, volume), of(Gas()))
    volumes, pressures = [], []
    for step in range(160):
        state = motion.step(state, evaluate)
        if step > 40:
            volumes.append(state.graph.volume())
            pressures.append(state.pressure())
    assert not state.failed.any()
    volumes = torch.stack(volumes) / volume
    # 150 structures of some five independent samples each: 1.2 % of the mean.
    assert float(volumes.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(volumes.var()) * (n_atoms + 1) == pytest.approx(1.0, abs=0.25)
    # ⟨P_inside⟩ is P for this distribution, where V and momenta are weighed together.
    work = torch.stack(pressures) / pressure * volumes
    assert float(work.mean()) == pytest.approx(n_atoms / (n_atoms + 1), abs=0.05)
    shape = state.graph.cell / state.graph.volume()[:, None, None] ** (1 / 3)
    eye = torch.eye(3, dtype=torch.float64).expand_as(shape)
    assert torch.allclose(shape, eye, atol=1e-9)


def test_a_cell_in_a_full_barostat_shears_but_does_not_turn(pairs):
    motion = LangevinNPT(
        4.0, 100.0, friction_time=50.0, pressure=5 * GPA, barostat="full", barostat_time=400.0
    )
    state = run(motion, [crystal(seed=1), crystal(repeat=(2, 2, 2))], pairs, 30)
    assert not state.failed.any()
    assert torch.allclose(state.strain_rate, state.strain_rate.transpose(1, 2))
    assert float(state.strain_rate.std()) > 0


def test_noise_depends_on_seed_and_step_alone():
    seeds, steps = torch.tensor([7, 8, 7]), torch.tensor([3, 3, 4])
    noise = standard_normal(seeds, steps, torch.tensor([2, 40000, 2]), (3,))
    alone = standard_normal(seeds[2:], steps[2:], torch.tensor([2]), (3,))
    assert torch.equal(noise[-2:], alone)
    assert not torch.equal(noise[:2], noise[-2:])
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.var()) == pytest.approx(1, abs=0.02)


def test_drawn_velocities_have_the_temperature():
    graph = prepare(crystal(repeat=(6, 6, 6)))
    velocities = thermal_velocities(graph, T, torch.tensor([1]))
    state = dataclasses.replace(
        started(INTEGRATORS["nve"], crystal(), of(Gas()))[0],
        graph=graph.replace(velocities=velocities),
        degrees=torch.tensor([3 * graph.n_atoms - 3]),
    )
    assert float(state.temperature()) == pytest.approx(T, rel=0.06)  # 4 σ of 2589 degrees


@pytest.mark.parametrize(
    ("integrator", "atoms", "message"),
    [
        (NoseHoover(), Atoms("Cu"), "nothing can move"),
        (LangevinNPT(), cluster(3), "periodic in three directions"),
        (LangevinNPT(), None, "fixed ones too"),
    ],
)
def test_structures_that_cannot_be_integrated_are_refused(integrator, atoms, message, pairs):
    if atoms is None:
        atoms = crystal()
        atoms.set_constraint(FixAtoms([1]))
    with pytest.raises(StructureError, match=message):
        started(integrator, atoms, pairs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(timestep=-1.0), "timestep must be a positive number"),
        (lambda: Langevin(temperature=-1), "temperature must be a positive number"),
        (lambda: Ramp(300, 600, 0), "n_steps must be a positive number"),
        (lambda: NoseHoover(chain_length=0), "chain_length"),
        (lambda: LangevinNPT(barostat="cubic"), "'isotropic' or 'full'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
