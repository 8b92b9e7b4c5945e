"""The networks of a model that depend on an edge's length and on the elements at its ends alone.

With fixed weights in single precision they are read off tables, each pair of elements its own
(:class:`~atomeq.nn.radial_tables.RadialTables`); else they are computed.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from atomeq.nn.edge_network import EdgeNetwork, ElementPair
from atomeq.nn.pair_mlp import PairFeatures, Pairs, RadialMLP, TabulatedPairs
from atomeq.nn.radial_tables import RadialTables
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.typing import AtomicNumbers, EdgeIndex, EdgeLengths


class PairNetworks(NamedTuple):
    """Networks of pairs, and what they see.

    Attributes:
        basis: Functions of the length.
        envelope: Ends messages at the cutoff, or None.
        elements: Features of the atoms as sources and as targets that all networks see, or None.
        density: The network of the degree embedding, whose output is used with the envelope.
        others: Networks of which only what their last linear layer is given is wanted.
    """

    basis: nn.Module
    envelope: nn.Module | None
    elements: tuple[nn.Module, nn.Module] | ElementPair | None
    density: RadialMLP | EdgeNetwork
    others: tuple[RadialMLP | EdgeNetwork, ...]

    def evaluate(
        self, frame: EdgeFrame, numbers: AtomicNumbers, edge_index: EdgeIndex, tables: RadialTables
    ) -> tuple[Pairs, Tensor | None]:
        """Return what networks see of the pairs, and the envelope, (n_edges,)."""
        made = tables.of_pairs(frame.vectors, numbers, edge_index, self)
        if made is None:
            return self._features(frame.lengths, numbers, edge_index), self._cut(frame.lengths)
        envelope = None if self.envelope is None else made.pop(0)[:, 0]
        enveloped: dict[nn.Module, Tensor] = {_perceptron(self.density): made[0]}
        hidden: dict[nn.Module, Tensor] = {
            _perceptron(one): values for one, values in zip(self.others, made[1:], strict=True)
        }
        return TabulatedPairs(hidden, enveloped), envelope

    def weights(self) -> Iterator[Tensor]:
        """Yield all that :meth:`values` depends on."""
        waiting = self._modules()
        while waiting:  # an own walk: that of Module.parameters() takes as long as a small layer
            module = waiting.pop()
            for tensors in (module._parameters, module._buffers):
                yield from (one for one in tensors.values() if one is not None)
            waiting += [one for one in module._modules.values() if one is not None]

    def double(self) -> "PairNetworks":
        """Return a copy in double precision."""
        twin = copy.deepcopy(self)
        for module in twin._modules():
            module.double()
        return twin

    def _modules(self) -> list[nn.Module]:
        elements = self.elements if isinstance(self.elements, tuple) else (self.elements,)
        known = (self.basis, self.envelope, *elements, self.density, *self.others)
        return [module for module in known if module is not None]

    def values(
        self, lengths: EdgeLengths, numbers: AtomicNumbers, edge_index: EdgeIndex
    ) -> list[Tensor]:
        """Return what is read off tables: envelope, density times envelope, and hidden layers."""
        features, envelope = self._features(lengths, numbers, edge_index), self._cut(lengths)
        density = _perceptron(self.density)(_seen(self.density, features, numbers))
        hidden = [_perceptron(one).hidden(_seen(one, features, numbers)) for one in self.others]
        if envelope is None:
            return [density, *hidden]
        return [envelope[:, None], density * envelope[:, None], *hidden]

    def _cut(self, lengths: EdgeLengths) -> Tensor | None:
        return None if self.envelope is None else self.envelope(lengths)

    def _features(
        self, lengths: EdgeLengths, numbers: AtomicNumbers, edge_index: EdgeIndex
    ) -> PairFeatures:
        basis = self.basis(lengths)  # (n_edges, num_radial)
        if self.elements is None:
            none = basis.new_zeros(numbers.shape[0], 0)
            return PairFeatures(basis, none, none, edge_index)
        if isinstance(self.elements, tuple):
            source, target = (embed(numbers) for embed in self.elements)
        else:
            source, target = self.elements(numbers)
        return PairFeatures(basis, source, target, edge_index)


def _perceptron(network: RadialMLP | EdgeNetwork) -> RadialMLP:
    return network.layers if isinstance(network, EdgeNetwork) else network


def _seen(network: RadialMLP | EdgeNetwork, features: Pairs, numbers: Tensor) -> Pairs:
    return network.seen(features, numbers) if isinstance(network, EdgeNetwork) else features
