"""The way out: graphs and results of a calculation as structures of ASE and pymatgen.

``convert`` is the way in; what goes out here comes back there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import Structures, from_structures
from atomeq.graph.hyperedges import INFO_KEY, Hyperedges
from atomeq.graph.neighbors import complete_cell
from atomeq.typing import ElectricProperty

if TYPE_CHECKING:
    from pymatgen.core import Molecule, Structure

_VACUUM = 20.0  # Å, beyond the atoms along a direction that has no lattice vector


def to_ase(graph: AtomGraph) -> list[Atoms]:
    """Make one Atoms of each structure: hyperedges in its info, labels as calculator results.

    Args:
        graph: Of one or many structures.

    Returns:
        One Atoms for each structure.
    """
    here = graph.to("cpu")
    return [
        _atoms_of_graph(single) for single in ([here] if here.n_graphs == 1 else here.to_list())
    ]


def to_pymatgen(structures: Structures) -> "list[Structure | Molecule]":
    """Make a Structure of each periodic structure, and a Molecule of each other.

    Site properties are ``forces`` (3,) eV/Å, ``velocities`` (3,) Å/fs, ``tags``, and
    ``selective_dynamics`` where atoms are fixed; properties are ``energy`` in eV and ``stress``
    (3, 3) eV/Å³, positive when stretched: each where it is known. A slab or wire without a lattice
    vector along an open direction gets one that leaves 20 Å of vacuum; a molecule has no cell.

    Args:
        structures: One or many: AtomGraphs, as those of relaxation outcomes, or ASE's Atoms.

    Returns:
        One Structure or Molecule for each structure, in their order.

    Raises:
        StructureError: A structure is not usable.

    Example:
        >>> for outcome in atomeq.relax(structures, "cu-pbe"):  # doctest: +SKIP
        ...     structure = to_pymatgen(outcome.graph)[0]
    """
    return [_of_atoms(atoms) for atoms in to_ase(from_structures(structures))]


def _of_atoms(atoms: Atoms) -> "Structure | Molecule":
    from pymatgen.io.ase import AseAtomsAdaptor  # loads in seconds

    results = {} if atoms.calc is None else atoms.calc.results
    velocities = atoms.get_velocities() * units.fs if atoms.has("momenta") else None
    bare: Any = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.set_constraint(atoms.constraints)
    if atoms.has("tags"):
        bare.set_tags(atoms.get_tags())
    if atoms.pbc.any():
        bare.set_cell(_with_vacuum(atoms))
        found = AseAtomsAdaptor.get_structure(bare)
    else:
        found = AseAtomsAdaptor.get_molecule(bare)
    for name, values in (("forces", results.get("forces")), ("velocities", velocities)):
        if values is not None:
            found.add_site_property(name, values.tolist())
    if "energy" in results:
        found.properties["energy"] = float(results["energy"])
    if "stress" in results:
        found.properties["stress"] = voigt_6_to_full_3x3_stress(results["stress"]).tolist()
    return found


def _with_vacuum(atoms: Atoms) -> np.ndarray:
    """Return the cell (3, 3), Å, with a vector along each direction that lacks one."""
    cell = atoms.cell.array
    if abs(np.linalg.det(cell)) > 0:
        return cell
    completed = complete_cell(cell, atoms.pbc)  # unit normals along the open directions
    extent = np.ptp(atoms.positions @ np.linalg.inv(completed), axis=0)
    completed[~atoms.pbc] *= (extent + _VACUUM)[~atoms.pbc, None]
    return completed


def _atoms_of_graph(graph: AtomGraph) -> Atoms:
    def array(name: str) -> NDArray[np.float64]:
        return graph[name].detach().numpy().astype(np.float64)

    atoms = Atoms(
        numbers=graph.atomic_numbers.numpy(),
        positions=array("pos"),
        cell=array("cell")[0],
        pbc=graph.pbc[0].numpy(),
    )
    if "tags" in graph:
        atoms.set_tags(graph["tags"].numpy())
    if "masses" in graph:
        atoms.set_masses(array("masses").tolist())
    # Before the constraints, which would stop the atoms they fix.
    if "velocities" in graph:
        atoms.set_velocities(array("velocities") / units.fs)
    if "fixed" in graph and bool(graph["fixed"].any()):
        atoms.set_constraint(FixAtoms(mask=graph["fixed"].numpy()))
    for name in _known(graph, ("forces_uncertainty", "born_effective_charges")):
        values = array(name)
        atoms.set_array(name, values.reshape(len(atoms), -1) if values.ndim > 2 else values)
    atoms.info.update(_info_of_graph(graph))
    results: dict[str, Any] = {
        name: array(name) for name in _known(graph, ("energy", "forces", "stress"))
    }
    if "energy" in results:
        results["energy"] = results["energy"].item()
    if "stress" in results:
        results["stress"] = full_3x3_to_voigt_6_stress(results["stress"][0])
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _known(graph: AtomGraph, names: Sequence[str]) -> list[str]:
    """Return those of some fields that are there, and everywhere a number."""
    return [name for name in names if name in graph and bool(torch.isfinite(graph[name]).all())]


def _info_of_graph(graph: AtomGraph) -> dict[str, Any]:
    plain = ("weight", "energy_uncertainty", "charge")
    info: dict[str, Any] = {name: float(graph[name][0]) for name in plain if name in graph}
    for name in _known(graph, get_args(ElectricProperty)):
        info[name] = graph[name][0].detach().numpy().astype(np.float64)
    if "multiplicity" in graph and graph["multiplicity"][0]:
        info["multiplicity"] = int(graph["multiplicity"][0])
    if "num_hyperedges" in graph:
        info[INFO_KEY] = Hyperedges.of_graph(graph).to_info()
    return info
