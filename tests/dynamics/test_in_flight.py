"""Streams of structures: what fails leaves with its reason and harms no other."""

import itertools

import numpy as np
import pytest
import torch
from analytic_potentials import Gas, Pairs, Trap, cluster, crystal, of
from ase import Atoms
from ase.constraints import FixAtoms
from small_potential import small_potential

import atomeq
from atomeq.dynamics.cell import FrechetCell
from atomeq.dynamics.evaluator import Evaluator, Failure
from atomeq.dynamics.integrators import NoseHoover, VelocityVerlet
from atomeq.dynamics.optimizers import FIRE, LBFGS
from atomeq.dynamics.run import relax, simulate

FMAX = 0.02
SAME = 1e-8  # Å, eV: the law for float64


@pytest.fixture(scope="module")
def potential():
    return of(Pairs())


def by_index(outcomes):
    return {outcome.index: outcome for outcome in outcomes}


def nan():
    atoms = cluster(4)
    atoms.positions[2, 1] = np.nan
    return atoms


def overlapping():
    atoms = cluster(4)
    atoms.positions[2] = atoms.positions[1]
    return atoms


def test_useless_structures_are_refused_with_their_reason(potential):
    stream = [cluster(4, 1), nan(), overlapping(), Atoms(), cluster(5, 2), "water"]
    outcomes = by_index(atomeq.relax(stream, potential, fmax=FMAX))
    statuses = [outcomes[k].status for k in range(len(stream))]
    assert statuses == ["converged", "refused", "refused", "refused", "converged", "refused"]
    for k, word in ((1, "nan"), (2, "0 Å apart"), (3, "no atoms"), (5, "no file water")):
        assert word in outcomes[k].reason
        assert outcomes[k].atoms is None
    (alone,) = relax(cluster(5, 2), potential, fmax=FMAX)
    assert outcomes[4].energy == pytest.approx(alone.energy, abs=1e-10)


def test_outcomes_hold_their_own_numbers_alone(potential):
    """A view of the batch would keep all that left it together."""
    for outcome in relax([cluster(4, 1), cluster(4, 2)], potential, max_steps=0):
        assert outcome.graph is not None
        for name, value in outcome.graph.to_dict().items():
            assert value.untyped_storage().nbytes() == value.nbytes, name


def test_a_potential_keeps_its_numbers(potential, monkeypatch):
    """What holds an atom is no affair of the potential, which may give the same tensor again."""
    evaluate, kept = Evaluator(potential), []
    answer = evaluate._answer
    monkeypatch.setattr(evaluate, "_answer", lambda *args: kept.append(answer(*args)) or kept[-1])
    held = cluster(4, 1)
    held.set_constraint(FixAtoms([1]))
    found = evaluate(evaluate.prepare(held))
    assert not found.forces[1].any()
    assert kept[0]["forces"][1].any()
    assert torch.equal(kept[0]["forces"][2], found.forces[2])


def test_unknown_elements_are_refused():
    outcomes = by_index(relax([cluster(3), Atoms("He")], small_potential(), max_steps=1))
    assert outcomes[0].status == "not_converged"
    assert "does not know" in outcomes[1].reason


def test_a_structure_that_breaks_leaves_and_the_others_do_not_notice():
    trap = of(Trap())
    doomed = cluster(4, 3)
    doomed.positions[:, 2] += 99.9 - doomed.positions[:, 2].max()
    doomed.set_velocities([[0, 0, 0.3]] * 4)
    doomed.positions[0, 2] += 0.09
    fine = [cluster(4, 1), cluster(5, 2)]
    motion = VelocityVerlet(timestep=2.0, temperature=500.0)
    doomed.set_velocities(np.array([[0.0, 0, 0.5], [0, 0, -0.5], [0, 0, 0], [0, 0, 0]]))
    together = by_index(simulate([fine[0], doomed, fine[1]], trap, motion, n_steps=30))
    assert together[1].status == "failed"
    assert Failure.NO_FORCES.reason in together[1].reason
    assert torch.isfinite(together[1].graph.pos).all()
    apart = by_index(simulate([fine[0], cluster(2), fine[1]], trap, motion, n_steps=30))
    for k in (0, 2):
        assert together[k].status == "completed"
        torch.testing.assert_close(together[k].graph.pos, apart[k].graph.pos, atol=1e-10, rtol=0)


def test_an_explosion_leaves_with_its_reason(potential):
    bomb = Atoms("Cu2", [[0, 0, 0], [0, 0, 0.2]])
    motion = VelocityVerlet(timestep=60.0)
    outcomes = by_index(simulate([bomb, cluster(4)], of(Pairs(depth=50.0)), motion, n_steps=3))
    assert outcomes[0].status == "failed"
    assert "exploded" in outcomes[0].reason


def test_structures_that_do_not_converge_leave_after_the_last_step(potential):
    outcomes = list(relax([cluster(9), cluster(2)], potential, fmax=1e-6, max_steps=5))
    assert {outcome.status for outcome in outcomes} == {"not_converged"}
    assert all("after 5 steps" in outcome.reason for outcome in outcomes)


def test_an_endless_stream_is_taken_as_there_is_room(potential):
    taken = []

    def stream():
        for k in itertools.count():
            taken.append(k)
            yield cluster(3 + k % 4, k)

    ids = (f"cluster {k}" for k in itertools.count())
    outcomes = relax(stream(), potential, fmax=FMAX, max_edges=60, ids=ids)
    first = [next(outcomes) for _ in range(8)]
    assert len(taken) < 24
    assert all(outcome.id == f"cluster {outcome.index}" for outcome in first)


def test_atoms_without_neighbours_need_room_as_well():
    taken = []

    def stream():
        for k in itertools.count():
            taken.append(k)
            yield Atoms("Cu2", [[0, 0, 0], [0, 0, 30.0 + k]])

    next(relax(stream(), of(Gas()), max_edges=60))
    assert len(taken) <= 31


def test_a_batch_never_exceeds_the_edges_that_are_allowed(potential):
    evaluate = Evaluator(potential)
    seen = []
    list(
        relax(
            [cluster(n, n) for n in (4, 5, 6, 4, 5)],
            evaluate,
            max_edges=40,
            max_steps=3,
            observe=lambda state, indices: seen.append((len(indices), int(evaluate.n_edges.sum()))),
        )
    )
    assert max(n_edges for _, n_edges in seen) <= 40
    assert max(n_systems for n_systems, _ in seen) > 1


def test_a_structure_beyond_the_limit_is_too_large(potential):
    outcomes = by_index(relax([cluster(3), crystal()], potential, max_edges=50, fmax=FMAX))
    assert outcomes[0].status == "converged"
    assert outcomes[1].status == "too_large"
    assert "max_edges=50" in outcomes[1].reason


class Cursed(Pairs):
    """Pairs, with NaN for a structure with gold in it, once its atoms have moved from where."""

    def forward(self, graph):
        energies = super().forward(graph)["energies"]
        cursed = (graph.atomic_numbers == 79) & (energies.abs() > 0)
        return {"energies": torch.where(cursed & self.moved(graph), torch.nan, energies)}

    @staticmethod
    def moved(graph):
        return graph.pos.norm(dim=1) > 1e-2


RELAXATIONS = {
    "fire": FIRE(),
    "lbfgs": LBFGS(),
    "fire with cell": FIRE(cell=FrechetCell()),
    "lbfgs with cell": LBFGS(cell=FrechetCell()),
}


def companions(name):
    """Return two structures that relax, one of them with fixed atoms where that is allowed."""
    if "cell" in name:
        return [crystal(seed=1), crystal(seed=2, a=3.5)]
    held = cluster(7, 2)
    held.set_constraint(FixAtoms([0, 3]))
    return [cluster(5, 1), held]


@pytest.mark.parametrize("name", RELAXATIONS)
def test_a_structure_that_breaks_leaves_a_relaxation_and_the_others_do_not_notice(name):
    potential, fine = of(Cursed()), companions(name)
    doomed = fine[0].copy()
    doomed.numbers[0], doomed.positions[:] = 79, doomed.positions - doomed.positions[0]
    options = {"optimizer": RELAXATIONS[name], "fmax": FMAX, "max_steps": 25}
    together = by_index(relax([fine[0], doomed, fine[1]], potential, **options))
    assert together[1].status == "failed"
    assert Failure.NO_FORCES.reason in together[1].reason
    assert torch.isfinite(together[1].graph.pos).all()
    for k, atoms in ((0, fine[0]), (2, fine[1])):
        (alone,) = relax(atoms, potential, **options)
        assert (together[k].status, together[k].n_steps) == (alone.status, alone.n_steps)
        for field in ("pos", "cell", "energy"):
            torch.testing.assert_close(
                together[k].graph[field], alone.graph[field], atol=SAME, rtol=0
            )


class Cramped(Pairs):
    """Runs out of memory, as torch says it on a CPU, above a number of edges."""

    def __init__(self, max_edges=40):
        super().__init__()
        self.max_edges = max_edges

    def forward(self, graph):
        if graph.n_edges > self.max_edges:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return super().forward(graph)


def test_a_batch_is_halved_when_memory_runs_out(potential):
    structures = [cluster(n, n) for n in (4, 5, 6, 4, 20, 5)]
    cramped = by_index(relax(structures, of(Cramped()), fmax=FMAX))
    roomy = by_index(relax(structures, potential, fmax=FMAX))
    assert cramped[4].status == "too_large"
    assert "memory" in cramped[4].reason
    for k in (0, 1, 2, 3, 5):
        assert cramped[k].status == "converged"
        assert cramped[k].n_steps == roomy[k].n_steps
        assert cramped[k].energy == pytest.approx(roomy[k].energy, abs=1e-10)


@pytest.mark.parametrize("name", [*list(RELAXATIONS)[1:], "motion"])
def test_batches_of_every_kind_are_halved_when_memory_runs_out(name, potential):
    structures = [atoms for _ in range(2) for atoms in companions(name)]
    # Room for one and a half of the largest structure, which grows denser on the way.
    room = int(1.5 * max(potential.build_graph(atoms).n_edges for atoms in structures))

    def run(of_potential):
        if name == "motion":
            motion = NoseHoover(2.0, 300.0)
            return by_index(simulate(structures, of_potential, motion, n_steps=8, seed=1))
        optimizer = RELAXATIONS[name]
        return by_index(
            relax(structures, of_potential, optimizer=optimizer, fmax=FMAX, max_steps=8)
        )

    cramped, roomy = run(of(Cramped(room))), run(potential)
    assert cramped.keys() == roomy.keys()
    for k, outcome in roomy.items():
        assert (cramped[k].status, cramped[k].n_steps) == (outcome.status, outcome.n_steps)
        torch.testing.assert_close(cramped[k].graph.pos, outcome.graph.pos, atol=SAME, rtol=0)


def test_other_errors_are_not_taken_for_lack_of_memory():
    class Wrong(Pairs):
        def forward(self, graph):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(relax([cluster(3)], of(Wrong())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "bfgs"}, "'fire' or 'lbfgs'"),
        ({"fmax": 0.0}, "fmax must be positive"),
        ({"max_edges": 0}, "max_edges must be at least 1"),
        ({"restart": True}, "restart needs the folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, potential):
    with pytest.raises(ValueError, match=message):
        relax([cluster(3)], potential, **options)


@pytest.mark.gpu
def test_cuda_relaxes_alike_and_learns_its_budget(potential):
    structures = [cluster(3 + k % 9, k) for k in range(40)]
    ours = by_index(relax(structures, of(Pairs()).to("cuda"), fmax=FMAX))
    theirs = by_index(relax(structures, potential, fmax=FMAX))
    for k, outcome in ours.items():
        assert outcome.status == theirs[k].status
        assert outcome.energy == pytest.approx(theirs[k].energy, abs=1e-6)
