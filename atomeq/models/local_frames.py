"""A wrapper that makes any model invariant atom by atom: each atom's energy in frames of its own.

Pozdnyakov and Ceriotti, Smooth, exact rotational symmetrization for deep learning on point clouds,
NeurIPS 2023, arXiv:2305.19302. The energy of an atom is the weighted mean of the model's over the
frames that its neighbours span (:mod:`atomeq.nn.local_frames`). Beside a frame of the whole
structure (:mod:`atomeq.models.frame_averaged`):

* energies of separated fragments add up, and crystals are extensive;
* the energy is continuous where a structure becomes symmetric: equivalent pairs of neighbours share
  the weight. What stays discontinuous: an atom all of whose neighbours lie on one line has no axes
  across it, and sees atoms beyond them turn when the line bends; a model without messages beyond
  neighbours, or a molecule that is one line, has none of this;
* each frame is an evaluation of what the atom can see: exact, and dear. ``training_frames:
  stochastic`` takes one frame an atom, ``num_hops`` leaves out what no message can bring.
"""

from typing import Literal

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.rewiring import views_of_atoms
from atomeq.models.base import AtomisticModel, Wrapper
from atomeq.nn.local_frames import AtomFrames, neighbour_frames
from atomeq.nn.radial import PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import PropertyKey


class LocalFrames(Wrapper):
    """A model's energies of atoms, each in the mean over the frames of its neighbourhood.

    Args:
        model: Any model of the package that reads energies and forces atom by atom, from messages
            along edges.
        proper: Rotations only: mirror images may have different energies (SE(3)).
        frame_cutoff: Neighbours up to here span frames, Å; None for all of the model's.
        num_hops: Messages come from no further than this many edges; None takes all atoms that any
            number of edges joins.
        training_frames: All, or one ``"stochastic"`` frame for each atom and step.
        seed: Of the stochastic frames.

    Raises:
        ValueError: The model gives more than energies and forces, or ``frame_cutoff`` exceeds its
            cutoff.

    Example:
        >>> from atomeq.models.faenet import FAENet
        >>> LocalFrames(FAENet(cutoff=5.0)).cutoff
        5.0
    """

    def __init__(
        self,
        model: AtomisticModel,
        *,
        proper: bool = False,
        frame_cutoff: float | None = None,
        num_hops: int | None = None,
        training_frames: Literal["all", "stochastic"] = "all",
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        if beyond := model.outputs - {"energies", "forces"}:
            raise ValueError(f"frames of atoms give energies and forces, not {', '.join(beyond)}")
        if frame_cutoff is not None and frame_cutoff > model.cutoff:
            raise ValueError(
                f"frame_cutoff {frame_cutoff} Å is beyond the model's cutoff, {model.cutoff} Å"
            )
        self.keep_arguments(locals())
        self.proper, self.num_hops = proper, num_hops
        self.envelope = PolynomialEnvelope(frame_cutoff or model.cutoff)
        self._generator = torch.Generator().manual_seed(seed)

    def frames(self, graph: AtomGraph) -> AtomFrames:
        """Return the frames of each atom, all or one as training or evaluation asks."""
        vectors = graph.edge_vectors()
        envelope = self.envelope(torch.linalg.vector_norm(vectors, dim=1))
        frames = neighbour_frames(
            vectors, graph.edge_index[1], envelope, graph.n_atoms, proper=self.proper
        )
        if not self.training or self.training_frames == "all":
            return frames
        table = frames.weights.detach().new_zeros(graph.n_atoms, len(frames.atom)).cpu()
        table[frames.atom.cpu(), torch.arange(len(frames.atom))] = frames.weights.detach().cpu()
        chosen = torch.multinomial(table, 1, generator=self._generator)[:, 0].to(graph.pos.device)
        one = frames.weights.new_ones(graph.n_atoms)
        return AtomFrames(frames.matrices[chosen], frames.atom[chosen], one)

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return the means of the model's outputs over the frames, atom by atom."""
        frames = self.frames(graph)
        views, centres = self._views(graph, frames)
        averaged: dict[PropertyKey, Tensor] = {}
        for key, value in self.model(views).items():
            value = value.index_select(0, centres)
            if key == "forces":
                value = (frames.matrices.to(value.dtype) @ value[:, :, None])[:, :, 0]
            averaged[key] = self._mean(value, frames, graph.n_atoms)
        return averaged

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the mean of the model's features over the frames, (n_atoms, node_channels)."""
        frames = self.frames(graph)
        views, centres = self._views(graph, frames)
        values = self.model.node_features(views).index_select(0, centres)
        return self._mean(values, frames, graph.n_atoms)

    def _views(self, graph: AtomGraph, frames: AtomFrames) -> tuple[AtomGraph, Tensor]:
        return views_of_atoms(graph, frames.atom, frames.matrices, num_hops=self.num_hops)

    @staticmethod
    def _mean(values: Tensor, frames: AtomFrames, n_atoms: int) -> Tensor:
        weights = frames.weights.to(values.dtype)
        weights = weights.view(-1, *(1 for _ in values.shape[1:]))
        return segment_sum(weights * values, frames.atom, n_atoms)
