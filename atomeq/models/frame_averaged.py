"""Wrappers that make any model of the package invariant: frame averaging and canonicalization.

Puny et al., Frame Averaging, ICLR 2022, arXiv:2110.03336, as FAENet uses it (Duval et al.,
arXiv:2305.05577), and Kaba et al., Equivariance with Learned Canonicalization Functions, ICML 2023,
arXiv:2211.06489. Both show the model a structure in orientations that turn along with it.

Different from the papers on purpose:

* the frames are those of the edges, not of the positions: in a crystal they depend neither on
  which image of an atom is in the cell nor on how many cells make the supercell.
  ``covariance="positions"`` is as published;
* forces are the derivative of the averaged energy, through the frames too, and thus conservative;
* at inference the average is exact, in one batched pass. The single frame that the papers draw at
  inference gives an energy that depends on the draw;
* where axes are degenerate the frames are completed as :mod:`atomeq.nn.frame_averaging` says.

What no global frame can keep: a fragment far away turns the frame of the whole structure, so the
energies of separated fragments do not add up unless the model itself is invariant. And no finite
set of frames changes continuously where a structure becomes symmetric, so there the energy steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.rewiring import oriented_copies
from atomeq.models.base import AtomisticModel, Wrapper
from atomeq.nn.canonicalization import CanonicalVectors, canonical_frames
from atomeq.nn.frame_averaging import FrameMethod, FrameSet, principal_frames
from atomeq.nn.radial import PolynomialEnvelope
from atomeq.ops.segment.operations import segment_mean
from atomeq.typing import OF_STRUCTURES, PropertyKey

#: Number of kinds of atoms that labels of edges tell apart.
_N_LABELS = 128


class OverFrames(Wrapper, ABC):
    """What both wrappers share: a model's mean over the frames of each structure.

    Args:
        model: Any model of the package; its cutoff, graph and outputs are those of the wrapper.
        batched: Show all frames to the model in one batch; False one after the other, in less
            memory, and the only way for a model with statistics over its batch.
    """

    exempt_laws: Mapping[str, str] = MappingProxyType(
        {
            "separated fragments add": "one frame belongs to the whole structure, and "
            "each fragment turns it for the others",
            "continuous at symmetry": "a perfect crystal has other frames "
            "than one a little distorted, so the energy steps and dynamics there drift",
        }
    )

    def __init__(self, model: AtomisticModel, *, batched: bool = True) -> None:
        super().__init__(model)
        self.receptive_depth = None  # a frame is of the whole structure
        self.batched = batched
        self.polynomial = PolynomialEnvelope(model.cutoff)

    @abstractmethod
    def frames(self, graph: AtomGraph) -> FrameSet:
        """Return the frames of each structure."""

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return the mean of the model's outputs over the frames, turned back."""
        matrices, weights = self.frames(graph)  # (n_frames, n_graphs, 3, 3), (n_frames, n_graphs)
        averaged: dict[PropertyKey, Tensor] = {}
        for key, value in self._evaluate(graph, matrices).items():
            index = ... if key in OF_STRUCTURES else graph.batch
            turns = matrices.to(value.dtype)[:, index]
            if key == "forces":
                value = torch.einsum("kaj,kaij->kai", value, turns)
            elif key == "stress":
                value = turns @ value @ turns.mT
            share = weights.to(value.dtype)[:, index]
            share = share.view(*share.shape, *(1 for _ in value.shape[2:]))
            averaged[key] = (share * value).sum(dim=0)
        return averaged

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the mean of the model's features over the frames, (n_atoms, node_channels)."""
        matrices, weights = self.frames(graph)
        copies = [oriented_copies(graph, few) for few in self._passes(matrices)]
        values = torch.cat([self.model.node_features(copy) for copy in copies])
        share = weights.to(values.dtype)[:, graph.batch, None]  # (n_frames, n_atoms, 1)
        return (share * values.view(len(matrices), -1, values.shape[1])).sum(dim=0)

    def _passes(self, matrices: Tensor) -> list[Tensor]:
        return [matrices] if self.batched else list(matrices.split(1))

    def _evaluate(self, graph: AtomGraph, matrices: Tensor) -> dict[PropertyKey, Tensor]:
        """Return the model's outputs with the frames as a new first dimension."""
        parts = [self.model(oriented_copies(graph, few)) for few in self._passes(matrices)]
        outputs: dict[PropertyKey, Tensor] = {}
        for key, like in parts[0].items():
            value = torch.cat([part[key] for part in parts])
            outputs[key] = value.view(len(matrices), -1, *like.shape[1:])
        return outputs

    def edge_frames(
        self,
        graph: AtomGraph,
        *,
        dim: Literal[2, 3] = 3,
        proper: bool = False,
        method: FrameMethod = "all",
        generator: torch.Generator | None = None,
    ) -> FrameSet:
        """Return the frames along the principal axes of each structure's edges.

        Edges count less the longer they are and nothing at the cutoff, where they come and go.
        """
        source, target = graph.edge_index
        vectors = graph.edge_vectors()
        return principal_frames(
            vectors,
            graph.batch[target],
            n_graphs=graph.n_graphs,
            weights=self.polynomial(torch.linalg.vector_norm(vectors, dim=1)),
            labels=graph.atomic_numbers[source] * _N_LABELS + graph.atomic_numbers[target],
            dim=dim,
            proper=proper,
            method=method,
            generator=generator,
        )


class FrameAveraged(OverFrames):
    """A model averaged over the principal frames of each structure.

    Args:
        model: Any model of the package.
        dim: 3, or 2: invariant to turns about z only, for slabs.
        proper: Average over rotations only: mirror images may have different energies (SE(3)).
        covariance: Frames of the ``"edges"`` or, as published, of the atomic ``"positions"``.
        training_frames: ``"all"``, or one ``"stochastic"`` frame for each structure and step, which
            costs as little as the bare model; ``"det"`` is as published: a rule for the signs that
            is NOT invariant, and no rotation where ``proper`` asks for one.
        inference_frames: The same in evaluation; only ``"all"`` is exact.
        batched: All frames in one batch, or one after the other; see :class:`OverFrames`.
        seed: Of the stochastic frames.

    Example:
        >>> from atomeq.models.faenet import FAENet
        >>> FrameAveraged(FAENet(cutoff=5.0)).cutoff
        5.0
    """

    def __init__(
        self,
        model: AtomisticModel,
        *,
        dim: Literal[2, 3] = 3,
        proper: bool = False,
        covariance: Literal["edges", "positions"] = "edges",
        training_frames: FrameMethod = "all",
        inference_frames: FrameMethod = "all",
        batched: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(model, batched=batched)
        if dim not in (2, 3):
            raise ValueError(f"frames have dim 2 or 3, not {dim!r}")
        self.dim: Literal[2, 3] = dim
        self.proper = proper
        self.covariance = covariance
        self.training_frames: FrameMethod = training_frames
        self.inference_frames: FrameMethod = inference_frames
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def frames(self, graph: AtomGraph) -> FrameSet:
        """Return the frames of each structure, all or one as training or evaluation asks."""
        options: dict[str, Any] = {
            "dim": self.dim,
            "proper": self.proper,
            "method": self.training_frames if self.training else self.inference_frames,
            "generator": self._generator,
        }
        if self.covariance == "edges":
            return self.edge_frames(graph, **options)
        centroids = segment_mean(graph.pos, graph.batch, graph.n_graphs)
        return principal_frames(
            graph.pos - centroids[graph.batch],
            graph.batch,
            n_graphs=graph.n_graphs,
            labels=graph.atomic_numbers,
            **options,
        )


class Canonicalized(OverFrames):
    """A model that sees each structure in one orientation, chosen by a small equivariant network.

    One pass instead of eight, and the orientation is learned. A structure in which vectors cannot
    tell directions apart has no canonical orientation: one with an inversion centre, and for E(3) a
    planar one. It is averaged over its principal frames instead, which is exactly invariant; the
    energy jumps where a distortion ends that. The same learned rotation follows for all structures.

    Args:
        model: Any model of the package.
        proper: Invariant to rotations only (SE(3)): the third axis is a cross product.
        channels: Channels of the network that predicts the orientation.
        num_layers: Its layers.
        num_radial: Its Bessel functions of the edge length.
        num_elements: Atomic numbers below this are embedded.
        batched: All frames in one batch, or one after the other; see :class:`OverFrames`.
    """

    checkpoint_version = 2

    def __init__(
        self,
        model: AtomisticModel,
        *,
        proper: bool = False,
        channels: int = 32,
        num_layers: int = 2,
        num_radial: int = 8,
        num_elements: int = 119,
        batched: bool = True,
    ) -> None:
        super().__init__(model, batched=batched)
        self.keep_arguments(locals())
        self.proper = proper
        # Polar vectors of a plane of atoms lie in it: only with this can the plane end up tilted.
        self.rest = nn.Parameter(torch.eye(3))
        self.vectors = CanonicalVectors(
            model.cutoff,
            channels=channels,
            num_layers=num_layers,
            num_radial=num_radial,
            num_elements=num_elements,
        )

    @classmethod
    def upgrade(
        cls, version: int, init_args: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Add the rotation that comes after the frames, which version 1 had not: none."""
        return init_args, {**weights, "rest": torch.eye(3)}

    def frames(self, graph: AtomGraph) -> FrameSet:
        """Return one frame for each structure, or the principal ones where it has none."""
        frames, degenerate = self.orientations(graph)
        if not bool(degenerate.any()):
            return FrameSet(frames[None], frames.new_ones(1, graph.n_graphs))
        principal = self.edge_frames(graph, proper=self.proper)
        first = torch.zeros_like(principal.weights)
        first[0] = 1.0
        return FrameSet(
            torch.where(degenerate[:, None, None], principal.matrices, frames),
            torch.where(degenerate, principal.weights, first),
        )

    def orientation(self, graph: AtomGraph) -> Tensor:
        """Return the canonical frames (n_graphs, 3, 3), NaN of structures that have none."""
        frames, degenerate = self.orientations(graph)
        return torch.where(degenerate[:, None, None], float("nan"), frames)

    def orientations(self, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        """Return the canonical frame (n_graphs, 3, 3) of each structure, and which have none."""
        vectors = self.vectors(
            graph.atomic_numbers,
            graph.edge_vectors().to(self.dtype),
            graph.edge_index,
            batch=graph.batch,
            n_graphs=graph.n_graphs,
        )
        frames, degenerate = canonical_frames(vectors.to(graph.pos.dtype), proper=self.proper)
        rest, _ = canonical_frames(self.rest[None].to(frames), proper=True)
        return torch.where(degenerate[:, None, None], frames, frames @ rest), degenerate
