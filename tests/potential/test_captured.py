"""Launches are recorded on padded graphs: what ghosts change, when one is made, what is replayed.

A CUDA graph runs the same launches again on the same tensors; here a closure does.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from small_potential import small_potential
from structures import RATTLED

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential import captured
from atomeq.potential.captured import Captured, Padded, Results, Sizes
from atomeq.potential.checkpoint import untrained_potential
from atomeq.potential.compiled import graph_fields
from atomeq.potential.potential import Potential
from atomeq.potential.repulsion import ZBL
from atomeq.typing import PropertyKey

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
ALL: tuple[PropertyKey, ...] = ("energy", "energies", "forces", "stress")
SAME = 1e-12  # of the largest number, in double precision


class Again:
    """Calls a function again and writes what it finds where the results were, as a replay does."""

    def __init__(self, compute: Callable[[], Results]) -> None:
        self._compute = compute
        self._results = compute()

    def replay(self) -> Results:
        for key, value in self._compute().items():
            self._results[key].copy_(value)
        return self._results


def replayed(potential: Potential, **options: Any) -> Captured:
    return Captured(potential.requires_grad_(False), record=Again, **options)


def crystal(seed: int = 0, *, factor: float = 1.0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array * factor, scale_atoms=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def assert_same(found: Results, truth: Results) -> None:
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        assert found[key].shape == value.shape
        assert found[key].dtype == value.dtype
        scale = max(1.0, float(value.abs().max()))
        assert float((found[key] - value).abs().max()) <= SAME * scale, key


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ghosts_change_nothing_of_any_model(config: Path) -> None:
    potential = untrained_potential(config)
    answer = replayed(potential)
    graph = potential.build_graph([RATTLED[name]() for name in ("crystal", "slab")])
    if not potential.model.recordable or graph.get("hyperedge_index") is not None:
        assert answer.refusal is not None
        return
    truth = potential(graph, ALL)
    found = [answer(graph, ALL) for _ in range(4)]
    assert answer.n_recordings == 1
    for one in found:
        assert_same(one, truth)


def test_padded_graphs_have_all_they_are_measured_for() -> None:
    """Sizes, order of edges and structures, whatever the numbers; ghosts see themselves alone."""
    potential = small_potential()
    sizes = [(1, 1, 0), (4, 1, 64), (9, 3, 65), (40, 17, 1000), (7, 7, 8191)]
    for n_atoms, n_graphs, n_edges in sizes:
        natoms = torch.ones(n_graphs, dtype=torch.int64)
        natoms[0] += n_atoms - n_graphs
        targets = torch.arange(n_edges) * n_atoms // max(1, n_edges)
        graph = AtomGraph(
            torch.randn(n_atoms, 3, dtype=torch.float64),
            torch.full((n_atoms,), 13),
            natoms=natoms,
            edge_index=torch.stack([targets, targets]),
            cell_offsets=torch.zeros(n_edges, 3, dtype=torch.int64),
        )
        padded = Padded(graph, graph_fields(potential.model), cutoff=4.0)
        padded.write(graph)
        whole, of = padded.graph, Sizes.around(graph)
        assert (whole.n_atoms, whole.n_graphs, whole.n_edges) == of
        assert of.edges - n_edges <= captured._step(of.edges, captured._LEAST)
        assert torch.equal(torch.bincount(whole.batch, minlength=of.graphs), whole.natoms)
        assert (whole.natoms > 0).all()
        assert (whole.batch.diff() >= 0).all()
        source, target = whole.edge_index
        assert (target.diff() >= 0).all()
        ghosts = target[n_edges:]
        assert torch.equal(source[n_edges:], ghosts)
        assert (ghosts >= n_atoms).all()
        assert not len(ghosts) or ghosts.bincount().max() <= captured._PER_GHOST
        lengths = whole.edge_vectors()[n_edges:].norm(dim=1)
        assert torch.allclose(lengths, torch.tensor(3.6, dtype=torch.float64))
        assert torch.equal(whole.pos[:n_atoms], graph.pos)


def test_a_recording_follows_the_numbers_and_its_results_are_its_callers() -> None:
    potential = small_potential()
    answer = replayed(potential)
    graphs = [potential.build_graph(crystal(seed)) for seed in range(5)]
    found = [answer(graph, ALL) for graph in graphs]
    assert answer.n_recordings == 1
    for graph, one in zip(graphs, found, strict=True):
        assert_same(one, potential(graph, ALL))
    assert not any(value.requires_grad for value in found[-1].values())


def test_what_is_outgrown_is_recorded_anew_and_both_are_kept() -> None:
    potential = small_potential()
    answer = replayed(potential)
    large, small = crystal(1), crystal(2, factor=0.8)  # more neighbours within the cutoff
    for atoms in (*[large] * 4, *[small] * 4, large, small):
        graph = potential.build_graph(atoms)
        assert_same(answer(graph, ALL), potential(graph, ALL))
    assert answer.n_recordings == 2


def test_batches_of_other_structures_share_a_recording() -> None:
    """Structures leave and enter; the sizes of the padded graph are the same."""
    potential = small_potential()
    answer = replayed(potential)
    batches = [[crystal(k), crystal(k + 1), molecule] for k, molecule in enumerate(_dimers(4))]
    batches.append([batches[0][2], batches[0][0], batches[1][1]])
    for batch in batches:
        graph = potential.build_graph(batch)
        assert_same(answer(graph, ALL[:3]), potential(graph, ALL[:3]))
    assert answer.n_recordings == 1


def _dimers(n: int) -> list[Atoms]:
    return [Atoms("CuAl", [[0.0, 0.0, 0.0], [0.0, 0.1 * k, 2.5]]) for k in range(n)]


def test_other_weights_other_properties_and_other_precision_are_other_recordings() -> None:
    potential = small_potential()
    answer = replayed(potential)
    graph = potential.build_graph(crystal())
    for _ in range(4):
        answer(graph, ("energy", "forces"))
    for _ in range(4):
        answer(graph, ALL)
    assert answer.n_recordings == 2
    potential.precision = "high"
    for _ in range(4):
        answer(graph, ALL)
    assert answer.n_recordings == 3
    with torch.no_grad():
        for weight in potential.parameters():
            weight.mul_(1.1)
    assert_same(answer(graph, ALL), potential(graph, ALL))


def test_what_changes_all_the_time_is_not_recorded() -> None:
    potential = small_potential()
    answer = replayed(potential)
    for n in (1, 2, 1, 2, 1, 2):
        answer(potential.build_graph([crystal()] * 8 * n), ALL)
    assert answer.n_recordings == 0


def test_a_recording_that_fails_is_said_once_and_the_potential_answers(caplog) -> None:
    def failing(compute: Callable[[], Results]) -> Again:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    potential = small_potential().requires_grad_(False)
    answer = Captured(potential, record=failing)
    graph = potential.build_graph(crystal())
    for _ in range(5):
        assert_same(answer(graph, ALL), potential(graph, ALL))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "operation not permitted when stream is capturing" in said[0]
    assert answer.refusal is not None


def test_it_says_why_it_does_not_record(monkeypatch: pytest.MonkeyPatch) -> None:
    potential = small_potential().requires_grad_(False)
    assert Captured(potential).refusal == "it serves on CUDA alone"
    assert replayed(potential, wanted=False).refusal == "it is not wanted"
    assert replayed(potential).refusal is None
    assert replayed(copy.deepcopy(potential).train()).refusal == "it may be trained"
    potential.add_terms([ZBL(0.65)])
    assert replayed(potential).refusal is None
    monkeypatch.setenv("ATOMEQ_CAPTURE", "0")
    assert replayed(potential).refusal == "it is not wanted"


def test_repulsion_of_nuclei_is_recorded_too() -> None:
    potential = small_potential()
    potential.add_terms([ZBL(1.0)])
    answer = replayed(potential)
    graph = potential.build_graph(crystal(factor=0.75))
    for _ in range(4):
        assert_same(answer(graph, ALL), potential(graph, ALL))
    assert answer.n_recordings == 1


def test_a_motion_by_replays_is_the_same_motion(monkeypatch: pytest.MonkeyPatch) -> None:
    potential, integrator, ends = small_potential(), VelocityVerlet(2.0, temperature=900.0), []
    for record in (None, Again):
        evaluate = Evaluator(potential)
        if record is not None:
            evaluate._answer = Captured(evaluate.potential, record=record)
        state = integrator.init(evaluate.prepare([crystal(1), crystal(2)]), evaluate)
        for _ in range(12):
            state = integrator.step(state, evaluate)
        ends.append(state.graph)
        assert (evaluate._answer.n_recordings > 0) == (record is not None)
    assert float((ends[0].pos - ends[1].pos).abs().max()) <= 1e-10


def test_calculators_can_be_copied_and_sent_with_their_choice() -> None:
    calculator = AtomeqCalculator(small_potential(), capture=False)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert other._committee.capture is False
        assert other._committee._answer[0].refusal == "it is not wanted"
        assert other._committee._answer[0].potential is other.potential


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_cuda_graph_gives_what_launches_give(config: Path) -> None:
    potential = untrained_potential(config).to("cuda")
    answer = Captured(potential)
    if answer.refusal is not None:
        pytest.skip(answer.refusal)
    for seed in range(5):
        structures = [RATTLED[name]() for name in ("crystal", "slab")]
        structures[1].rattle(0.02, seed=seed)
        graph = potential.build_graph(structures)
        found, truth = answer(graph, ALL), potential(graph, ALL)
        for key, value in truth.items():  # sums on a GPU are in no fixed order
            scale = max(1.0, float(value.abs().max()))
            assert float((found[key] - value).abs().max()) <= 1e-9 * scale, key
    assert answer.refusal is None
    assert answer.n_recordings > 0


def test_a_charge_is_refused_before_a_replay() -> None:
    potential = small_potential()
    answer = replayed(potential)
    graph = potential.build_graph(crystal())
    for _ in range(4):
        answer(graph, ("energy",))
    charged = graph.replace(charge=torch.tensor([1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="total charge 1"):
        answer(charged, ("energy",))
