"""OC20Frame: a slab with an adsorbate and its labels, whatever file it came from.

Each format of OC20 (arXiv:2010.09990) is read by a class of :class:`Shards`; oc20.py opens them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from numpy.typing import NDArray

from atomeq.data.ase_files import DataError

#: Which energy a frame is labelled with; see :meth:`OC20Frame.target`.
EnergyKind: TypeAlias = Literal["stored", "total", "referenced"]


@dataclass(frozen=True, eq=False)
class OC20Frame:
    """One structure: a slab with an adsorbate, and what is known of it.

    Attributes:
        numbers: (n_atoms,) int64.
        positions: (n_atoms, 3), Å.
        cell: (3, 3), Å; periodic in all directions, as OC20 was computed.
        tags: (n_atoms,) 0 below the surface, 1 surface, 2 adsorbate.
        fixed: (n_atoms,) atoms held during relaxation; no loss or metric counts them.
        energy: eV; what the file holds, which in an LMDB may be total or referenced.
        forces: (n_atoms, 3), eV/Å.
        reference_energy: eV of slab and gas-phase adsorbate, where the file has it; ``energy`` is
            then the total.
        sid: System, the number in ``random1000``.
        fid: Frame of its trajectory.
        relaxed_energy: eV, referenced: IS2RE's label.
        initial_energy: eV, referenced, of an IS2RE system.
        relaxed_positions: (n_atoms, 3), Å: IS2RS's label.
        pbc: (3,).
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    tags: NDArray[np.int64]
    fixed: NDArray[np.bool_]
    energy: float | None = None
    forces: NDArray[np.float64] | None = None
    reference_energy: float | None = None
    sid: int | None = None
    fid: int | None = None
    relaxed_energy: float | None = None
    initial_energy: float | None = None
    relaxed_positions: NDArray[np.float64] | None = None
    pbc: tuple[bool, bool, bool] = (True, True, True)

    def __post_init__(self) -> None:
        n_atoms = len(self.numbers)
        shapes = {
            "numbers": (n_atoms,),
            "positions": (n_atoms, 3),
            "cell": (3, 3),
            "tags": (n_atoms,),
            "fixed": (n_atoms,),
            "forces": (n_atoms, 3),
            "relaxed_positions": (n_atoms, 3),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise DataError(f"{name} has shape {value.shape}, for {n_atoms} atoms not {shape}")

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.numbers)

    def target(self, kind: EnergyKind = "stored") -> float | None:
        """Return the energy to train on, eV; None where the frame has no label.

        Args:
            kind: ``total`` is that of DFT; ``referenced`` is OC20's target, minus slab and gas;
                ``stored`` is the referenced one where the file gives a reference, else what it
                holds. An IS2RE frame's target is its relaxed energy.

        Raises:
            DataError: The file does not tell that energy.
        """
        if self.energy is None or self.relaxed_energy is not None:
            return self.relaxed_energy
        if self.reference_energy is None:
            if kind == "stored":
                return self.energy
            raise DataError(
                f"the file does not say whether its energy is {kind}: it has no reference energy; "
                "take energy='stored'"
            )
        return self.energy if kind == "total" else self.energy - self.reference_energy

    def to_atoms(self) -> Atoms:
        """Return ASE's Atoms: labels in ``calc``, identity and IS2RE energies in ``info``."""
        atoms = Atoms(self.numbers, self.positions, cell=self.cell, pbc=self.pbc, tags=self.tags)
        if self.fixed.any():
            atoms.set_constraint(FixAtoms(mask=self.fixed))
        atoms.info.update(
            (key, value)
            for key in ("sid", "fid", "relaxed_energy", "initial_energy", "reference_energy")
            if (value := getattr(self, key)) is not None
        )
        results = {"energy": self.energy, "forces": self.forces}
        known = {key: value for key, value in results.items() if value is not None}
        if known:
            atoms.calc = SinglePointCalculator(atoms, **known)
        return atoms


class Shards:
    """Files one after another; a subclass reads frame k of file f."""

    def __init__(self, files: Sequence[Path], sizes: Sequence[int]) -> None:
        self.files = list(files)
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> OC20Frame:
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        k = index - (int(self._ends[shard - 1]) if shard else 0)
        try:
            return self._frame(shard, k)
        except DataError as error:
            raise DataError(f"{self.files[shard]}, frame {k}: {error}") from error

    def __iter__(self) -> Iterator[OC20Frame]:
        for index in range(len(self)):
            yield self[index]

    def _frame(self, shard: int, k: int) -> OC20Frame:
        raise NotImplementedError


def frame_of_record(record: dict[str, Any]) -> OC20Frame:
    """Return the frame of a record's fields, under today's names or those of older files.

    Raises:
        DataError: A field is missing, or is not what it should be.
    """
    for name in ("pos", "atomic_numbers", "cell"):
        if name not in record:
            raise DataError(f"has no field {name!r}; it has {', '.join(sorted(record)) or 'none'}")
    numbers = _array(record, "atomic_numbers", np.int64).reshape(-1)
    zeros = np.zeros(len(numbers), np.int64)
    forces = next((key for key in ("forces", "force") if key in record), None)
    pbc = record.get("pbc")
    return OC20Frame(
        numbers=numbers,
        positions=_array(record, "pos", np.float64),
        cell=_array(record, "cell", np.float64).reshape(-1, 3),
        tags=_array(record, "tags", np.int64) if "tags" in record else zeros,
        fixed=(_array(record, "fixed", np.int64) if "fixed" in record else zeros) != 0,
        energy=_number(record, "energy", "y"),
        forces=_array(record, forces, np.float64) if forces else None,
        reference_energy=_number(record, "ref_energy"),
        sid=_identity(record.get("sid")),
        fid=_identity(record.get("fid")),
        relaxed_energy=_number(record, "y_relaxed"),
        initial_energy=_number(record, "y_init"),
        relaxed_positions=(
            _array(record, "pos_relaxed", np.float64) if "pos_relaxed" in record else None
        ),
        pbc=(True, True, True) if pbc is None else _three_flags(pbc),
    )


def _array(record: dict[str, Any], name: str, dtype: type) -> NDArray:
    value = np.asarray(record[name])
    if value.dtype.kind not in "fiub":
        raise DataError(f"field {name!r} is not numbers")
    array = value.astype(dtype)
    if dtype is np.float64 and not np.isfinite(array).all():
        raise DataError(f"field {name!r} holds NaN or infinity")
    return array


def _number(record: dict[str, Any], *names: str) -> float | None:
    name = next((name for name in names if name in record), None)
    if name is None or record[name] is None:
        return None
    value = _array(record, name, np.float64)
    if value.size != 1:
        raise DataError(f"field {name!r} has shape {value.shape}, not one number")
    return float(value.reshape(()))


def _identity(value: Any) -> int | None:
    """Return the number of ``random1000``, ``frame7``, 1000 or a tensor of it."""
    if value is None:
        return None
    if isinstance(value, str):
        digits = re.fullmatch(r"[A-Za-z_]*(\d+)", value.strip())
        if digits is None:
            raise DataError(f"{value!r} is not the name of a system or frame")
        return int(digits[1])
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise DataError(f"{value!r} is not the number of a system or frame")
    return int(array.reshape(()))


def _three_flags(value: Any) -> tuple[bool, bool, bool]:
    flags = np.asarray(value).reshape(-1).astype(bool).tolist()
    if len(flags) != 3:
        raise DataError(f"field 'pbc' has {len(flags)} flags, not three")
    return flags[0], flags[1], flags[2]
