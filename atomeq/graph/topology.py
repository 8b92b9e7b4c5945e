"""The topology of what moves: perceived at the start, kept from then on, rebuilt on request.

Hyperedges perceived anew for each geometry would jump as a bond breaks, and the energy with them.
Batched dynamics keeps them in its AtomGraphs (``HyperGraph.fix_topology``); the ASE calculator,
which must not write into a structure, remembers them here by object.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from atomeq.graph.convert import StructureError, structure_name
from atomeq.graph.hyperedges import INFO_KEY, PERIODIC, Hyperedges, perceive_hyperedges

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class _Kept:
    """What one object's topology was when it was first asked about."""

    structure: "weakref.ref[Atoms]"
    kind: bytes
    hyperedges: Hyperedges


class KeptTopologies:
    """Topologies of Atoms objects, as they were when each object was first asked about.

    An object that moves keeps its own. Any other one, a copy as well, gets one of its own, so that
    nothing depends on which structures came before. What stands in ``atoms.info["hyperedges"]``
    goes first: :func:`~atomeq.graph.hyperedges.fix_topology` rebuilds. New elements or another
    periodicity make another structure of an object.

    Threads may share it. Pickled or copied it knows no object.

    Args:
        perceive: Perceive those of objects that bring none.
    """

    def __init__(self, *, perceive: bool = True) -> None:
        self.perceive = perceive
        self._kept: dict[int, _Kept] = {}

    def of(self, atoms: "Atoms", *, index: int = 0) -> Hyperedges | None:
        """Return the hyperedges of an object, perceiving them the first time.

        Args:
            atoms: The object.
            index: Of it in a list, for messages.

        Returns:
            None where the object brings none and nothing is perceived.

        Raises:
            StructureError: They are unusable, or cannot be perceived.
            ImportError: They must be perceived, and RDKit is not installed.
        """
        if INFO_KEY in atoms.info:
            return given_topology(atoms.info[INFO_KEY], atoms.numbers, index=index)
        if not self.perceive:
            return None
        key, kind = id(atoms), atoms.numbers.tobytes() + atoms.pbc.tobytes()
        kept = self._kept.get(key)
        if kept is None or kept.structure() is not atoms or kept.kind != kind:
            found = perceived_topology(atoms.numbers, atoms.positions, atoms.pbc, index=index)
            kept = _Kept(weakref.ref(atoms, partial(self._forget, key)), kind, found)
            self._kept[key] = kept
        return kept.hyperedges

    def _forget(self, key: int, structure: "weakref.ref[Atoms]") -> None:
        # Another object may have got the identity of the one that was deleted.
        kept = self._kept.get(key)
        if kept is not None and kept.structure is structure:
            del self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"perceive": self.perceive, "_kept": {}}


def given_topology(given: Any, numbers: NDArray[np.int64], *, index: int = 0) -> Hyperedges:
    """Read hyperedges from a structure's info.

    Args:
        given: What stands there.
        numbers: Atomic numbers of the structure, (n_atoms,).
        index: Of the structure in a list, for messages.

    Raises:
        StructureError: They are unusable.
    """
    try:
        return Hyperedges.from_info(given)
    except ValueError as error:
        raise StructureError(f"{structure_name(index, numbers)}: {error}", index=index) from error


def perceived_topology(
    numbers: NDArray[np.int64],
    positions: NDArray[np.float64],
    pbc: Sequence[bool] | NDArray[np.bool_],
    *,
    index: int = 0,
) -> Hyperedges:
    """Perceive the hyperedges of a neutral structure.

    Args:
        numbers: Atomic numbers, (n_atoms,).
        positions: (n_atoms, 3), Å.
        pbc: (3,).
        index: Of the structure in a list, for messages.

    Raises:
        StructureError: It is periodic, or its valences make no sense.
        ImportError: RDKit is not installed.
    """
    name = structure_name(index, numbers)
    if any(pbc):
        raise StructureError(f"{name}: {PERIODIC}", index=index)
    try:
        return perceive_hyperedges(numbers.tolist(), positions, name=name)
    except ValueError as error:
        raise StructureError(str(error), index=index) from error
