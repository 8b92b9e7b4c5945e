"""What the models of the package promise to those who use them.

An :class:`AtomisticModel` stands inside a potential, a :class:`Propagator` replaces the integration
of the equations of motion over a long step.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, RadiusGraph
from atomeq.nn.mlp import MLP
from atomeq.registry import path_of
from atomeq.typing import EdgeIndex, Positions, PropertyKey

#: One step of a network on some atoms: of a graph with all edges of its first n atoms, the features
#: of all of its atoms (of the first step None) and n, it makes the features of those n.
Stage = Callable[[AtomGraph, Tensor | None, int], Tensor]


class ConfiguredModule(nn.Module):
    """A network that can write itself down as the node that builds it again.

    Every constructor argument is kept as an attribute of the same name, so that :meth:`config`
    can write the network down and a checkpoint can build it again.

    Attributes:
        checkpoint_version: Of the arguments and the weights. A class that changes them in a way
            that older checkpoints do not fit counts one up and says in :meth:`upgrade` how they do.
    """

    checkpoint_version: ClassVar[int] = 1

    @classmethod
    def upgrade(
        cls, version: int, init_args: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return arguments and weights as this version of the class takes them.

        Args:
            version: The ``checkpoint_version`` they were saved with, lower than that of the class.
            init_args: Constructor arguments; a model inside is the node as it was saved.
            weights: By their names in this network; those of a model inside are among them.

        Raises:
            ValueError: That version cannot be read.
        """
        raise ValueError(f"{cls.__name__} is at version {cls.checkpoint_version}, not {version}")

    def keep_arguments(self, arguments: dict[str, Any]) -> None:
        """Keep every constructor argument as an attribute: ``self.keep_arguments(locals())``."""
        for name in inspect.signature(type(self).__init__).parameters:
            if name != "self":
                setattr(self, name, arguments[name])

    def config(self) -> dict[str, Any]:
        """Return ``{"class_path": ..., "init_args": {...}}``, the node that builds this model.

        A model inside a model stands there as a node of its own; a class that has had another
        ``checkpoint_version`` before says which one this is.
        """
        names = [name for name in inspect.signature(type(self).__init__).parameters][1:]
        values = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if isinstance(value, ConfiguredModule):
                values[name] = value.config()
        node: dict[str, Any] = {"class_path": path_of(type(self)), "init_args": values}
        if self.checkpoint_version != 1:
            node["checkpoint_version"] = self.checkpoint_version
        return node

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in, that of its parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device


def refuse_nonpositive(**arguments: float) -> None:
    """Raise ``ValueError`` naming the first number that is zero or less: one divides by it."""
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"{name} must be more than 0, not {value!r}")


def outputs_of(*, forces: bool, stress: bool) -> frozenset[PropertyKey]:
    """Return what a model gives that has heads for forces or stress, besides energies."""
    heads: list[tuple[PropertyKey, bool]] = [("forces", forces), ("stress", stress)]
    return frozenset({"energies", *(key for key, there in heads if there)})


class AtomisticModel(ConfiguredModule):
    """A graph network over atoms.

    A subclass returns what it can compute itself and names it in ``outputs``; the potential derives
    the rest. A conservative model returns per-atom ``energies`` alone, and forces and stress are
    their derivatives. Values are in the model's own scale: shift and unit belong to
    :class:`~atomeq.potential.references.AtomicReferences`.

    Attributes:
        cutoff: Radius beyond which two atoms do not see each other, Å.
        outputs: What :meth:`forward` returns.
        readouts: Submodules that :meth:`node_features` has no use for.
        recordable: Whether a CUDA graph can be recorded of :meth:`forward`: it waits for no answer
            of a GPU, makes no tensor whose size depends on one, and lets no structure of a batch
            see another.
        receptive_depth: Edges between an atom and the farthest one that its energy depends on; None
            where that may be any atom of the structure, or their number. Who computes a part of a
            structure needs the atoms around it to ``receptive_depth * cutoff``.
        told: Of ``charge`` and ``spin`` what the model is told and can therefore depend on.
        exempt_laws: Laws of physics the method cannot keep by construction, and why, by the names
            that ``atomeq check`` prints. A model that keeps such a law after all is refused by
            :func:`~atomeq.check.model.validate_model`.
    """

    cutoff: float
    outputs: frozenset[PropertyKey] = frozenset({"energies"})
    readouts: tuple[str, ...] = ("energy",)
    recordable: bool = True
    receptive_depth: int | None = None
    told: frozenset[str] = frozenset()
    exempt_laws: Mapping[str, str] = MappingProxyType({})

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of the graphs this model was made for: all pairs within the cutoff."""
        return RadiusGraph(self.cutoff)

    def leaves_torch_little(self, graph: AtomGraph) -> bool:
        """Return whether kernels that take threads themselves do nearly all work on a graph.

        What is left to torch is then so little that a second thread makes it slower.
        """
        return False

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Compute the model's outputs for a batch of structures.

        Args:
            graph: Structures with edges, as :meth:`graph_builder` makes them. Positions and cell
                are float64; the model casts what it derives from them to its own dtype.

        Returns:
            ``energies`` (n_atoms,) and whatever else ``outputs`` names; and, where uncertainties
            are wanted of the model, ``features`` (n_atoms, any): invariants that its last map makes
            the energies of, or the nearest thing to them. One whose features turn by degree returns
            them as ``sphere_features`` (n_atoms, n_sph, channels), see :attr:`sphere_shape`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def stages(self) -> Sequence[Stage]:
        """Return the steps that give what :meth:`forward` does, each of them local in its edges.

        So the energies of a structure too large to be held at once are computed some atoms at a
        time (:mod:`atomeq.potential.blocks`). The last step gives ``energies``. None by default.
        """
        return ()

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Compute invariant features of the atoms, those the model reads its energies from.

        A model that offers them can be the geometric encoder of another one, and says how many they
        are: :attr:`node_channels`.

        Args:
            graph: As in :meth:`forward`.

        Returns:
            (n_atoms, node_channels).
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer node_features()")

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        raise NotImplementedError(f"{type(self).__name__} does not offer node_features()")

    @property
    def sphere_shape(self) -> tuple[int, int]:
        """Highest degree and channels of the ``sphere_features`` that :meth:`forward` returns.

        (0, node_channels) where it returns none, but there are :meth:`node_features`.
        """
        return 0, self.node_channels

    @property
    def embedding_channels(self) -> int:
        """Channels in which atoms are embedded, and :meth:`with_state` adds to them."""
        embedding = getattr(self, "embedding", None)
        if not isinstance(embedding, nn.Embedding):
            raise NotImplementedError(
                f"{type(self).__name__} cannot be told of charges: it has no embedding_channels"
            )
        return embedding.embedding_dim

    @staticmethod
    def with_state(atoms: Tensor, graph: AtomGraph) -> Tensor:
        """Return embedded ``atoms`` (n_atoms, C) with what a ``Charged`` says of ``graph``."""
        state = vars(graph).get("electronic_state")
        return atoms if state is None else atoms + state.index_select(0, graph.batch)

    def freeze_readouts(self) -> None:
        """Train nothing that only :meth:`forward` needs, where atoms alone are taken.

        Distributed training waits for the gradient of every parameter that asks for one.
        """
        for part in self.modules():  # a model may stand inside a model
            if isinstance(part, AtomisticModel):
                for name in set(part.readouts) & set(dict(part.named_children())):
                    part.get_submodule(name).requires_grad_(False)


class Wrapper(AtomisticModel, ABC):
    """A model around another one, whose cutoff, graphs, outputs and channels it has.

    Attributes:
        model: The model inside.
    """

    recordable = False  # each asks for values: how many frames, which charges, what is periodic

    def __init__(self, model: AtomisticModel) -> None:
        super().__init__()
        self.model = model
        self.cutoff, self.outputs, self.told = model.cutoff, model.outputs, model.told
        self.receptive_depth = model.receptive_depth

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of the model inside."""
        return self.model.graph_builder()

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        return self.model.node_channels

    @property
    def embedding_channels(self) -> int:
        """Channels in which the model inside embeds atoms."""
        return self.model.embedding_channels

    @abstractmethod
    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return what is made of the outputs of the model inside."""


class InvariantReadout(AtomisticModel, ABC):
    """A model that reads its energies off the scalars of its atoms, by one perceptron.

    Attributes:
        energy: The perceptron, from :attr:`node_channels` to one number.
    """

    energy: MLP

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return per-atom ``energies`` (n_atoms,), in the model's own scale, and ``features``."""
        energies, features = self.energy.with_hidden(self.node_features(graph))
        return {"energies": energies[:, 0], "features": features}

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`, those that atoms are embedded in."""
        return self.embedding_channels

    @abstractmethod
    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the scalars that the energies are read off, (n_atoms, node_channels)."""


class Propagator(ConfiguredModule):
    """A network that carries particles a fixed time ahead in one step.

    Attributes:
        gives_velocities: Whether :meth:`forward` returns velocities, or None in their place.
    """

    gives_velocities: bool = True

    def forward(
        self,
        pos: Positions,
        velocities: Tensor,
        node_features: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
    ) -> tuple[Positions, Tensor | None]:
        """Predict positions, and velocities where the model has them.

        Args:
            pos: Positions, (n_atoms, 3).
            velocities: Velocities, (n_atoms, 3).
            node_features: Invariants of each particle, (n_atoms, n_inputs).
            edge_features: Invariants of each pair, (n_edges, n_edge_features).
            edge_index: Row 0 is j, row 1 is i and receives.

        Returns:
            Positions (n_atoms, 3), and velocities (n_atoms, 3) or None.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")
