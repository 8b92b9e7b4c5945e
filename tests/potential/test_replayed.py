"""What was sent is sent again: not a bit of a result changes, and what cannot be repeated is not.

A recording is of one number of edges, and with a second one of any; two results prove it.
"""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from analytic_potentials import Pairs
from ase import Atoms
from ase.build import bulk
from small_models import SMALL_MODELS
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn.radial_tables import exact_radial_functions
from atomeq.potential import replayed as _replayed
from atomeq.potential.captured import Captured, Results
from atomeq.potential.checkpoint import build_model, load_potential, scatter_weights
from atomeq.potential.potential import Potential
from atomeq.potential.replayed import Recorder, Replayed
from atomeq.potential.repulsion import ZBL
from atomeq.typing import PropertyKey

ALL: tuple[PropertyKey, ...] = ("energy", "energies", "forces", "stress")
NOT_REPLAYED = {"escn published", "geometric_algebra", "faenet", "ponita", "equihgnn"}


def moving(seed: int = 0, *, a: float = 3.55, by: float = 0.03) -> Iterator[Atoms]:
    """Copper whose second neighbours come and go at 3.5 Å."""
    random, atoms = np.random.default_rng(seed), bulk("Cu", cubic=True, a=a) * (2, 1, 1)
    while True:
        yield atoms.copy()
        atoms.positions += random.normal(scale=by, size=(8, 3))


def graphs_of(potential: Potential, n: int, **options) -> list[AtomGraph]:
    structures = moving(**options)
    return [potential.build_graph(next(structures)) for _ in range(n)]


def replayed(model) -> Replayed:
    return Replayed(Potential(model).requires_grad_(False).eval())


def replays_of(answer: Replayed, graphs: list[AtomGraph]) -> int:
    for graph in graphs:
        answer(graph, ALL)
    assert answer.n_replays
    return answer.n_replays


@pytest.fixture(autouse=True)
def _models_of_tests_count_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _replayed, "_KNOWN", _replayed._KNOWN | {Pairs.__module__, __name__.partition(".")[0]}
    )


def assert_bits(found: Results, truth: Results) -> None:
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_no_bit_of_any_model_changes_while_edges_come_and_go(name: str) -> None:
    potential = Potential(build_model(SMALL_MODELS[name]))
    scatter_weights(potential)
    potential = potential.to(torch.float32).requires_grad_(False).eval()
    answer, graphs = Replayed(potential), graphs_of(potential, 10)
    assert len({graph.n_edges for graph in graphs[2:7]}) > 1
    wanted = ALL if potential.gives_stress else ALL[:-1]
    for graph in graphs:
        assert_bits(answer(graph, wanted), potential(graph, wanted))
    assert (answer.n_replays > 0) == (name not in NOT_REPLAYED)


def test_the_shipped_potential_with_terms_tables_and_uncertainty_is_replayed() -> None:
    potential = load_potential("cu-pbe").requires_grad_(False)
    wanted = (*ALL, *potential.uncertainties)
    assert len(wanted) > len(ALL)
    answer = Replayed(potential)
    for graph in graphs_of(potential, 9, a=3.6):
        assert_bits(answer(graph, wanted), potential(graph, wanted))
    assert answer.n_replays
    with exact_radial_functions():  # another way to compute, and another recording
        assert_bits(answer(graph, wanted), potential(graph, wanted))


def test_other_weights_elements_and_cells_are_those_of_the_answer() -> None:
    potential = small_potential().requires_grad_(False)
    answer = Replayed(potential)
    graphs = graphs_of(potential, 12)
    for graph in graphs[:8]:
        answer(graph, ALL)
    before = answer.n_replays
    assert before
    alloy = potential.build_graph(
        Atoms("Cu2Al6", graphs[8].pos.numpy(), cell=graphs[8].cell[0].numpy(), pbc=True)
    )
    for _ in range(8):
        assert_bits(answer(alloy, ALL), potential(alloy, ALL))
    strained = graphs[9].replace(cell=graphs[9].cell * 1.01, pos=graphs[9].pos * 1.01)
    assert_bits(answer(strained, ALL), potential(strained, ALL))
    with torch.no_grad():
        next(potential.parameters()).mul_(1.5)
    assert_bits(answer(graphs[10], ALL), potential(graphs[10], ALL))
    potential.add_terms([ZBL(2.0)])
    assert_bits(answer(graphs[11], ALL), potential(graphs[11], ALL))


class ByNumPy(Pairs):
    """Looks at positions where no operation is seen: a recording would keep what they were."""

    def forward(self, graph):
        shift = float(graph.pos.detach().numpy()[:, 0].mean())
        return {"energies": super().forward(graph)["energies"] + shift}


class Asking(Pairs):
    """Takes another way where two atoms are close."""

    def forward(self, graph):
        energies = super().forward(graph)["energies"]
        lengths = graph.edge_vectors().norm(dim=1)
        return {"energies": energies + 1.0 if bool((lengths < 2.0).any()) else energies}


class Sorting(Pairs):
    """Has a tensor whose size no one knows beforehand."""

    def forward(self, graph):
        energies = super().forward(graph)["energies"]
        far = (graph.pos[:, 0] > 1.0).nonzero()[:, 0]
        return {"energies": energies.index_add(0, far, torch.ones_like(energies)[far])}


class Throwing(Pairs):
    """Is not the same twice."""

    def forward(self, graph):
        return {"energies": super().forward(graph)["energies"] * (1 + torch.rand(()))}


def test_models_of_others_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they count through NumPy would stay what it was when two results were compared."""
    monkeypatch.setattr(_replayed, "_KNOWN", {"atomeq", "torch"})
    answer = replayed(Pairs())
    for graph in graphs_of(answer.potential, 12):
        answer(graph, ALL)
    assert answer.n_replays == 0


@pytest.mark.parametrize("model", [ByNumPy, Sorting])
def test_what_is_seen_by_no_recording_is_not_replayed(model: Callable[[], Pairs]) -> None:
    answer = replayed(model())
    for graph in graphs_of(answer.potential, 12):
        assert_bits(answer(graph, ALL), answer.potential(graph, ALL))
    assert answer.n_replays == 0


def test_chance_is_not_replayed() -> None:
    answer = replayed(Throwing())
    graph = graphs_of(answer.potential, 1)[0]
    energies = {float(answer(graph, ("energy",))["energy"]) for _ in range(12)}
    assert len(energies) == 12
    assert answer.n_replays == 0


def test_another_way_than_the_recorded_one_is_the_potential_s_own() -> None:
    answer = replayed(Asking())
    graphs = graphs_of(answer.potential, 10)
    before = replays_of(answer, graphs)
    pos = graphs[-1].pos.clone()
    pos[1] = pos[0] + torch.tensor([0.9, 0.9, 1.0])
    close = answer.potential.build_graph(graphs[-1].replace(pos=pos, edge_index=None))
    assert_bits(answer(close, ALL), answer.potential(close, ALL))
    assert answer.n_replays == before


def test_a_short_distance_is_told_of_and_a_flat_cell_refused_by_a_replay(caplog) -> None:
    potential = load_potential("cu-pbe").requires_grad_(False)
    answer, graphs = Replayed(potential), graphs_of(load_potential("cu-pbe"), 9, a=3.6)
    replays_of(answer, graphs)
    pos = graphs[-1].pos.clone()
    pos[1] = pos[0] + torch.tensor([0.0, 0.0, 0.3])
    close = potential.build_graph(graphs[-1].replace(pos=pos, edge_index=None))
    assert_bits(answer(close, ALL), potential(close, ALL))
    assert "less than the" in caplog.text
    with pytest.raises(ValueError, match="stress needs a cell"):
        answer(graphs[-1].replace(cell=torch.zeros_like(close.cell)), ALL)


def test_positions_that_are_differentiated_stay_on_the_tape() -> None:
    answer = replayed(Pairs())
    *graphs, last = graphs_of(answer.potential, 9)
    for graph in graphs:
        answer(graph, ("energy",))
    assert answer.n_replays
    pos = last.pos.requires_grad_()
    assert answer(last, ("energy",))["energy"].requires_grad
    assert torch.autograd.grad(answer(last, ("energy",))["energy"].sum(), pos)[0].any()


def test_calculators_replay_share_threads_and_can_be_told_not_to(monkeypatch) -> None:
    structures = moving(1)
    some = [next(structures) for _ in range(40)]
    calculators = [AtomeqCalculator(small_potential(), capture=one) for one in (True, False)]
    found: dict[tuple[int, int], np.ndarray] = {}

    def run(which: int, first: int) -> None:
        for k in range(first, first + 20):
            atoms = some[k].copy()
            atoms.calc = calculators[which]
            found[which, k] = atoms.get_forces()

    threads = [threading.Thread(target=run, args=(0, first)) for first in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(0, 0)
    run(1, 0)
    run(1, 20)
    assert all(np.array_equal(found[0, k], found[1, k]) for k in range(40))
    on_cpu = [one._committee._answer[0]._on_cpu for one in calculators]
    assert on_cpu[0].n_replays
    assert not on_cpu[1].n_replays
    for other in (copy.deepcopy(calculators[1]), pickle.loads(pickle.dumps(calculators[1]))):
        assert not other._committee._answer[0]._on_cpu.wanted
    monkeypatch.setenv("ATOMEQ_CAPTURE", "0")
    assert not Captured(small_potential())._on_cpu.wanted


def test_to_record_does_not_load_torch_s_compiler() -> None:
    """Which takes a second: torch wraps the method of a mode in what does, if it is let."""
    assert not hasattr(Recorder.__torch_dispatch__, "__wrapped__")
