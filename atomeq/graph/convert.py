"""The door: structures of ASE and pymatgen become AtomGraphs, and bad ones are refused.

Everything behind it may rely on finite coordinates, known elements and a cell that fits the
periodicity. Units are ASE's eV and Å; velocities are Å/fs inside and converted here. The way out is
``to_structures``.
"""

import itertools
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from ase import Atoms, units
from ase.constraints import FixAtoms
from ase.data import atomic_masses, chemical_symbols
from ase.stress import voigt_6_to_full_3x3_stress
from ase.symbols import Symbols
from numpy.typing import NDArray

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.electrons import electrons_of, electrons_of_sites
from atomeq.graph.files import read_structures
from atomeq.graph.neighbors import Edges, neighbor_list_with_lengths, spans_periodic_directions
from atomeq.graph.occupation import partly_occupied_site

MIN_DISTANCE = 0.1  # Å; no two nuclei come so near, so such atoms are an error in the input
_LAST_ELEMENT = 118
# vesin would build very many cells for a cutoff of MIN_DISTANCE.
_OVERLAP_SEARCH = 1.0


@runtime_checkable
class PymatgenSites(Protocol):
    """A Structure or Molecule of pymatgen, known by its attributes: pymatgen loads in seconds."""

    @property
    def sites(self) -> Any:
        """Its atoms."""
        ...

    @property
    def cart_coords(self) -> Any:
        """Positions, Å."""
        ...


StructureLike: TypeAlias = Atoms | PymatgenSites | AtomGraph
#: One or many, or the path of a file that ASE reads.
Structures: TypeAlias = StructureLike | Sequence[StructureLike] | str | os.PathLike[str]


class StructureError(ValueError):
    """A structure that cannot be used; the message names it, what is wrong and the way out.

    Args:
        message: For the user.
        index: Position of the structure in the list that was given.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


def structure_list(structures: Structures) -> list[StructureLike]:
    """Return one or many structures, or those of a file, as a list.

    Raises:
        StructureError: There are none.
        OSError: There is no such file.
        ValueError: It cannot be read.
    """
    if isinstance(structures, str | os.PathLike):
        return list(read_structures(structures))
    listed = type(structures) is list  # of which it takes long to say that it is not pymatgen's
    single = not listed and isinstance(structures, Atoms | AtomGraph | PymatgenSites)
    many = [structures] if single else list(structures)  # pyright: ignore[reportArgumentType]
    if not many:
        raise StructureError("no structures were given: the list is empty")
    return many  # pyright: ignore[reportReturnType]


def from_structures(
    structures: Structures,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> AtomGraph:
    """Return one graph, without edges, of structures of any kind; kinds may be mixed.

    Args:
        structures: One or many of ASE's Atoms, pymatgen's Structure or Molecule, AtomGraph; or the
            path of a file that ASE reads, with all its frames.
        dtype: Of floating-point fields; by default float64, and for an AtomGraph its own.
        device: By default the CPU, and for an AtomGraph its own.

    Raises:
        StructureError: A structure is not usable.
        TypeError: Something is not a structure.
    """
    many = structure_list(structures)
    if not any(isinstance(item, AtomGraph) for item in many):
        atoms = [_as_atoms(item, index) for index, item in enumerate(many)]
        return from_ase(atoms, dtype=dtype or torch.float64, device=device or "cpu")
    graphs = []
    for index, item in enumerate(many):
        if not isinstance(item, AtomGraph):
            item = _graph_of_atoms(_as_atoms(item, index), index, dtype or torch.float64)
        graphs.append(item.replace(edge_index=None, cell_offsets=None).to(device, dtype=dtype))
    graph = AtomGraph.concatenate(graphs)
    _validate(_Arrays.of_graph(graph))
    return graph


def from_ase(
    atoms: Atoms | Sequence[Atoms],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> AtomGraph:
    """Return a graph without edges of one or many Atoms.

    Tags, FixAtoms constraints (``fixed``) and momenta (``velocities``, Å/fs) come along, and the
    labels energy, forces and stress where the calculator holds results for this very structure, or
    ``info`` and ``arrays`` have them; ``info["weight"]`` too. Energies are always float64.

    Args:
        atoms: One or many.
        dtype: Of floating-point fields.
        device: Where the graph goes.

    Raises:
        StructureError: A structure or label is not usable.

    Example:
        >>> from ase.build import bulk
        >>> from_ase(bulk("Cu")).cell.shape
        torch.Size([1, 3, 3])
    """
    many = [_as_atoms(item, index) for index, item in enumerate(structure_list(atoms))]
    _validate(_Arrays.of_atoms(many))
    graphs = [_graph_of_atoms(item, index, dtype) for index, item in enumerate(many)]
    graph = AtomGraph.concatenate(graphs)
    return graph if str(device) == "cpu" else graph.to(device)


def from_pymatgen(
    structures: PymatgenSites | Sequence[PymatgenSites],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> AtomGraph:
    """Return a graph without edges of one or many Structures or Molecules of pymatgen.

    Site properties ``tags``, ``forces``, ``selective_dynamics`` and the properties ``energy`` and
    ``stress`` come along. The way back is ``to_structures.to_pymatgen``.

    Args:
        structures: One or many, ordered: each site holds one element.
        dtype: Of floating-point fields.
        device: Where the graph goes.

    Raises:
        StructureError: A structure or label is not usable.
    """
    atoms = [_as_atoms(item, index) for index, item in enumerate(structure_list(structures))]
    return from_ase(atoms, dtype=dtype, device=device)


def validate_structure(
    atoms: StructureLike,
    *,
    name: str | None = None,
    known_elements: Collection[int] | None = None,
    min_distance: float | None = MIN_DISTANCE,
) -> None:
    """Refuse a structure that no potential should see.

    Args:
        atoms: A structure; an AtomGraph may hold several.
        name: How the error calls it, for example file and frame.
        known_elements: Atomic numbers that are allowed; all elements by default.
        min_distance: Å; nearer atoms, or an atom and an image, overlap. None skips the search.

    Raises:
        StructureError: It is empty, a position or cell is NaN or infinite, an element does not
            exist or is not known, a periodic cell vector is zero or depends on the others, or atoms
            overlap.
    """
    if isinstance(atoms, AtomGraph):
        arrays = _Arrays.of_graph(atoms)
    else:
        arrays = _Arrays.of_atoms([_as_atoms(atoms, 0, name)])
    _validate(arrays, known_elements, name)
    if min_distance is not None:
        _check_overlap(arrays, min_distance, name)


def bare_graph(atoms: Atoms, *, name: str, known_elements: Collection[int]) -> AtomGraph:
    """Make the graph of one structure without edges, labels, velocities and tags.

    Args:
        atoms: One structure.
        name: How the error calls it.
        known_elements: Atomic numbers that are allowed.

    Returns:
        A validated graph, for :meth:`GraphBuilder.connect`; float64.

    Raises:
        StructureError: As of :func:`validate_structure`, overlaps excepted.
    """
    _validate(_Arrays.of_atoms([_as_atoms(atoms, 0, name)]), known_elements, name)
    return _unlabelled(atoms, torch.float64)


def standard_masses(numbers: torch.Tensor) -> torch.Tensor:
    """Return the mass of each atom's element, (n_atoms,), amu, float64."""
    return torch.as_tensor(atomic_masses, dtype=torch.float64, device=numbers.device)[numbers]


def element_symbols(numbers: torch.Tensor) -> list[str]:
    """Return the symbol of each atom's element."""
    return [chemical_symbols[number] for number in numbers.tolist()]


class _Arrays:
    """Structures as concatenated NumPy arrays, what validation looks at."""

    def __init__(
        self,
        pos: NDArray[np.float64],
        numbers: NDArray[np.int64],
        cell: NDArray[np.float64],
        pbc: NDArray[np.bool_],
        natoms: NDArray[np.int64],
    ) -> None:
        self.pos, self.numbers = pos, numbers
        self.cell, self.pbc, self.natoms = cell, pbc, natoms
        self.starts = np.concatenate(([0], np.cumsum(natoms)))

    @classmethod
    def of_atoms(cls, many: Sequence[Atoms]) -> "_Arrays":
        return cls(
            np.concatenate([atoms.positions for atoms in many]),
            np.concatenate([atoms.numbers for atoms in many]),
            np.stack([atoms.cell.array for atoms in many]),
            np.stack([atoms.pbc for atoms in many]),
            np.array([len(atoms) for atoms in many]),
        )

    @classmethod
    def of_graph(cls, graph: AtomGraph) -> "_Arrays":
        return cls(
            graph.pos.detach().cpu().numpy().astype(np.float64),
            graph.atomic_numbers.cpu().numpy(),
            graph.cell.detach().cpu().numpy().astype(np.float64),
            graph.pbc.cpu().numpy(),
            graph.natoms.cpu().numpy(),
        )

    def locate(self, atom: int) -> tuple[int, int]:
        """Return the structure of an atom and the atom's number in it."""
        k = int(np.searchsorted(self.starts, atom, side="right")) - 1
        return k, atom - int(self.starts[k])


def structure_name(index: int, numbers: NDArray[np.int64], name: str | None = None) -> str:
    """Return how errors call a structure: its name or place in the list, and its formula."""
    title = name if name is not None else f"structure {index}"
    exist = ((numbers >= 0) & (numbers < len(chemical_symbols))).all()
    formula = Symbols(numbers).get_chemical_formula() if exist else ""
    return f"{title} ({formula})" if formula else title


def _validate(
    arrays: _Arrays, known_elements: Collection[int] | None = None, name: str | None = None
) -> None:
    def describe(k: int) -> str:
        return structure_name(k, arrays.numbers[arrays.starts[k] : arrays.starts[k + 1]], name)

    if not arrays.natoms.all():
        k = int(np.flatnonzero(arrays.natoms == 0)[0])
        raise StructureError(f"{describe(k)} has no atoms; leave it out", index=k)
    if not np.isfinite(arrays.pos).all():
        k, atom = arrays.locate(int(np.flatnonzero(~np.isfinite(arrays.pos).all(axis=1))[0]))
        value = arrays.pos[arrays.starts[k] + atom].tolist()
        raise StructureError(
            f"{describe(k)}: position of atom {atom} is {value} Å; positions must be finite "
            "numbers, so look at the file or the step that made them",
            index=k,
        )
    if not np.isfinite(arrays.cell).all():
        k = int(np.flatnonzero(~np.isfinite(arrays.cell).all(axis=(1, 2)))[0])
        raise StructureError(
            f"{describe(k)}: cell is {arrays.cell[k].tolist()} Å; it must be finite numbers, "
            "or zeros where there is no cell",
            index=k,
        )
    _check_elements(arrays, known_elements, describe)
    spanned = spans_periodic_directions(arrays.cell, arrays.pbc)
    if not spanned.all():
        k = int(np.flatnonzero(~spanned)[0])
        raise StructureError(
            f"{describe(k)}: pbc is {arrays.pbc[k].tolist()} but the cell is "
            f"{arrays.cell[k].tolist()} Å; cell vectors of periodic directions must be nonzero and "
            "independent, so give a full cell or set pbc False there",
            index=k,
        )


def _check_elements(
    arrays: _Arrays, known: Collection[int] | None, describe: Callable[[int], str]
) -> None:
    numbers = arrays.numbers
    bad = (numbers < 1) | (numbers > _LAST_ELEMENT)
    if known is not None and not bad.any() and not set(numbers.tolist()) <= set(known):
        allowed = np.zeros(_LAST_ELEMENT + 1, dtype=bool)
        allowed[[z for z in known if z <= _LAST_ELEMENT]] = True
        bad = ~allowed[numbers]
    if not bad.any():
        return
    first = int(np.flatnonzero(bad)[0])
    z = int(numbers[first])
    k, atom = arrays.locate(first)
    if not 1 <= z <= _LAST_ELEMENT:
        raise StructureError(
            f"{describe(k)}: atom {atom} has atomic number {z}; it must be 1 to {_LAST_ELEMENT}, "
            "so replace or remove dummy atoms",
            index=k,
        )
    names = ", ".join(chemical_symbols[number] for number in sorted(known or ()))
    raise StructureError(
        f"{describe(k)}: atom {atom} is {chemical_symbols[z]} (Z = {z}), an element that is not "
        f"known here; known are {names}",
        index=k,
    )


def _check_overlap(arrays: _Arrays, min_distance: float, name: str | None) -> None:
    reach = max(min_distance, _OVERLAP_SEARCH)
    for k, (start, stop) in enumerate(itertools.pairwise(arrays.starts)):
        pos, numbers = arrays.pos[start:stop], arrays.numbers[start:stop]
        try:
            edges, lengths = neighbor_list_with_lengths(pos, arrays.cell[k], arrays.pbc[k], reach)
        except ValueError as error:
            title = structure_name(k, numbers, name)
            raise StructureError(f"{title}: {error}", index=k) from error
        if len(lengths) and lengths.min() < min_distance:
            title = structure_name(k, numbers, name)
            refuse_overlap(title, edges, lengths, min_distance, index=k)


def refuse_overlap(
    title: str,
    edges: Edges,
    lengths: NDArray[np.float64],
    min_distance: float = MIN_DISTANCE,
    *,
    index: int | None = None,
) -> None:
    """Refuse edges so short that two atoms, or an atom and an image, lie on each other.

    Raises:
        StructureError: The shortest edge is below ``min_distance``, Å.
    """
    if len(lengths) == 0 or lengths.min() >= min_distance:
        return
    e = int(lengths.argmin())
    source, target = (int(atom) for atom in edges.edge_index[:, e])
    offset = edges.cell_offsets[e]
    image = f"the image {offset.tolist()} of " if offset.any() else ""
    raise StructureError(
        f"{title}: atom {target} and {image}atom {source} are {lengths[e]:.4g} Å apart, less than "
        f"{min_distance} Å; remove the duplicate atom, or look whether cell and positions are in Å",
        index=index,
    )


def _as_atoms(item: object, index: int, name: str | None = None) -> Atoms:
    if isinstance(item, Atoms):
        if "occupancy" in item.info and (why := partly_occupied_site(item.info)):
            title = structure_name(index, item.numbers, name)
            way_out = "and remove atoms.info['occupancy']"
            raise StructureError(f"{title}: {why}, {way_out}", index=index)
        return item
    if isinstance(item, PymatgenSites):
        return _atoms_of_sites(item, index)
    raise TypeError(
        f"item {index} is a {type(item).__name__}; structures are ase.Atoms, pymatgen Structure or "
        "Molecule, or AtomGraph, or one path of a file"
    )


def _graph_of_atoms(atoms: Atoms, index: int, dtype: torch.dtype) -> AtomGraph:
    fields: dict[str, torch.Tensor] = {}
    if "tags" in atoms.arrays:
        fields["tags"] = torch.tensor(atoms.arrays["tags"], dtype=torch.int64)
    if "masses" in atoms.arrays:  # isotopes; elsewhere standard_masses() knows
        fields["masses"] = torch.tensor(atoms.arrays["masses"], dtype=dtype)
    if "momenta" in atoms.arrays:
        fields["velocities"] = torch.tensor(atoms.get_velocities() * units.fs, dtype=dtype)
    if atoms.constraints:
        fixed = torch.zeros(len(atoms), dtype=torch.bool)
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                fixed[torch.as_tensor(constraint.get_indices(), dtype=torch.int64)] = True
        fields["fixed"] = fixed
    return _unlabelled(atoms, dtype, **fields, **_labels(atoms, index, dtype))


def _unlabelled(atoms: Atoms, dtype: torch.dtype, **fields: torch.Tensor) -> AtomGraph:
    # torch.tensor copies: ASE moves atoms in place, and a graph must not follow.
    return AtomGraph(
        torch.tensor(atoms.positions, dtype=dtype),
        torch.tensor(atoms.numbers, dtype=torch.int64),
        cell=torch.tensor(atoms.cell.array[None], dtype=dtype),
        pbc=torch.tensor(atoms.pbc[None]),
        **electrons_of(atoms),
        **fields,
    )


def _labels(atoms: Atoms, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    results = _results_for(atoms)
    found = {
        "energy": results.get("energy", atoms.info.get("energy")),
        "forces": results.get("forces", atoms.arrays.get("forces")),
        "stress": results.get("stress", atoms.info.get("stress")),
        "weight": atoms.info.get("weight"),
    }
    shapes = {"energy": (1,), "forces": (len(atoms), 3), "stress": (1, 3, 3), "weight": (1,)}
    labels = {}
    for name, value in found.items():
        if value is None:
            continue
        try:
            array = np.asarray(value, dtype=np.float64)
            if name == "stress" and array.size == 6:
                array = voigt_6_to_full_3x3_stress(array.reshape(6))
            array = array.reshape(shapes[name])
        except (TypeError, ValueError) as error:
            title = structure_name(index, atoms.numbers)
            raise StructureError(
                f"{title}: label {name!r} cannot be read as numbers of shape {shapes[name]}: "
                f"{value!r}; rename or remove it",
                index=index,
            ) from error
        if not np.isfinite(array).all():
            title = structure_name(index, atoms.numbers)
            raise StructureError(
                f"{title}: label {name!r} is NaN or infinite; remove the label or the structure",
                index=index,
            )
        labels[name] = torch.tensor(array, dtype=torch.float64 if name == "energy" else dtype)
    return labels


def _results_for(atoms: Atoms) -> dict[str, Any]:
    calculator = atoms.calc
    results = getattr(calculator, "results", None)
    if calculator is None or not results or not hasattr(calculator, "check_state"):
        return {}
    # Results that belong to positions since changed are not labels of this structure.
    stale = calculator.atoms is None or calculator.check_state(atoms)
    return {} if stale else results


def _atoms_of_sites(structure: PymatgenSites, index: int) -> Atoms:
    numbers = []
    for k, site in enumerate(structure.sites):
        z = getattr(site.specie, "Z", None) if site.is_ordered else None
        if not isinstance(z, int) or not 1 <= z <= _LAST_ELEMENT:
            raise StructureError(
                f"structure {index}: site {k} holds {site.species_string}, not one element; make "
                "it an ordered structure first, for example with "
                "OrderDisorderedStructureTransformation of pymatgen",
                index=index,
            )
        numbers.append(z)
    lattice = getattr(structure, "lattice", None)
    atoms = Atoms(
        numbers=numbers,
        positions=np.asarray(structure.cart_coords).reshape(-1, 3),
        cell=None if lattice is None else lattice.matrix,
        pbc=False if lattice is None else lattice.pbc,
    )
    site_properties = getattr(structure, "site_properties", {})
    if "tags" in site_properties:
        atoms.set_tags(site_properties["tags"])
    if "selective_dynamics" in site_properties:
        atoms.set_constraint(FixAtoms(mask=~np.any(site_properties["selective_dynamics"], axis=1)))
    if "forces" in site_properties:
        atoms.arrays["forces"] = np.asarray(site_properties["forces"], dtype=np.float64)
    properties = getattr(structure, "properties", None) or {}
    atoms.info.update(electrons_of_sites(structure))
    atoms.info.update({key: properties[key] for key in ("energy", "stress") if key in properties})
    return atoms
