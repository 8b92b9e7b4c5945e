"""Total charge and spin multiplicity of a structure, wherever ASE or pymatgen keep them.

``info["charge"]`` (e) and ``info["multiplicity"]`` or ``info["spin"]`` (2S + 1; 0 is not said) say
it outright; without the first, the initial charges of the atoms do by their sum. Initial magnetic
moments are where a DFT calculation starts, and no statement of the total: of them, and of partial
charges that cancel, one is warned once and they are left out.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph

logger = logging.getLogger(__name__)

#: What ``info`` may say it by.
ELECTRON_KEYS = ("charge", "multiplicity", "spin")
#: e; partial charges add up to a whole number but for this.
_ROUNDING = 0.05
_told: set[str] = set()


def electrons_of(atoms: Any) -> dict[str, Tensor]:
    """Return the fields ``charge`` and ``multiplicity`` of an Atoms that carries them.

    Args:
        atoms: ASE's Atoms.

    Raises:
        ValueError: ``info`` has something else than a number under these names.
    """
    info, arrays = atoms.info, atoms.arrays
    if not info and "initial_charges" not in arrays and "initial_magmoms" not in arrays:
        return {}
    charge = _number(info, "charge")
    spin = _number(info, "multiplicity", "spin")
    if charge is None and "initial_charges" in arrays and np.any(arrays["initial_charges"]):
        charge = float(np.sum(arrays["initial_charges"]))
        if abs(charge) < _ROUNDING:
            _tell("initial charges that cancel", "partial charges")
    if spin is None and "initial_magmoms" in arrays and np.any(arrays["initial_magmoms"]):
        _tell("initial magnetic moments", "a starting guess of DFT")
    fields: dict[str, Tensor] = {}
    if charge is not None and abs(charge) >= _ROUNDING:
        nearest = round(charge)
        whole = nearest if abs(charge - nearest) < _ROUNDING else charge
        fields["charge"] = torch.tensor([whole], dtype=torch.float64)
    if spin:
        fields["multiplicity"] = torch.tensor([spin], dtype=torch.float64)
    return fields


def electrons_text(structure: Any) -> str:
    """Return charge and multiplicity in words; nothing of a neutral structure in its lowest state.

    Args:
        structure: ASE's Atoms, or a graph of one structure.

    Raises:
        ValueError: As :func:`electrons_of`.
    """
    of_graph = isinstance(structure, AtomGraph)
    fields = structure if of_graph else electrons_of(structure)
    charge, spin = (float(fields[k]) if k in fields else 0.0 for k in ("charge", "multiplicity"))
    numbers = structure.atomic_numbers if of_graph else structure.numbers
    lowest = 1 + round(float(numbers.sum()) - charge) % 2
    spin = spin or lowest  # 0 is not said
    said = [f" charge {charge:g}"] if charge else []
    return "".join([*said, f" multiplicity {spin:g}"] if spin != lowest else said)


def electrons_of_sites(structure: Any) -> dict[str, float]:
    """Return the same as ``info`` of a Structure or Molecule of pymatgen.

    A Molecule always has a multiplicity; it is a statement where it is not the lowest possible.
    """
    found: dict[str, float] = {}
    charge = float(getattr(structure, "charge", 0.0) or 0.0)
    if charge:
        found["charge"] = charge
    spin = getattr(structure, "spin_multiplicity", None)
    if spin is not None and spin != 1 + (sum(site.specie.Z for site in structure) - charge) % 2:
        found["multiplicity"] = spin
    moments = getattr(structure, "site_properties", {}).get("magmom", [])
    if any(bool(np.any(moment)) for moment in moments if moment is not None):
        _tell("initial magnetic moments", "a starting guess of DFT")
    return found


def lowest_multiplicity(graph: AtomGraph) -> Tensor:
    """Return 1 for an even number of electrons and 2 for an odd one, (n_graphs,) float64."""
    electrons = torch.zeros(graph.n_graphs, dtype=torch.float64, device=graph.pos.device)
    electrons.index_add_(0, graph.batch, graph.atomic_numbers.to(torch.float64))
    return 1 + (electrons - charge_of(graph)).round() % 2


def charge_of(graph: AtomGraph) -> Tensor:
    """Return the total charge of each structure, (n_graphs,) e; 0 where nobody said."""
    absent = torch.zeros(graph.n_graphs, dtype=torch.float64, device=graph.pos.device)
    return graph.get("charge", absent).to(torch.float64)


def multiplicity_of(graph: AtomGraph) -> Tensor:
    """Return 2S + 1 of each structure, (n_graphs,); the lowest possible where nobody said."""
    lowest = lowest_multiplicity(graph)
    given = graph.get("multiplicity", torch.zeros_like(lowest)).to(torch.float64)
    return torch.where(given > 0, given, lowest)


def _number(info: dict[str, Any], *names: str) -> float | None:
    for name in names:
        if (value := info.get(name)) is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise ValueError(
                f"atoms.info[{name!r}] is {value!r}; under this name stands one number of the "
                "structure, its total charge (e) or its multiplicity 2S + 1; rename what it is"
            )
        return number
    return None


def _tell(what: str, meaning: str) -> None:
    if what not in _told:
        _told.add(what)
        logger.warning(
            "a structure has %s: they are taken for %s and left out (said once); total charge and "
            "multiplicity are atoms.info['charge'] and atoms.info['multiplicity']",
            what,
            meaning,
        )
