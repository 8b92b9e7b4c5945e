"""Bars of force training with eSCN on copper: a step beside energy and forces, and beside MACE's.

CPU seconds of one process on one thread: both sides take turns, and a ratio is the median of the
turns' ratios. A step is energy and forces, a loss on both and its gradient by all weights, of two
rattled crystals of 108 atoms. The peer is mace-torch, whose Python benchmarks/mace.py describes;
without it its row says so.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
import yaml
from ase import Atoms
from ase.build import bulk
from torch import Tensor, nn

from atomeq.models.base import AtomisticModel
from atomeq.models.escn import ESCN
from atomeq.potential.checkpoint import build_model
from atomeq.potential.potential import Potential
from benchmarks import mace
from benchmarks.judged import Judged
from benchmarks.record import ROOT

CUTOFF = 5.0
#: Of 99 thousand parameters, about as many as MACE 24x0e+24x1o has.
SMALL = {"sphere_channels": 20, "hidden_channels": 24, "edge_channels": 32}
STEP = "training step / energy and forces, eSCN of cu-pbe, 2 x 108 Cu"
BESIDE = "training step of MACE 24x0e+24x1o / of eSCN with 99 k parameters, 2 x 108 Cu"

Call = Callable[[], object]


def bars(quick: bool) -> Iterable[Judged]:
    """Measure a step of training beside energy and forces, and beside the peer's."""
    turns = 5 if quick else 15
    config = yaml.safe_load((ROOT / "configs/experiment/cu_pbe.yaml").read_text(encoding="utf-8"))
    forces, step = work(build_model(config["model"]["model"]))
    yield Judged.at_most(STEP, ratio(step, forces, turns), 3.3)
    if not find_spec("mace"):
        yield Judged(BESIDE, "mace-torch is not here: see benchmarks/mace.py", ">= 1.7")
        return
    _, ours = work(ESCN(CUTOFF, num_layers=2, **SMALL))
    yield Judged.at_least(BESIDE, ratio(their_step(), ours, turns), 1.7)


def ratio(one: Call, other: Call, turns: int) -> float:
    """Return the CPU seconds of one call over those of the other."""
    for call in (one, other):
        call()
    return statistics.median(_seconds(one) / _seconds(other) for _ in range(turns))


def crystals() -> list[Atoms]:
    """Return two rattled crystals of copper."""
    found = [bulk("Cu", cubic=True).repeat(3) for _ in range(2)]
    for seed, atoms in enumerate(found):
        atoms.rattle(0.05, seed=seed)
    return found


def loss(energy: Tensor, forces: Tensor) -> Tensor:
    """Return an error whose gradient is zero nowhere."""
    return (energy / len(forces)).square().sum() + (forces - 1).square().mean()


def work(model: AtomisticModel) -> tuple[Call, Call]:
    """Return energy and forces of our potential, and a step as AtomisticTask does it."""
    torch.manual_seed(0)
    potential = Potential(model.float())
    for parameter in potential.parameters():
        if not parameter.any():  # networks start at no energy
            nn.init.normal_(parameter, std=0.1)
    graph, trained = potential.build_graph(crystals()), list(potential.parameters())

    def forces() -> None:
        potential.eval()(graph, ("energy", "forces"))

    def step() -> None:
        potential.train().zero_grad()
        found = potential(graph, ("energy", "forces"), create_graph=True)
        loss(found["energy"], found["forces"]).backward(inputs=trained)

    return forces, step


def their_step() -> Call:
    """Return the peer's step."""
    potential = mace.reference_model("24x0e+24x1o", (29,), 42.0)
    batch = mace.batch_of(crystals(), (29,))

    def step() -> None:
        potential.zero_grad()
        found = potential(dict(batch), training=True, compute_force=True)
        loss(found["energy"], found["forces"]).backward()

    return step


def _seconds(call: Call) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin
