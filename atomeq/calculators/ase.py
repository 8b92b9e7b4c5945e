"""AtomeqCalculator: a potential as an ASE calculator; here, and only here, stress becomes Voigt.

ASE keeps ``atoms`` and ``results`` of the last calculation on the calculator. Here they belong to
the thread that asked, so that one calculator can serve many threads; the potential is read only.
"""

import copy
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.graph.convert import validate_structure
from atomeq.potential.checkpoint import (
    WEIGHTS_FILE,
    find_potential,
    load_potential,
    not_a_potential,
    resolve_device,
    sha256,
)
from atomeq.potential.potential import Potential
from atomeq.potential.scalar import ScalarPredictor
from atomeq.typing import PropertyKey

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_SKIN = 0.6  # Å; a search costs little beside a network, a larger skin means more pairs to measure
_MIN_VOLUME = 1e-6  # Å³


class AtomeqCalculator(Calculator):
    """Energy, forces and stress of a potential, for everything ASE does with calculators.

    One instance may be shared by threads, pickled and copied. It holds a frozen copy of the
    potential it was given: training that potential further does not change it.

    Asked for forces or stress it computes the energy along. What was asked of the previous
    structure is computed at once for the next, so that dynamics at constant pressure and
    relaxations of a cell, which ask for forces and then for stress, take one pass per step.

    Args:
        potential: Name of a shipped potential, folder of a saved one, or a :class:`Potential`.
        device: Where to compute; by default where the potential is, the CPU for a name or folder.
        dtype: ``"float32"``, ``"float64"`` or the torch dtype the network computes in; by default
            the potential's own. Energies are summed in float64 in any case, and all arrays that are
            returned are float64, as ASE's integrators expect.

    Raises:
        CheckpointError: The potential does not exist or is damaged.
        ValueError: The device is not available, or the dtype is neither of the two.

    Example:
        >>> atoms = ase.build.bulk("Cu")  # doctest: +SKIP
        >>> atoms.calc = AtomeqCalculator("cu-pbe", dtype="float64")  # doctest: +SKIP
        >>> atoms.get_potential_energy()  # doctest: +SKIP
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012
    # A potential does not see them, so a change of theirs keeps the results.
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        potential: str | Path | Potential,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self._local = threading.local()  # first: ASE's constructor assigns atoms and results
        super().__init__()
        self.potential = _frozen(potential, device, _resolve_dtype(dtype))
        self._origin = None if isinstance(potential, Potential) else str(potential)
        self._builder = self.potential.model.graph_builder()
        if not self.potential.conservative:
            self.implemented_properties = ["energy", "free_energy", "energies", "forces"]

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
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return self.potential.dtype

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.potential.device

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers the potential knows."""
        return self.potential.elements

    @property
    def exempt_laws(self) -> Mapping[str, str]:
        """Laws of physics that the model cannot keep by construction, and why."""
        return self.potential.model.exempt_laws

    @property
    def provenance(self) -> dict[str, str | None]:
        """Where the potential came from: ``name`` as it was given, ``folder`` and ``sha256``.

        The hash is that of the weights file, or of configuration and weights where there is none.
        """
        if self._origin is None:
            return {"name": None, "folder": None, "sha256": _hash_of(self.potential)}
        folder = find_potential(self._origin)
        return {
            "name": self._origin,
            "folder": str(folder.resolve()),
            "sha256": sha256(folder / WEIGHTS_FILE),
        }

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """Return a property, computing it where this thread's last results do not hold it."""
        value = super().get_property(name, atoms, allow_calculation)
        self._asked.add(name)
        return value

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
        """
        atoms = self.atoms if atoms is None else atoms
        if atoms is None:
            raise ValueError("this calculator has no structure yet; pass one")
        if "stress" in properties and not has_volume(atoms):
            raise PropertyNotImplementedError(
                f"stress needs a cell that is periodic in three directions and has a volume; "
                f"{atoms.get_chemical_formula()} has pbc {atoms.pbc.tolist()} and a cell of "
                f"{abs(np.linalg.det(atoms.cell.array)):.3g} Å³"
            )
        graph = self._graph(atoms)
        computed = self.potential(graph, self._to_compute(atoms, properties, system_changes))
        results = {key: value.detach().cpu().numpy() for key, value in computed.items()}
        if system_changes:
            self.results = {}
            self._local.asked = set()
        self.atoms = atoms.copy()
        self.results.update(_in_ase_form(results))

    def get_spin_polarized(self) -> bool:
        """Say that there are no spins."""
        return False

    @property
    def _asked(self) -> set[str]:
        """What this thread asked of its current structure."""
        return self._local.__dict__.setdefault("asked", set())

    def _to_compute(
        self, atoms: Atoms, properties: Sequence[str], system_changes: Sequence[str]
    ) -> tuple[PropertyKey, ...]:
        wanted = set(properties)
        if system_changes:
            wanted |= self._asked
        keys: list[PropertyKey] = ["energy", "energies"]
        if "forces" in wanted:
            keys.append("forces")
        if "stress" in wanted and has_volume(atoms):
            keys.append("stress")
        return tuple(keys)

    def _graph(self, atoms: Atoms) -> AtomGraph:
        """Build the graph, with the neighbours this thread remembers where the model allows."""
        bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)  # no labels
        validate_structure(bare, known_elements=self.elements, min_distance=None)
        if type(self._builder) is not RadiusGraph:
            return self.potential.build_graph(bare)
        if not hasattr(self._local, "builder"):
            self._local.builder = RadiusGraph(self._builder.cutoff, skin=_SKIN)
        return self._local.builder(bare).to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_local"}
        # Weights travel by way of the CPU: the other side may have no such device.
        state["potential"] = copy.deepcopy(self.potential).cpu()
        return {**state, "device": str(self.device), "atoms": self.atoms, "results": self.results}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()
        device = resolve_device(state.pop("device"))
        self.atoms, self.results = state.pop("atoms"), state.pop("results")
        vars(self).update(state)
        self.potential.to(device)


def has_volume(atoms: Atoms) -> bool:
    """Whether a structure is periodic in three directions that span a volume."""
    return bool(atoms.pbc.all() and abs(np.linalg.det(atoms.cell.array)) > _MIN_VOLUME)


def _frozen(
    potential: str | Path | Potential,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Potential:
    """Return a potential of the calculator's own, without gradients of its parameters."""
    if isinstance(potential, ScalarPredictor):
        raise ValueError(not_a_potential(potential, "the model given to the calculator"))
    if isinstance(potential, torch.nn.Module) and not isinstance(potential, Potential):
        raise ValueError(
            f"a {type(potential).__name__} is no potential: it gives no energies. A model becomes "
            "one in Potential(model); a propagator is for `atomeq rollout`"
        )
    if not isinstance(potential, Potential):
        return load_potential(potential, device=device, dtype=dtype)
    target = potential.device if device is None else resolve_device(device)
    frozen = copy.deepcopy(potential).to(target).to(dtype if dtype is not None else potential.dtype)
    return frozen.requires_grad_(False).eval()


def _resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'float64', not {name!r}")
    return _DTYPES[name]


def _in_ase_form(results: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turn a batch of one into ASE's properties: scalars, float64 arrays, stress in Voigt order."""
    energy = float(results["energy"][0])
    converted: dict[str, Any] = {
        "energy": energy,
        "free_energy": energy,  # no electrons, no entropy
        "energies": results["energies"],
    }
    if "forces" in results:
        converted["forces"] = results["forces"].astype(np.float64)
    if "stress" in results:
        stress = results["stress"][0].astype(np.float64)
        converted["stress"] = full_3x3_to_voigt_6_stress(stress)
    return converted


def _hash_of(potential: Potential) -> str:
    digest = hashlib.sha256(json.dumps(potential.model.config(), default=str).encode())
    for name, tensor in sorted(potential.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
