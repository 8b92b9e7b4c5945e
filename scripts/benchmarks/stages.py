"""Where the CPU time of a model goes: its modules and functions are clocked from outside.

A stage has what is spent inside it and in no stage further in, so the stages add up to the whole.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import atomeq.models.escn_published
import atomeq.models.spherical
import atomeq.nn.attention
import atomeq.nn.edge_convolution
import atomeq.nn.edge_network
from atomeq.models.escn import GatedUpdate
from atomeq.models.escn_published import GridUpdate, PointNetwork, SO2Block, SumNetwork
from atomeq.models.transformer import TransformerBlock
from atomeq.nn.activations import ScalarsAndSphere
from atomeq.nn.attention import EquivariantAttention
from atomeq.nn.edge_network import DegreeEmbedding, EdgeNetwork
from atomeq.nn.feed_forward import FeedForward
from atomeq.nn.mlp import MLP
from atomeq.nn.norms import EquivariantLayerNorm, EquivariantRMSNorm, SeparableLayerNorm
from atomeq.nn.radial import BesselBasis, GaussianBasis
from atomeq.nn.so3 import Gate, SO2Convolution
from atomeq.nn.sphere import SphereActivation

#: What is inside a module of one of these stages belongs to it, whatever else it is.
WHOLE: dict[str, tuple[type[nn.Module], ...]] = {
    "SO(2) maps": (SO2Convolution, SO2Block),
    "radial networks": (EdgeNetwork, SumNetwork, BesselBasis, GaussianBasis, MLP),
    "edge activation": (SphereActivation, ScalarsAndSphere, Gate),
    "atom update": (FeedForward, GridUpdate, GatedUpdate),
    "norms": (EquivariantLayerNorm, EquivariantRMSNorm, SeparableLayerNorm),
    "heads": (PointNetwork,),
}
#: These have stages inside.
AROUND: dict[str, tuple[type[nn.Module], ...]] = {
    "attention": (EquivariantAttention,),
    "embedding": (DegreeEmbedding,),
    "residuals": (TransformerBlock,),
}
#: Functions by the modules that call them.
FUNCTIONS = {
    "rotations": [
        (atomeq.nn.attention, "rotate_to_edge"),
        (atomeq.nn.attention, "rotate_from_edge"),
        (atomeq.nn.edge_convolution, "rotate_to_edge"),
        (atomeq.nn.edge_convolution, "rotate_from_edge"),
        (atomeq.nn.edge_network, "rotate_from_edge"),
        (atomeq.models.escn_published, "rotate_to_edge"),
        (atomeq.models.escn_published, "rotate_from_edge"),
    ],
    "SO(2) maps": [(SO2Block, "sum_of_maps")],
    "whole edge layer": [(atomeq.nn.edge_convolution, "escn_conv")],
    "attention": [(atomeq.nn.attention, "segment_softmax")],
    "edge frames": [
        (atomeq.models.spherical, "build_edge_frame"),
        (atomeq.models.escn_published, "build_edge_frame"),
    ],
}


class StageClock:
    """CPU seconds by stage; a stage that is entered stops the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stages = ["rest"]
        self._last = time.process_time()

    def enter(self, stage: str) -> None:
        """Start a stage."""
        self._charge()
        self._stages.append(stage)

    def leave(self) -> None:
        """Go on with the stage around."""
        self._charge()
        self._stages.pop()

    def clocked(self, function: Callable, stage: str) -> Callable:
        """Return a function whose calls are a stage."""

        def call(*given: Any, **options: Any) -> Any:
            self.enter(stage)
            try:
                return function(*given, **options)
            finally:
                self.leave()

        return call

    def _charge(self) -> None:
        now = time.process_time()
        stage = self._stages[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


@contextmanager
def clocked(model: nn.Module) -> Iterator[StageClock]:
    """Clock what a model computes inside the context."""
    clock = StageClock()
    with ExitStack() as stack:
        for stage, module in _staged(model):
            before = module.register_forward_pre_hook(lambda *_, stage=stage: clock.enter(stage))
            after = module.register_forward_hook(lambda *_: clock.leave())
            stack.callback(before.remove)
            stack.callback(after.remove)
        for stage, places in FUNCTIONS.items():
            for owner, name in places:
                function = clock.clocked(getattr(owner, name), stage)
                stack.enter_context(patch.object(owner, name, function))
        clock.enter("rest")
        yield clock
        clock.leave()


def stage_shares(potential: Any, structures: Any) -> dict[str, float]:
    """Return the share of each stage in energy and forces of structures, the largest first."""
    with clocked(potential.model) as clock, torch.no_grad():
        clock.enter("graph")
        graph = potential.build_graph(structures)
        clock.leave()
        potential(graph)
    total = sum(clock.seconds.values())
    shares = {stage: seconds / total for stage, seconds in clock.seconds.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _staged(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the modules that are stages; below one that is a whole, none is."""
    taken: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in taken):
            continue
        for stage, kinds in (WHOLE | AROUND).items():
            if isinstance(module, kinds):
                yield stage, module
                if stage in WHOLE:
                    taken.append(path)
