"""AtomeqCalculator: a potential as an ASE calculator; here, and only here, stress becomes Voigt.

ASE keeps ``atoms`` and ``results`` of the last calculation on the calculator. Here they belong to
the thread that asked, so that one calculator can serve many threads; the potential is read only.
"""

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableSet, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from atomeq.graph.atom_graph import MIN_VOLUME, AtomGraph
from atomeq.graph.builders import HyperGraph, RadiusGraph
from atomeq.graph.convert import (
    StructureError,
    StructureLike,
    Structures,
    bare_graph,
    from_structures,
    structure_list,
)
from atomeq.graph.electrons import electrons_of
from atomeq.graph.hyperedges import Hyperedges
from atomeq.graph.moving import MovingNeighbors
from atomeq.graph.neighbors import SKIN
from atomeq.graph.rewiring import in_batches
from atomeq.graph.to_structures import to_ase
from atomeq.graph.topology import KeptTopologies
from atomeq.potential.checkpoint import resolve_device, resolve_dtype
from atomeq.potential.committee import Committee, frozen, provenance_of
from atomeq.potential.potential import ELECTRIC, Potential
from atomeq.potential.terms import EnergyTerm
from atomeq.potential.uncertainty import UNCERTAINTIES
from atomeq.potential.untrusted import refuse_meta_device
from atomeq.typing import OF_STRUCTURES, Precision, PropertyKey

#: Asked of a committee, what its members' spread is called.
SPREADS = ("energy_std", "energies_std", "forces_std", "stress_std")

_MAX_EDGES = 60_000  # of one batch; larger ones are no faster on a core and need more memory

_HEAD = "a potential with a force head{} has no {}: its forces are no derivative of an energy"
_NOT_GIVEN = {
    "stress": _HEAD.format(" and none for the stress", "stress"),
    "hessian": _HEAD.format("", "Hessian"),
    "stresses": (
        "a potential gives no stresses of atoms: an energy that depends on many atoms at once can "
        "be divided between them in many ways, all with the same sum; take 'stress', the sum"
    ),
    **dict.fromkeys(
        UNCERTAINTIES,
        "only one calibrated by `atomeq calibrate` gives it; of a committee ask for energy_std",
    ),
}


class AtomeqCalculator(Calculator):
    """Energy, forces, stress and Hessian of a potential, for everything ASE does with calculators.

    Given several potentials it is their committee: every result is their mean, and ``energy_std``,
    ``energies_std``, ``forces_std`` and ``stress_std`` are their standard deviation (of n - 1).
    One with electric moments gives ``dipole``, ``quadrupole``, ``polarizability`` (3, 3) and
    ``born_effective_charges`` (n_atoms, 3, 3), in e, Å and eV.
    A potential that was calibrated gives ``energy_uncertainty``, ``forces_uncertainty`` and
    ``extrapolation`` (:class:`~atomeq.potential.uncertainty.LastLayerUncertainty`), the folder of a
    committee the first two, its members' spread (:class:`~atomeq.potential.mean.MeanPotential`).

    One instance may be shared by threads, pickled and copied. It holds a frozen copy of the
    potential it was given: training that potential further does not change it.

    Asked for forces or stress it computes the energy along. What was asked of the previous
    structure is computed at once for the next, so that dynamics at constant pressure and
    relaxations of a cell, which ask for forces and then for stress, take one pass per step.

    A potential of hypergraphs perceives the bonds of an Atoms object when it is first computed, and
    the object keeps them as it moves; :func:`~atomeq.graph.hyperedges.fix_topology` rebuilds them.

    Args:
        potential: Name of a shipped potential, folder of a saved one (``FOLDER@HEAD`` of several
            heads), or a :class:`Potential`; or a sequence of those, a committee.
        device: Where to compute; by default where the potential is, the CPU for a name or folder.
        dtype: ``"float32"``, ``"float64"`` or the torch dtype the network computes in; by default
            the potential's own. Energies are summed in float64 in any case, and all arrays that are
            returned are float64, as ASE's integrators expect.
        precision: How coarse the operands of tensor products may be on a GPU: ``"highest"``,
            ``"high"`` or ``"medium"``, fp32, TF32 or bfloat16; by default what the potential
            recommends. Other calculators of the process keep theirs.
        capture: Replay what was sent for a small moving system, on CUDA from a CUDA graph; False,
            or ``ATOMEQ_CAPTURE=0`` in the environment, evaluates it anew each time.
        terms: Known physics to add to each potential, ``[ZBL(0.65)]`` say, the repulsion of nuclei
            where they are closer than the data of published potentials.
        ignore: ``charge`` and ``spin``: compute structures that carry a total charge or a
            multiplicity as if they did not. A potential that is not told of them refuses such.

    Raises:
        CheckpointError: The potential does not exist or is damaged.
        ValueError: A potential takes no terms, the device is not available, or the dtype is neither
            of the two.

    Example:
        >>> atoms = ase.build.bulk("Cu")  # doctest: +SKIP
        >>> atoms.calc = AtomeqCalculator("cu-pbe", dtype="float64")  # doctest: +SKIP
        >>> atoms.get_potential_energy()  # doctest: +SKIP
    """

    implemented_properties = [  # noqa: RUF012
        *("energy", "free_energy", "energies", "forces", "stress", "hessian")
    ]
    # What they say of the total charge is looked at in check_state; of themselves nothing is seen.
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        potential: str | Path | Potential | Sequence[str | Path | Potential],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        precision: Precision | None = None,
        capture: bool = True,
        terms: Sequence[EnergyTerm] = (),
        ignore: Sequence[str] = (),
    ) -> None:
        self._local = threading.local()  # first: ASE's constructor assigns atoms and results
        super().__init__()
        alone = isinstance(potential, str | Path | torch.nn.Module)  # of modules, frozen() says it
        members = [potential] if alone else list(potential)
        how: dict[str, Any] = {"device": device, "dtype": resolve_dtype(dtype)}
        how |= {"terms": terms, "precision": precision, "ignore": ignore}
        self._committee = Committee([frozen(one, **how) for one in members], capture=capture)
        hypergraphs = [one for one in self._committee.builders if isinstance(one, HyperGraph)]
        self.molecules_only = any(one.perceive for one in hypergraphs)  # crystals have no topology
        self._topologies = KeptTopologies(perceive=self.molecules_only)
        self._sees_topology = bool(hypergraphs)
        self._origins = [None if isinstance(one, Potential) else str(one) for one in members]
        self.implemented_properties = _properties(self._committee)
        names = [one.name for one in self.potentials]
        self.parameters = {
            "potential": names[0] if len(names) == 1 else names,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }
        if self.potential.precision is not None:
            self.parameters["precision"] = self.potential.precision

    def __repr__(self) -> str:
        """Name the potential, or those of a committee, the precision and the device."""
        name, dtype, device, *_ = self.parameters.values()
        return f"AtomeqCalculator({name!r}, device={device!r}, dtype={dtype!r})"

    def set(self, **parameters: Any) -> dict[str, Any]:
        """Refuse to change parameters: another potential, dtype or device is another calculator.

        Raises:
            ValueError: There is something to change.
        """
        if parameters:
            raise ValueError(
                f"{next(iter(parameters))!r} of a calculator is fixed; make another "
                "AtomeqCalculator(potential, device=..., dtype=...)"
            )
        return {}

    def _get_name(self) -> str:
        return "atomeq"

    @property
    def atoms(self) -> Atoms | None:
        """The structure of this thread's last calculation."""
        return getattr(self._local, "atoms", None)

    @atoms.setter
    def atoms(self, atoms: Atoms | None) -> None:
        self._local.atoms = atoms

    @property
    def results(self) -> dict[str, Any]:
        """What this thread's last calculation gave."""
        results: dict[str, Any] = self._local.__dict__.setdefault("results", {})
        return results

    @results.setter
    def results(self, results: dict[str, Any]) -> None:
        self._local.results = results

    @property
    def potentials(self) -> tuple[Potential, ...]:
        """The members of the committee; one, where there is no other."""
        return self._committee.members

    @property
    def potential(self) -> Potential:
        """The potential; the first of a committee."""
        return self.potentials[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return self.potential.dtype

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.potential.device

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers the potential knows, and every other of a committee."""
        return self._committee.elements

    @property
    def exempt_laws(self) -> Mapping[str, str]:
        """Laws of physics that the model cannot keep by construction, and why."""
        return self.potential.model.exempt_laws

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the potential came from: ``name`` as it was given, ``folder`` and ``sha256``.

        The hash is that of the weights file, or of configuration and weights where there is none.
        A committee has these of each under ``members``.
        """
        each = [
            provenance_of(origin, potential)
            for origin, potential in zip(self._origins, self.potentials, strict=True)
        ]
        return each[0] if len(each) == 1 else {"members": each}

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """Return a property, computing it where this thread's last results do not hold it.

        Raises:
            PropertyNotImplementedError: The potential does not give it; the message says why.
        """
        if name not in self.implemented_properties and name in _NOT_GIVEN:
            raise PropertyNotImplementedError(_NOT_GIVEN[name])
        value = super().get_property(name, atoms, allow_calculation)
        self._asked.add(name)
        return value

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what differs from this thread's last calculation, the topology included."""
        last = self.atoms
        if last is None or tol > 1e-15:
            changes = super().check_state(atoms, tol)
        else:  # what compare_atoms finds, for a structure of few atoms ten times as fast
            changes = [
                name
                for name in ("positions", "numbers", "cell", "pbc")
                if not np.array_equal(getattr(last, name), getattr(atoms, name))
            ]
        if not changes and last is not None and electrons_of(last) != electrons_of(atoms):
            changes = ["info"]
        if not changes and self._topology(atoms) != getattr(self._local, "topology", None):
            changes = ["info"]
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Compute properties of a structure into :attr:`results`.

        Args:
            atoms: The structure; not modified. By default the one of the last calculation.
            properties: Names of ASE properties.
            system_changes: What differs from the last calculation.

        Raises:
            StructureError: The structure is empty, holds NaN, infinity or an unknown element, is
                periodic without a cell, or has overlapping atoms.
            PropertyNotImplementedError: The stress of a structure that is not fully periodic.
            NotFiniteError: The potential gives NaN or infinity.
        """
        atoms = self.atoms if atoms is None else atoms
        if atoms is None:
            raise ValueError("this calculator has no structure yet; pass one")
        if any("stress" in name for name in properties) and not has_volume(atoms):
            raise PropertyNotImplementedError(
                f"stress needs a cell that is periodic in three directions and has a volume; "
                f"{atoms.get_chemical_formula()} has pbc {atoms.pbc.tolist()} and a cell of "
                f"{abs(np.linalg.det(atoms.cell.array)):.3g} Å³"
            )
        graphs = self._graphs(atoms)
        keys = self._to_compute(atoms, properties, system_changes)
        results = self._committee.evaluate(graphs, keys)
        if system_changes:
            self.results = {}
            self._local.asked = set()
        self.atoms = atoms.copy()
        self._local.topology = self._topology(atoms)
        self.results.update(_in_ase_form(results))
        if "hessian" in properties:
            self.results["hessian"] = self._committee.hessian(graphs, max_edges=_MAX_EDGES)

    def get_hessian(self, atoms: Atoms | None = None) -> NDArray[np.float64]:
        """Return the second derivatives of the energy, (3 n_atoms, 3 n_atoms), eV/Å².

        Of ``atoms``, by default those of the last calculation. They are exact, by differentiating
        the forces, and symmetric. Memory grows with the square of the number of atoms.
        """
        return self.get_property("hessian", atoms)

    def get_vibrations(self, atoms: Atoms, *, indices: Sequence[int] | None = None) -> Any:
        """Return ASE's VibrationsData from the exact Hessian.

        Args:
            atoms: A structure at a minimum or saddle point.
            indices: Atoms that vibrate; by default all that are not fixed.
        """
        from ase.vibrations import VibrationsData  # brings matplotlib

        if indices is None:
            indices = VibrationsData.indices_from_constraints(atoms)
        rows = (3 * np.asarray(indices, dtype=int)[:, None] + np.arange(3)).ravel()
        hessian = self.get_hessian(atoms)[np.ix_(rows, rows)]
        return VibrationsData.from_2d(atoms, hessian, indices=indices)

    def evaluate(
        self,
        structures: Structures,
        properties: Sequence[str] = ("energy", "forces"),
        *,
        max_edges: int = _MAX_EDGES,
    ) -> list[dict[str, Any]]:
        """Compute properties of many structures in batches, beside and apart from :attr:`results`.

        Args:
            structures: Of any kinds, mixed: ASE's Atoms, pymatgen's Structures or Molecules; or the
                path of a file that ASE reads.
            properties: Names of ASE properties, all but the Hessian.
            max_edges: How many edges are computed at once; a larger structure goes alone.

        Returns:
            For each structure what :meth:`calculate` leaves in the results.

        Raises:
            StructureError: A structure is not usable; the message says which.
            ValueError: The Hessian, or the stress of a structure without volume, was asked for.
        """
        allowed = [name for name in self.implemented_properties if name != "hessian"]
        unknown = [name for name in properties if name not in allowed]
        if unknown:
            raise ValueError(f"evaluate does not give {unknown[0]!r}; it gives {allowed}")
        keys = _keys(properties)
        found: list[dict[str, Any]] = []
        graphs = self._built(structures, stress="stress" in keys)
        for batch in in_batches(graphs, max_edges):
            others = [builder(batch) for builder in self._committee.builders[1:]]
            results = self._committee.evaluate([batch, *others], keys, first=len(found))
            stops = np.cumsum(batch.natoms.cpu().numpy())
            for k, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
                found.append(_in_ase_form(_of_structure(results, k, slice(start, stop))))
        return found

    def get_spin_polarized(self) -> bool:
        """Return that there are no spins."""
        return False

    @property
    def _asked(self) -> MutableSet[str]:
        """What this thread asked of its current structure."""
        return self._local.__dict__.setdefault("asked", set())

    def _to_compute(
        self, atoms: Atoms, properties: Sequence[str], system_changes: Sequence[str]
    ) -> tuple[PropertyKey, ...]:
        wanted = set(properties)
        if system_changes:
            wanted |= self._asked
        return _keys(name for name in wanted if "stress" not in name or has_volume(atoms))

    def _topology(self, atoms: Atoms, index: int = 0) -> Hyperedges | None:
        return self._topologies.of(atoms, index=index) if self._sees_topology else None

    def _bare(self, structure: StructureLike, index: int = 0) -> AtomGraph:
        """Return a valid structure without edges, labels and velocities, with its hyperedges."""
        refuse_meta_device()
        atoms = structure if isinstance(structure, Atoms) else to_ase(from_structures(structure))[0]
        bare = bare_graph(atoms, name=f"structure {index}", known_elements=self._committee.elements)
        if self._sees_topology and (topology := self._topology(atoms, index)) is not None:
            bare = bare.replace(**topology.fields(n_atoms=len(atoms)))
        return bare

    def _graphs(self, atoms: Atoms) -> list[AtomGraph]:
        """Return the graph of each builder, with the neighbours that this thread remembers."""
        bare, memory = self._bare(atoms), self._local.__dict__.setdefault("builders", {})
        device, graphs = self.device, []
        for k, builder in enumerate(self._committee.builders):
            if type(builder) is RadiusGraph:
                if k not in memory:
                    memory[k] = MovingNeighbors(builder.cutoff, SKIN)
                builder = memory[k]
            graph = builder.connect(bare)
            graphs.append(graph if device.type == "cpu" else graph.to(device))
        return graphs

    def _built(self, structures: Structures, *, stress: bool) -> Iterator[AtomGraph]:
        """Yield the graph of each structure for the first member."""
        for k, structure in enumerate(structure_list(structures)):
            bare = self._bare(structure, k)
            if stress and not (bare.pbc.all() and bare.volume() > MIN_VOLUME):
                raise StructureError(
                    f"structure {k}: stress needs three periodic directions and a volume", index=k
                )
            yield self._committee.builders[0].connect(bare).to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_local"}
        # Weights travel by way of the CPU: the other side may have no such device.
        members = [copy.deepcopy(one).cpu() for one in self.potentials]
        state["_committee"] = Committee(members, capture=self._committee.capture)
        return {**state, "device": str(self.device), "atoms": self.atoms, "results": self.results}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()
        device = resolve_device(state.pop("device"))
        self.atoms, self.results = state.pop("atoms"), state.pop("results")
        vars(self).update(state)
        for potential in self.potentials:
            potential.to(device)


def has_volume(atoms: Atoms) -> bool:
    """Whether a structure is periodic in three directions that span a volume."""
    return bool(atoms.pbc.all() and abs(np.linalg.det(atoms.cell.array)) > MIN_VOLUME)


def _properties(committee: Committee) -> list[str]:
    """Return what a committee can compute."""
    if not committee.members[0].gives_energies:
        return list(committee.members[0].electric)
    names = ["energy", "free_energy", "energies", "forces"]
    if committee.gives_stress:
        names.append("stress")
    if committee.twice_differentiable:
        names.append("hessian")
    if len(committee.members) == 1:
        names += [*committee.members[0].uncertainties, *committee.members[0].electric]
    if len(committee.members) > 1:
        names += [name for name in SPREADS if name.removesuffix("_std") in names]
    return names


def _keys(names: Iterable[str]) -> tuple[PropertyKey, ...]:
    """Return what a potential must be asked for to give ASE's properties."""
    wanted = {name.removesuffix("_std") for name in names}
    keys: list[PropertyKey] = ["energy", "energies"] if wanted - set(ELECTRIC) else []
    if "forces" in wanted:
        keys.append("forces")
    if "stress" in wanted:
        keys.append("stress")
    return (*keys, *(name for name in (*ELECTRIC, *UNCERTAINTIES) if name in wanted))


def _of_structure(results: Mapping[str, NDArray], k: int, atoms: slice) -> dict[str, NDArray]:
    """Return the results of the k-th structure of a batch, as a batch of one."""
    return {
        key: value[k : k + 1] if key.removesuffix("_std") in OF_STRUCTURES else value[atoms]
        for key, value in results.items()
    }


def _in_ase_form(results: Mapping[str, NDArray]) -> dict[str, Any]:
    """Turn a batch of one into ASE's properties: scalars, float64 arrays, stress in Voigt order."""
    converted: dict[str, Any] = {}
    for key, value in results.items():
        name = key.removesuffix("_std")
        if name in ("energy", "energy_uncertainty"):
            converted[key] = float(value[0])
        elif name == "stress":
            converted[key] = full_3x3_to_voigt_6_stress(value[0].astype(np.float64))
        elif name in OF_STRUCTURES:
            converted[key] = value[0].astype(np.float64)
        else:
            converted[key] = value.astype(np.float64)
    if "energy" in converted:
        converted["free_energy"] = converted["energy"]  # no electrons, no entropy
    return converted
