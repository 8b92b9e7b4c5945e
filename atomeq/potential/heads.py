"""Several heads on one trunk: levels of theory or tasks that share a network but for its readout.

Trained together, they are saved in one folder; loaded, each is an ordinary potential: its head is
chosen by its name behind that of the folder, ``my-potential@r2scan``.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph, atom_rows
from atomeq.potential.folders import CheckpointError
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.typing import PropertyKey

_NAME = re.compile(r"\w[\w-]*")
_OF_ATOMS = ("energies", "forces", "gradient_forces")


class Head(nn.Module):
    """What one head has of its own: the readouts of the network and the references."""

    def __init__(self, readouts: Mapping[str, nn.Module], references: AtomicReferences) -> None:
        super().__init__()
        self.model = nn.ModuleDict(readouts)
        self.references = references


class HeadedPotential(Potential):
    """Potentials of several heads: each structure of a batch, by its ``head``, is of one of them.

    The first head is the potential's own, so that a folder holds the weights of an ordinary
    potential and, as ``heads.@NAME.``, what the others have in their place.

    Args:
        potential: Its readouts and references are those that each head begins with.
        names: Of the heads, letters, digits, ``_`` and ``-``.

    Raises:
        ValueError: Less than two names, or one that is none; a network without readouts.
    """

    def __init__(self, potential: Potential, names: Sequence[str]) -> None:
        refuse_wrong_names(names)
        super().__init__(potential.model, potential.references)
        self.terms, self.distances = potential.terms, potential.distances
        self.name, self.precision = potential.name, potential.precision
        children = dict(self.model.named_children())
        readouts = {name: children[name] for name in self.model.readouts if name in children}
        if not readouts:
            raise ValueError(f"{type(self.model).__name__} has no readouts that heads could have")
        self.names = tuple(names)
        self.heads = nn.ModuleDict(  # "@", for a module may not be called as a method is
            {f"@{name}": copy.deepcopy(Head(readouts, self.references)) for name in names[1:]}
        )
        self._used: str | None = None

    @classmethod
    def of(cls, potentials: Mapping[str, Potential]) -> "HeadedPotential":
        """Return the heads of potentials that share all of a network but its readouts.

        Args:
            potentials: By the names of the heads.

        Raises:
            ValueError: They have different networks, or weights of them.
        """
        headed = cls(next(iter(potentials.values())), list(potentials))
        shared = headed.model.state_dict()
        for name, one in potentials.items():
            weights = one.model.state_dict()
            apart = [k for k, w in weights.items() if k not in shared or not w.equal(shared[k])]
            own = [k for k in apart if k.split(".")[0] in headed.model.readouts]
            if apart != own or one.model.config() != headed.model.config():
                raise ValueError(f"{name} has a network of its own, and is no head of one trunk")
            with headed.using(name):
                headed.model.load_state_dict({**headed.model.state_dict(), **weights})
                headed.references = one.references
        return headed

    def forward(
        self,
        graph: AtomGraph,
        properties: Sequence[PropertyKey] = ("energy", "forces"),
        *,
        create_graph: bool | None = None,
    ) -> dict[PropertyKey, Tensor]:
        """Compute properties of a batch, each structure by the head that ``graph.head`` counts."""
        if self._used is not None:
            return super().forward(graph, properties, create_graph=create_graph)
        parts, found = [], []
        for number in graph["head"].unique().tolist():
            systems = torch.nonzero(graph["head"] == number).flatten()
            with self.using(self.names[number]):
                part = graph if len(systems) == graph.n_graphs else graph.take(systems)
                found.append(self.forward(part, properties, create_graph=create_graph))
            parts.append(systems)
        if len(parts) == 1:
            return found[0]
        of_graphs = torch.cat(parts)
        of_atoms = atom_rows(graph.natoms, of_graphs)
        joined: dict[PropertyKey, Tensor] = {}
        for key in properties:
            rows = of_atoms if key in _OF_ATOMS else of_graphs
            joined[key] = torch.cat([one[key] for one in found]).index_select(0, rows.argsort())
        return joined

    @contextmanager
    def using(self, name: str) -> Iterator[Potential]:
        """Be the potential of one head; references that are set meanwhile are that head's."""
        own, self._used = self.references, name
        if name == self.names[0]:
            try:
                yield self
            finally:
                self._used = None
            return
        head = self.heads[f"@{name}"]
        assert isinstance(head, Head)
        kept = {key: self.model.get_submodule(key) for key in head.model}
        try:
            for key, readout in head.model.items():
                setattr(self.model, key, readout)
            self.references = head.references
            yield self
        finally:
            head.references, self.references, self._used = self.references, own, None
            for key, readout in kept.items():
                setattr(self.model, key, readout)


def refuse_wrong_names(names: Sequence[str]) -> None:
    """Raise ``ValueError`` where names cannot be those of heads."""
    wrong = [name for name in names if not _NAME.fullmatch(name)]
    if wrong or len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(
            f"heads are two names or more, of letters, digits, _ and -, not {list(names)}"
        )


def weights_of_head(
    weights: Mapping[str, Tensor], names: object, head: str | None, folder: object
) -> dict[str, Tensor]:
    """Return the weights of one head's potential out of those of a folder.

    Args:
        weights: As they are saved.
        names: What ``model.yaml`` says the heads are; None where there are none.
        head: The one that is chosen.
        folder: For errors.

    Raises:
        CheckpointError: The head has to be chosen, or does not exist.
    """
    if names is None:
        if head is not None:
            raise CheckpointError(f"{folder} has no heads: leave out {head!r}")
        return dict(weights)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder}: heads are a list of names, not {names!r}")
    if head not in names:
        what = "has to be chosen" if head is None else f"{head!r} does not exist"
        raise CheckpointError(
            f"the head {what}: {folder} has {', '.join(names)}, whose energies have different "
            f"zeros; give one, as in --head {names[0]} or NAME@{names[0]}"
        )
    shared = {key: value for key, value in weights.items() if not key.startswith("heads.")}
    prefix = f"heads.@{head}."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return shared | own
