"""How often a step of motion waits for the device: counted on a CPU whose arrays are tensors."""

from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from fake_device import is_question
from small_potential import small_potential
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atomeq.dynamics import evaluator, state
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import Bussi, Integrator, Langevin, NoseHoover, VelocityVerlet
from atomeq.graph import moving
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential import distances


class Questions(TorchDispatchMode):
    """Counts how often the host would have to wait for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Count an operation; bincount looks for the largest, and repeats are counted."""
        name = func.overloadpacket.__name__
        repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if is_question(func, args) or name == "bincount" or repeats:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def structures() -> list[Atoms]:
    crystal, cluster = bulk("Cu", cubic=True) * (2, 1, 1), bulk("Al", cubic=True)
    cluster.pbc = False
    cluster.cell = None
    for atoms in (crystal, cluster):
        atoms.rattle(0.05, seed=1)
    return [crystal, cluster]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Questions:
    monkeypatch.setattr(moving, "uses_numpy", lambda device: False)
    # Of a GPU it is not asked either.
    monkeypatch.setattr(AtomGraph, "_without_images", lambda graph: False)
    for module in (evaluator, state, distances):
        monkeypatch.setattr(module, "known_to_the_host", lambda tensor: False)
    questions, tolist = Questions(), Tensor.tolist

    def counted(tensor: Tensor) -> Any:  # of a CPU's tensors it is no operation
        questions.names.append("tolist")
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return questions


#: Beside the one look at neighbours there is the potential's, for distances that it does not know;
#: and noise is drawn by seed and step, which the host has to read.
@pytest.mark.parametrize(
    ("integrator", "most"),
    [(VelocityVerlet(), 2), (NoseHoover(), 2), (Langevin(), 3), (Bussi(), 3)],
    ids=["VelocityVerlet", "NoseHoover", "Langevin", "Bussi"],
)
def test_a_step_hardly_waits_for_the_device(
    integrator: Integrator, most: int, asked: Questions
) -> None:
    evaluate = Evaluator(small_potential())
    begun = integrator.init(evaluate.prepare(structures()), evaluate)
    settled = integrator.step(begun, evaluate)  # as lists are
    asked.names.clear()
    with asked:
        integrator.step(settled, evaluate)
    assert len(asked.names) <= most, asked.names


def test_steps_with_one_question_are_those_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions after steps of which some renew lists, whichever way edges are found."""
    integrator, found, quick = VelocityVerlet(timestep=4.0, temperature=2000.0), [], []
    settled = moving.MovingNeighbors.settled

    def counted(self, graph, fine):
        quick.append(settled(self, graph, fine))
        return quick[-1]

    monkeypatch.setattr(moving.MovingNeighbors, "settled", counted)
    for numpy in (True, False):
        monkeypatch.setattr(moving, "uses_numpy", lambda device, numpy=numpy: numpy)
        quick.clear()
        evaluate = Evaluator(small_potential(), skin=0.5)
        moving_on = integrator.init(evaluate.prepare(structures()), evaluate)
        for _ in range(20):
            moving_on = integrator.step(moving_on, evaluate)
        found.append(moving_on.graph)
    assert torch.equal(found[0].pos, found[1].pos)
    assert torch.equal(found[0].forces, found[1].forces)
    hits = [edges is not None for edges in quick]
    assert any(hits)
    assert not all(hits[2:])  # some lists became stale on the way
    assert evaluate._neighbors is not None
    assert evaluate._neighbors.n_searches > 1
