"""Several potentials asked together: their mean, and how far they disagree. One is a committee too.

Members that see the same edges share a graph, so there is one graph per builder, not per member.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder
from atomeq.graph.convert import structure_name
from atomeq.ops.precision import checked_precision
from atomeq.potential.captured import Captured
from atomeq.potential.checkpoint import load_potential, not_a_potential, resolve_device, sha256
from atomeq.potential.derivatives import force_constants
from atomeq.potential.folders import WEIGHTS_FILE, find_potential
from atomeq.potential.potential import Potential
from atomeq.potential.scalar import ScalarPredictor
from atomeq.potential.terms import EnergyTerm
from atomeq.typing import OF_STRUCTURES, Precision, PropertyKey


class NotFiniteError(ValueError):
    """A potential gave NaN or infinity for a structure; the message names both.

    Args:
        potential: Its name, folder or model.
        what: Which result.
        index: Position of the structure in the list that was given.
        numbers: Its atomic numbers.
    """

    def __init__(self, potential: str, what: str, index: int, numbers: Tensor) -> None:
        title = structure_name(index, numbers.cpu().numpy())
        super().__init__(
            f"{title}: the potential {potential!r} gives NaN or infinite {what}; its weights are "
            "broken, or it was never trained on anything like this structure"
        )
        self.index = index


class Committee:
    """Potentials that answer together.

    Args:
        members: At least one.
        capture: Record their launches where that helps, see :mod:`atomeq.potential.captured`.

    Attributes:
        builders: Builders of graphs that differ, in the order of the members that need them.
        elements: Atomic numbers that all members know, ascending.

    Raises:
        ValueError: No members, or none of their elements in common.
    """

    def __init__(self, members: Sequence[Potential], *, capture: bool = True) -> None:
        if not members:
            raise ValueError("a committee needs at least one potential, and none was given")
        self.members, self.capture = tuple(members), capture
        self._answer = [Captured(one, wanted=capture) for one in self.members]
        builders = [one.model.graph_builder() for one in self.members]
        self.builders: tuple[GraphBuilder, ...] = tuple(dict.fromkeys(builders))
        self._seen = [self.builders.index(builder) for builder in builders]
        known = set.intersection(*(set(one.elements) for one in self.members))
        if not known:
            raise ValueError("the potentials of this committee have no element in common")
        self.elements = tuple(sorted(known))

    @property
    def conservative(self) -> bool:
        """Whether all forces are derivatives of energies."""
        return all(one.conservative for one in self.members)

    @property
    def gives_stress(self) -> bool:
        """Whether there is a stress."""
        return all(one.gives_stress for one in self.members)

    @property
    def twice_differentiable(self) -> bool:
        """Whether there is a Hessian."""
        return all(one.twice_differentiable for one in self.members)

    def evaluate(
        self,
        graphs: Sequence[AtomGraph],
        properties: Sequence[PropertyKey],
        *,
        first: int = 0,
    ) -> dict[str, NDArray]:
        """Compute a batch with every member.

        Args:
            graphs: Of the same structures, one of each of :attr:`builders`.
            properties: As of :meth:`Potential.forward`.
            first: Position of the first structure in the list that was given, for errors.

        Returns:
            Their means by name, in float64 where there are several members, and then ``<name>_std``
            as well, the standard deviations (of n - 1).

        Raises:
            NotFiniteError: A result of a member is NaN or infinite.
        """
        each = [
            {key: value.detach().cpu().numpy() for key, value in one(graphs[k], properties).items()}
            for one, k in zip(self._answer, self._seen, strict=True)
        ]
        for one, results in zip(self.members, each, strict=True):
            for key, values in results.items():
                if not np.isfinite(values).all():
                    row = int(np.nonzero(~np.isfinite(values))[0][0])
                    k = row if key in OF_STRUCTURES else int(graphs[0].batch[row])
                    numbers = graphs[0].atomic_numbers[graphs[0].batch == k]
                    raise NotFiniteError(one.name, key, first + k, numbers)
        if len(each) == 1:
            return dict(each[0])
        stacked = {key: np.stack([one[key] for one in each]).astype(np.float64) for key in each[0]}
        means = {str(key): values.mean(axis=0) for key, values in stacked.items()}
        return means | {f"{key}_std": values.std(axis=0, ddof=1) for key, values in stacked.items()}

    def hessian(self, graphs: Sequence[AtomGraph], *, max_edges: int) -> NDArray[np.float64]:
        """Return the mean Hessian of one structure: (3 n_atoms, 3 n_atoms), eV/Å².

        Args:
            graphs: Of the structure, one of each of :attr:`builders`.
            max_edges: Bounds the memory; see :func:`force_constants`.
        """
        each = [
            force_constants(one, graphs[k], max_edges=max_edges).cpu().numpy()
            for one, k in zip(self.members, self._seen, strict=True)
        ]
        for one, matrix in zip(self.members, each, strict=True):
            if not np.isfinite(matrix).all():
                raise NotFiniteError(one.name, "hessian", 0, graphs[0].atomic_numbers)
        return np.asarray(np.mean(each, axis=0, dtype=np.float64))


def frozen(
    potential: str | Path | Potential,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    terms: Sequence[EnergyTerm] = (),
    precision: Precision | None = None,
    ignore: Sequence[str] = (),
) -> Potential:
    """Return a potential of one's own, without gradients of its parameters; a given one stays.

    Args:
        potential: Name of a shipped one, folder of a saved one, or a Potential, which is copied.
        device: By default that of the Potential, the CPU for a name or folder.
        dtype: Of the network; by default its own.
        terms: Known physics to add.
        precision: As of :func:`~atomeq.potential.checkpoint.load_potential`; by default its own.
        ignore: Of ``charge`` and ``spin`` what is left out where it is carried.

    Raises:
        CheckpointError: There is no such potential, or it is damaged.
        ValueError: It takes no terms, is no potential, or the device is not there.
    """
    if isinstance(potential, ScalarPredictor):
        raise ValueError(not_a_potential(potential, "the model that was given"))
    if isinstance(potential, torch.nn.Module) and not isinstance(potential, Potential):
        raise ValueError(
            f"a {type(potential).__name__} is no potential: it gives no energies. A model becomes "
            "one in Potential(model); a propagator is for `atomeq rollout`"
        )
    if not isinstance(potential, Potential):
        own = load_potential(potential, device=device, dtype=dtype, precision=precision)
    else:
        target = potential.device if device is None else resolve_device(device)
        own = copy.deepcopy(potential).to(target)
        own = own.to(dtype if dtype is not None else potential.dtype).requires_grad_(False).eval()
        own.precision = checked_precision(precision) or own.precision
    own.ignore({*own.ignored, *ignore})
    own.add_terms([copy.deepcopy(term).to(own.device) for term in terms])
    return own


def provenance_of(origin: str | None, potential: Potential) -> dict[str, Any]:
    """Return where a member came from: name as it was given, folder and hash of its weights.

    Args:
        origin: Its name or folder; None for one that was made here, whose own hash is taken.
        potential: The member.
    """
    # The weights know nothing of additive terms, which have none.
    terms = {"terms": potential.term_configs()} if len(potential.terms) else {}
    if origin is None:
        return {"name": None, "folder": None, "sha256": potential.fingerprint(), **terms}
    folder = find_potential(origin)
    alone = (folder / WEIGHTS_FILE).is_file()  # a committee has those of its members
    digest = sha256(folder / WEIGHTS_FILE) if alone else potential.fingerprint()
    return {"name": origin, "folder": str(folder.resolve()), "sha256": digest, **terms}
