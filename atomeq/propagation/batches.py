"""Batches of systems of equal size: features of a whole set at once, one edge index for all."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from atomeq.propagation.nbody import Trajectories
from atomeq.propagation.particles import ParticleView, batched_pairs
from atomeq.typing import EdgeIndex


class PropagationBatch(NamedTuple):
    """Systems of equal size, flattened: n_atoms particles in n_systems.

    Attributes:
        pos: Positions at the start, (n_atoms, 3).
        velocities: Velocities at the start, in lengths per long step, (n_atoms, 3).
        node_features: Of each particle, (n_atoms, n_inputs), as the view gives them.
        edge_features: Of each pair, (n_edges, n_edge_features).
        edge_index: Row 0 is the source, row 1 the target, (2, n_edges).
        target: Positions at the end, (n_atoms, 3).
        target_velocities: Velocities at the end, in lengths per long step, (n_atoms, 3).
    """

    pos: Tensor
    velocities: Tensor
    node_features: Tensor
    edge_features: Tensor
    edge_index: EdgeIndex
    target: Tensor
    target_velocities: Tensor


class PropagationSet:
    """Systems with their features, served in batches; an iterable that Lightning takes as a loader.

    Args:
        trajectories: With both frames.
        view: What the model is shown of them.
        from_frame: What the model sees.
        to_frame: What it predicts.
        batch_size: Systems in a batch; the last batch may have fewer.
        seed: Of the order, a new one in each epoch; None keeps the order of the set.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        view: ParticleView,
        *,
        from_frame: int,
        to_frame: int,
        batch_size: int,
        seed: int | None = None,
    ) -> None:
        pos, velocities = trajectories.at(from_frame)
        target, target_velocities = trajectories.at(to_frame)
        self.n_systems, self.n_bodies = pos.shape[:2]
        self.pairs = view.pairs(self.n_bodies)
        velocities = velocities * view.time
        nodes, edges = view.features(pos, velocities, trajectories.charges, self.pairs)
        later = target_velocities * view.time
        self.per_system = (pos, velocities, nodes, edges, target, later)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._edges: dict[int, EdgeIndex] = {}

    def __len__(self) -> int:
        return -(-self.n_systems // self.batch_size)

    def __iter__(self) -> Iterator[PropagationBatch]:
        order = torch.arange(self.n_systems)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
            order = torch.randperm(self.n_systems, generator=generator)
        for chosen in order.split(self.batch_size):
            pos, velocities, nodes, edges, target, later = (
                tensor[chosen].flatten(0, 1) for tensor in self.per_system
            )
            edge_index = self._edge_index(len(chosen))
            yield PropagationBatch(pos, velocities, nodes, edges, edge_index, target, later)

    def _edge_index(self, n_systems: int) -> EdgeIndex:
        if n_systems not in self._edges:
            self._edges[n_systems] = batched_pairs(self.pairs, n_systems, self.n_bodies)
        return self._edges[n_systems]
