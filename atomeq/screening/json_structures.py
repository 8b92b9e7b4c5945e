"""JSON of pymatgen's structures and of OPTIMADE responses, read as plain data.

pymatgen's own decoder imports the classes that a document names; a file from elsewhere shall not
choose what runs here.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from atomeq.graph.occupation import complaint

_Item: TypeAlias = Atoms | ValueError


# Where structures stand in documents that hold more than them.
_WRAPPERS = ("structure", "final_structure", "molecule", "initial_structure")


def structures_of_document(document: Any) -> Iterator[_Item]:
    """Yield the structures of a document; for what is none, the error that says why.

    Args:
        document: As JSON gives it: a structure or molecule of pymatgen, a list or dictionary of
            them, or of documents with a ``structure``, or an OPTIMADE response.
    """
    if isinstance(document, dict) and "data" in document and "sites" not in document:
        entries = document["data"]
        for entry in entries if isinstance(entries, list) else [entries]:
            yield _structure(entry)
        return
    if isinstance(document, list):
        for entry in document:
            yield _structure(entry)
        return
    if isinstance(document, dict) and not _is_structure(document):
        inner = [value for value in document.values() if isinstance(value, dict)]
        if any(map(_is_structure, inner)):
            for name, value in document.items():
                if isinstance(value, dict):
                    yield _structure(value, name)
            return
        keys = ", ".join(map(str, itertools.islice(document, 5)))
        yield ValueError(f"the document holds no structure; its keys are {keys or 'none'}")
        return
    yield _structure(document)


def structures_of_lines(lines: Iterable[str]) -> Iterator[_Item]:
    """Yield the structures of JSON lines; the header and metadata of OPTIMADE are passed over."""
    for line in lines:
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            yield ValueError(f"the line is no JSON: {error}")
            continue
        if isinstance(entry, dict) and (
            "x-optimade" in entry or entry.get("type") in ("info", "references")
        ):
            continue
        yield _structure(entry)


def _is_structure(entry: dict[str, Any]) -> bool:
    return "sites" in entry or "attributes" in entry or any(key in entry for key in _WRAPPERS)


def _structure(entry: Any, name: str | None = None) -> _Item:
    try:
        if not isinstance(entry, dict):
            raise ValueError(f"{str(entry)[:40]!r} is no structure")
        named = {} if name is None else {"id": name}
        if "attributes" in entry:
            atoms = _of_optimade(entry["attributes"])
            atoms.info.update(_plain(entry["attributes"]) | named | _plain(entry))
            return atoms
        wrapped = next((entry[key] for key in _WRAPPERS if key in entry), entry)
        atoms = _of_pymatgen(wrapped)
        atoms.info.update(named | _plain(wrapped.get("properties") or {}) | _plain(entry))
        return atoms
    except KeyError as error:
        return ValueError(f"the structure has no {error}")
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        return ValueError(f"{type(error).__name__}: {error}")


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what is said in texts and numbers beside a structure."""
    return {key: value for key, value in entry.items() if isinstance(value, str | int | float)}


def _of_pymatgen(document: dict[str, Any]) -> Atoms:
    sites = document["sites"]
    numbers = [_one_element(site["species"]) for site in sites]
    lattice = document.get("lattice")
    if lattice is None:
        return Atoms(numbers=numbers, positions=[site["xyz"] for site in sites])
    cell = np.asarray(lattice["matrix"], dtype=np.float64).reshape(3, 3)
    if all("abc" in site for site in sites):
        positions = np.array([site["abc"] for site in sites], dtype=np.float64) @ cell
    else:
        positions = np.array([site["xyz"] for site in sites], dtype=np.float64)
    return Atoms(
        numbers=numbers, positions=positions, cell=cell, pbc=lattice.get("pbc") or [True] * 3
    )


def _one_element(species: list[dict[str, Any]]) -> int:
    elements = [str(item["element"]) for item in species]
    return _occupant("a site", elements, [item.get("occu", 1) for item in species])


def _occupant(site: str, elements: list[str], shares: list[float]) -> int:
    """Return the one element of a site, refusing a share that is not 1: less, more, NaN."""
    if why := complaint(elements, shares, site):
        raise ValueError(why)
    return _number(elements[0])


def _of_optimade(attributes: dict[str, Any]) -> Atoms:
    if attributes.get("assemblies"):
        raise ValueError("sites exclude each other (assemblies); make it an ordered structure")
    species = {one["name"]: one for one in attributes["species"]}
    occupants = {}
    for name in dict.fromkeys(attributes["species_at_sites"]):
        elements = species[name]["chemical_symbols"]
        shares = species[name].get("concentration") or [1.0] * len(elements)
        if any(species[name].get("nattached") or species[name].get("attached") or ()):
            raise ValueError(f"a site of {name!r} has attached atoms without positions; add them")
        occupants[name] = _occupant(f"a site of {name!r}", elements, shares)
    numbers = [occupants[name] for name in attributes["species_at_sites"]]
    vectors = attributes.get("lattice_vectors")
    cell = np.zeros((3, 3)) if vectors is None else np.array(vectors, dtype=np.float64)
    periodic = attributes.get("dimension_types", [0 if vectors is None else 1] * 3)
    return Atoms(
        numbers=numbers,
        positions=np.asarray(attributes["cartesian_site_positions"], float).reshape(-1, 3),
        cell=np.where(np.isnan(cell), 0.0, cell),  # null where a direction is not periodic
        pbc=[bool(flag) for flag in periodic],
    )


def _number(symbol: str) -> int:
    number = atomic_numbers.get(symbol, 0)
    if not number:
        raise ValueError(f"{symbol!r} is no element")
    return number
