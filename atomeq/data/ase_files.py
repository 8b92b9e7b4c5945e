"""Structures with labels from any file ASE reads, one by one; errors name file and frame.

Whatever name a file gives its labels, they leave here under one: energy, forces and stress as the
results of a ``SinglePointCalculator``, which :func:`atomeq.graph.convert.from_ase` picks up.
"""

import bz2
import gzip
import itertools
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers
from ase.io.formats import UnknownFileTypeError
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor

from atomeq.files import write_atomically
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import StructureError, validate_structure
from atomeq.graph.to_structures import to_ase
from atomeq.typing import OF_STRUCTURES

DATA_VARIABLE = "ATOMEQ_DATA"
DATABASE_SUFFIXES = (".db", ".aselmdb")
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_LABELS = ("energy", "forces", "stress")
_VOIGT = "xx yy zz yz xz xy"
#: Labels that stay in ``atoms.info`` or, those of atoms, in ``atoms.arrays``, and their shape.
ELECTRIC_SHAPES = {
    "dipole": (3,),
    "quadrupole": (3, 3),
    "polarizability": (3, 3),
    "born_effective_charges": (3, 3),
}
#: What ``atoms.info`` calls the weights of the labels of a structure.
LABEL_WEIGHTS = tuple(f"{label}_weight" for label in _LABELS)
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class DataError(ValueError):
    """A data file is missing, damaged, or lacks what was asked of it."""


@dataclass(frozen=True)
class LabelKeys:
    """What a file calls its labels, in ``atoms.info``, ``atoms.arrays`` or its calculator results.

    Attributes:
        energy: Total energy, eV.
        forces: Forces, eV/Å.
        stress: Stress, eV/Å³ in ASE's sign; 6 Voigt components or 3 x 3.
        stress_order: What the six components are where ASE takes them for ``xx yy zz yz xz xy``;
            VASP's order is ``xx yy zz xy yz xz``.
        dipole: e·Å; a task whose model gives dipoles looks for ``dipole``, and so on.
        quadrupole: e·Å², about the mean position; 6 Voigt components or 3 x 3.
        polarizability: e²·Å²/eV, 1/14.4 of its volume in Å³; likewise.
        born_effective_charges: e, 3 x 3 of each atom: [of the dipole, of the position].
        scalar: Any other number of a structure; a task with a target looks for its name.
        weight: Weight of the structure in the loss; 1 where absent. ``energy_weight``,
            ``forces_weight`` and ``stress_weight`` multiply it for one of its labels.
        kind: What ``atoms.info`` calls the kind of configuration.
        kind_weights: Further weight of the structures of a kind, or of their labels as
            ``{stress: 0}``; 1 for kinds and labels not named.
    """

    energy: str = "energy"
    forces: str = "forces"
    stress: str = "stress"
    stress_order: str = _VOIGT
    dipole: str | None = None
    quadrupole: str | None = None
    polarizability: str | None = None
    born_effective_charges: str | None = None
    scalar: str | None = None
    weight: str = "weight"
    kind: str = "config_type"
    kind_weights: dict[str, float | dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sorted(self.stress_order.split()) != sorted(_VOIGT.split()):
            raise DataError(f"stress_order are {_VOIGT} in an order, not {self.stress_order!r}")
        for kind, weights in self.kind_weights.items():
            if isinstance(weights, dict) and not set(weights) <= set(_LABELS):
                raise DataError(
                    f"kind_weights of {kind} are of energy, forces or stress, not {weights}"
                )


def other_labels(atoms: Atoms) -> dict[str, Tensor]:
    """Return the labels beside energy, forces and stress of a structure that was read here.

    Args:
        atoms: As :func:`read_structures` yields it.

    Returns:
        The scalar (1,), and electric properties (1, ...) or (n_atoms, 3, 3), where it has them.
    """
    given = {"scalar": np.array([atoms.info["scalar"]])} if "scalar" in atoms.info else {}
    for key, shape in ELECTRIC_SHAPES.items():
        of_atoms = key not in OF_STRUCTURES
        value = np.asarray((atoms.arrays if of_atoms else atoms.info).get(key))
        # A file may have something else by this name, which nobody asked for.
        if value.dtype.kind == "f" and value.shape == ((len(atoms), 9) if of_atoms else shape):
            given[key] = value.reshape(-1, *shape)
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in given.items()}


def resolve_data_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``${NAME}`` replaced from the environment.

    Args:
        path: As in a YAML file, for example ``${ATOMEQ_DATA}/acac/train_300K.extxyz.gz``.

    Raises:
        DataError: The variable is not set, or there is no such file, or folder in Zarr.
    """
    resolved = expand_data_path(path)
    if not (resolved.is_dir() if resolved.suffix == ".zarr" else resolved.is_file()):
        raise DataError(f"there is no data file {resolved}; {_hint()}")
    return resolved


def expand_data_path(path: str | os.PathLike[str]) -> Path:
    """Return a path of a file or folder with ``${NAME}`` replaced, whether it exists or not.

    Raises:
        DataError: The variable is not set.
    """
    text = os.fspath(path)
    for name in _VARIABLE.findall(text):
        if not os.environ.get(name):
            raise DataError(
                f"{text} needs the environment variable {name}, which is not set; {_hint()}"
            )
        text = text.replace(f"${{{name}}}", os.environ[name])
    return Path(text).expanduser()


def _hint() -> str:
    return (
        f"give the path of an existing file, or fetch a known set with `atomeq data download NAME` "
        f"and set {DATA_VARIABLE} to the folder it was put in"
    )


def read_structures(
    path: str | os.PathLike[str],
    *,
    labels: LabelKeys | None = None,
    reader: Callable[[Path], Iterator[Atoms]] | None = None,
) -> Iterator[Atoms]:
    """Yield the validated structures of a file one by one, without reading it all.

    Args:
        path: extxyz, trajectory, ASE database (.db, .aselmdb) or anything else that ASE reads; text
            formats may be compressed (.gz, .bz2, .xz).
        labels: What the file calls its labels.
        reader: What reads a format that ASE does not know.

    Yields:
        Structures whose labels, where present, are ``energy`` (eV), ``forces`` (eV/Å) and
        ``stress`` (eV/Å³, Voigt) of ``atoms.calc``, and ``atoms.info["weight"]``; the scalar, if
        one is asked for, is ``atoms.info["scalar"]``, and electric properties are in ``atoms.info``
        and ``atoms.arrays``.

    Raises:
        DataError: The file is missing, damaged or empty, or a frame is not a usable structure; the
            message names file and frame.

    Example:
        >>> for atoms in read_structures("train.extxyz"):  # doctest: +SKIP
        ...     print(atoms.get_potential_energy())
    """
    resolved = resolve_data_path(path)
    labels = labels if labels is not None else LabelKeys()
    frame = -1
    for frame, atoms in enumerate((reader or _read_raw)(resolved)):
        name = f"{resolved}, frame {frame}"
        try:
            validate_structure(atoms, name=name)
        except StructureError as error:
            message = str(error)
            raise DataError(message if name in message else f"{name}: {message}") from error
        _normalise_labels(atoms, labels, name)
        yield atoms
    if frame < 0:
        raise DataError(f"{resolved} holds no structures")


def read_isolated_atoms(path: str | os.PathLike[str]) -> dict[int, float]:
    """Return the energy of each element, eV by atomic number, from structures of one atom each.

    Args:
        path: Any file that ASE reads.

    Raises:
        DataError: A structure has more than one atom or no energy, or an element occurs twice.
    """
    energies: dict[int, float] = {}
    for frame, atoms in enumerate(read_structures(path)):
        if len(atoms) != 1 or atoms.calc is None or "energy" not in atoms.calc.results:
            raise DataError(
                f"{path}, frame {frame}: isolated atoms are structures of one atom with an energy"
            )
        number = int(atoms.numbers[0])
        if number in energies:
            raise DataError(f"{path}, frame {frame}: {atoms.symbols[0]} occurs twice")
        energies[number] = float(atoms.calc.results["energy"])
    return energies


def write_graph(path: str | os.PathLike[str], graph: AtomGraph) -> None:
    """Write the structures of a graph with their labels as extended XYZ."""
    with write_atomically(Path(path)) as partial:
        ase.io.write(partial, to_ase(graph), format="extxyz")


def atomic_number(symbol: str) -> int:
    """Return the atomic number of an element symbol.

    Raises:
        DataError: There is no such element.
    """
    if symbol not in atomic_numbers or symbol == "X":
        raise DataError(f"{symbol!r} is not an element symbol; elements are written as in 'Cu'")
    return atomic_numbers[symbol]


def _read_raw(path: Path) -> Iterator[Atoms]:
    """Yield frames as ASE gives them; what its parsers raise becomes a DataError."""
    stream = _read_database(path) if path.suffix in DATABASE_SUFFIXES else _read_file(path)
    for frame in itertools.count():
        try:
            atoms = next(stream)
        except StopIteration:
            return
        except UnknownFileTypeError as error:
            raise DataError(f"{path} is of no format that ASE knows: {error}") from error
        except Exception as error:  # the parsers of ASE raise anything, from KeyError to zlib.error
            raise DataError(
                f"{path}, frame {frame}: cannot be read ({type(error).__name__}: {error}); "
                "the file is damaged or cut short"
            ) from error
        yield atoms


def _read_file(path: Path) -> Iterator[Atoms]:
    with _decompressed(path) as plain:
        yield from ase.io.iread(plain, index=":", do_not_split_by_at_sign=True)


@contextmanager
def _decompressed(path: Path) -> Iterator[Path]:
    """Yield a plain copy of a compressed file: ASE's readers seek, from the start each time."""
    if path.suffix not in _OPENERS:
        yield path
        return
    with (
        _OPENERS[path.suffix](path, "rb") as stream,
        tempfile.NamedTemporaryFile(suffix=Path(path.stem).suffix) as plain,
    ):
        shutil.copyfileobj(stream, plain)
        plain.flush()
        yield Path(plain.name)


def _read_database(path: Path) -> Iterator[Atoms]:
    for row in ase.db.connect(path).select():
        atoms = row.toatoms()
        atoms.info.update(row.key_value_pairs)
        atoms.info.update(row.data)
        yield atoms


def _normalise_labels(atoms: Atoms, labels: LabelKeys, name: str) -> None:
    shapes = {"energy": ((),), "forces": ((len(atoms), 3),), "stress": ((6,), (3, 3), (9,))}
    results: dict[str, Any] = {}
    if labels.scalar is not None and (value := _take(atoms, labels.scalar)) is not None:
        atoms.info["scalar"] = float(_checked(value, ((),), f"{name}: label {labels.scalar!r}"))
    for label, allowed in shapes.items():
        key = getattr(labels, label)
        value = _take(atoms, key)
        if value is None:
            continue
        results[label] = _checked(value, allowed, f"{name}: label {key!r}")
    if "stress" in results and results["stress"].size == 9:
        results["stress"] = _voigt(results["stress"].reshape(3, 3))
    if "stress" in results:
        order = labels.stress_order.split()
        results["stress"] = results["stress"][[order.index(one) for one in _VOIGT.split()]]
    if "energy" in results:
        results["energy"] = float(results["energy"])
    _normalise_electric(atoms, labels, name)
    atoms.info.update(_weights(atoms, labels, name))
    atoms.calc = SinglePointCalculator(atoms, **results) if results else None


def _normalise_electric(atoms: Atoms, labels: LabelKeys, name: str) -> None:
    """Keep electric properties under their own names, matrices as such."""
    for label, shape in ELECTRIC_SHAPES.items():
        key = getattr(labels, label)
        if key is None or (value := _take(atoms, key)) is None:
            continue
        what, of_atoms = f"{name}: label {key!r}", label not in OF_STRUCTURES
        if of_atoms:
            allowed: tuple[tuple[int, ...], ...] = ((len(atoms), 3, 3), (len(atoms), 9))
        else:
            allowed = (shape,) if shape == (3,) else (shape, (6,), (9,))
        found = _checked(value, allowed, what)
        if found.shape == (6,):
            found = voigt_6_to_full_3x3_stress(found)
        if of_atoms:
            atoms.arrays[label] = found.reshape(-1, 9)  # extxyz has no more axes
        else:
            atoms.info[label] = found.reshape(shape)


def _weights(atoms: Atoms, labels: LabelKeys, name: str) -> dict[str, float]:
    """Take the weight of a structure, and those of its labels that are not 1."""
    of_kind = labels.kind_weights.get(str(atoms.info.get(labels.kind)), 1.0)
    of_labels = of_kind if isinstance(of_kind, dict) else {"weight": of_kind}
    found = {}
    for key in ("weight", *LABEL_WEIGHTS):
        what = labels.weight if key == "weight" else key
        given = _take(atoms, what)
        own = 1.0 if given is None else float(_checked(given, ((),), f"{name}: label {what!r}"))
        own *= of_labels.get(key.removesuffix("_weight"), 1.0)
        if own < 0:
            raise DataError(f"{name}: label {what!r} is {own}; weights are >= 0")
        if own != 1.0 or key == "weight":
            found[key] = own
    return found


def _take(atoms: Atoms, key: str) -> Any:
    """Remove and return what is stored under a key, wherever ASE put it."""
    found = atoms.info.pop(key, None)
    in_arrays = atoms.arrays.pop(key, None) if key not in ("numbers", "positions") else None
    found = in_arrays if found is None else found
    if found is None and atoms.calc is not None:
        found = atoms.calc.results.get(key)
    return found


def _checked(value: Any, shapes: tuple[tuple[int, ...], ...], what: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} is {value!r}, not numbers") from error
    if array.shape not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        raise DataError(f"{what} has shape {array.shape}; allowed is {allowed}")
    if not np.isfinite(array).all():
        raise DataError(f"{what} holds NaN or infinity")
    return array


def _voigt(stress: np.ndarray) -> np.ndarray:
    symmetric = (stress + stress.T) / 2
    return symmetric[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
