"""Paths of data in YAML files, and which of the structures in them train, validate and test."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from jsonargparse.typing import register_type
from numpy.typing import NDArray

from atomeq.data.ase_files import DataError, resolve_data_path

if TYPE_CHECKING:
    DataFile: TypeAlias = str | os.PathLike[str]
else:

    class DataFile(str):
        """A path in a YAML file: relative to that file, absolute, or ``${ATOMEQ_DATA}/...``."""

        @classmethod
        def from_yaml(cls, value: Any) -> "DataFile":
            """Read a path in a YAML file, with whose folder as working directory it is parsed."""
            if isinstance(value, DataFile):
                return value
            text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
            if not text or text.startswith(("[", "{")):
                raise ValueError(f"{value!r} is not a path")
            return cls(text if text.startswith("${") else os.path.abspath(text))

    register_type(DataFile, str, DataFile.from_yaml)

DataFiles: TypeAlias = DataFile | list[DataFile]


@dataclass(frozen=True)
class Split:
    """How the structures of ``train`` are divided where no files do it.

    Attributes:
        val: Fraction held out for validation, or a number of structures if 1 or more.
        test: The same of the test set ``held_out``.
        train: How many of the others train, by the same seed; None is all.
        seed: Of the permutation; the test part depends on ``test`` and ``seed`` alone.
        file: .npz or .json with index lists ``train``, ``val`` and ``test``, or OGB's
            ``split_dict.pt``, whose test sets have no labels and are left out; replaces the above.
            Or ``index_train_*.csv`` of rMD17, beside which lies ``index_test_*.csv``: ``val`` of
            those that it lists validate.
        copies: ``together``: no two parts share copies of a structure, rotated, reflected,
            reordered or repeated ones included; ``anywhere`` does not look for them.
    """

    val: float = 0.0
    test: float = 0.0
    train: int | None = None
    seed: int = 0
    file: DataFile | None = None
    copies: Literal["together", "anywhere"] = "anywhere"

    def __post_init__(self) -> None:
        if self.train is not None and self.train < 1:
            raise ValueError(f"split.train is a number of structures, 1 or more, not {self.train}")
        if self.file is not None and self.copies == "together":
            raise ValueError("a file of indices parts copies as it does: leave out copies or file")


def split_indices(
    n_structures: int, split: Split, *, groups: Sequence[int] | None = None
) -> dict[str, list[int]]:
    """Return which structures train, validate and test.

    Args:
        n_structures: How many there are.
        split: Fractions and seed, or an index file.
        groups: Of each structure, which others stay with it; the parts are then filled up to their
            sizes, or some structures beyond.

    Returns:
        Index lists ``train``, ``val`` and ``test``, each in the order of the file.

    Raises:
        DataError: Fractions or indices out of range, an index used twice, nothing left to train on.
    """
    if split.file is not None:
        return _indices_from_file(resolve_data_path(split.file), n_structures, split)
    fractions = max(split.val, split.test) < 1
    if min(split.val, split.test) < 0 or (fractions and split.val + split.test >= 1):
        raise DataError(
            f"split.val={split.val} and split.test={split.test} must be >= 0 and, as fractions, "
            "their sum below 1"
        )
    # RandomState's stream is frozen by NumPy for good; that of Generator may change.
    order = np.random.RandomState(split.seed).permutation(n_structures)
    n_test, n_val = (
        round(part if part >= 1 else part * n_structures) for part in (split.test, split.val)
    )
    if n_test + n_val >= n_structures:
        raise DataError(f"{n_structures} structures leave none to train on after the split {split}")
    ends = [n_test, n_test + n_val]
    if groups is not None:
        order, ends = _by_group(order, np.asarray(groups), ends)
        if ends[1] >= n_structures:
            raise DataError(f"copies of a structure are too many to train on any after {split}")
    if split.train is not None and ends[1] + split.train > n_structures:
        raise DataError(f"{n_structures} structures are too few for the split {split}")
    parts = np.split(order if split.train is None else order[: ends[1] + split.train], ends)
    return {
        key: sorted(part.tolist())
        for key, part in zip(("test", "val", "train"), parts, strict=True)
    }


def _by_group(
    order: NDArray[np.int64], groups: NDArray[np.int64], ends: list[int]
) -> tuple[NDArray[np.int64], list[int]]:
    """Return an order without gaps in groups, and the ends of groups from which on ends are met."""
    _, first, of = np.unique(groups[order], return_index=True, return_inverse=True)
    place = first[of]  # of the group of each: where its first member stands
    order = order[np.argsort(place, kind="stable")]
    bounds = np.append(np.flatnonzero(np.diff(groups[order])) + 1, len(order))
    met: list[int] = []
    for end, last in zip(ends, (0, ends[0]), strict=True):
        start = met[-1] if met else 0
        wanted = start + end - last
        met.append(start if end == last else int(bounds[np.searchsorted(bounds, wanted)]))
    return order, met


def _indices_from_file(path: Path, n_structures: int, split: Split) -> dict[str, list[int]]:
    try:
        if path.suffix == ".csv":
            given = _read_csv(path, split)
        else:
            given = _READ_SPLIT.get(path.suffix, _read_json)(path)
        indices = {key: [int(i) for i in given.get(key, [])] for key in ("train", "val", "test")}
    except (ValueError, OSError, AttributeError, TypeError, RuntimeError, UnpicklingError) as error:
        raise DataError(
            f"split file {path} is not an .npz or .json of index lists, nor OGB's split_dict.pt, "
            f"nor rMD17's index_train_*.csv: {error}"
        ) from error
    if not indices["train"]:
        raise DataError(f"split file {path} lists no 'train' indices; it has {', '.join(given)}")
    used = [i for part in indices.values() for i in part]
    wrong = [i for i in used if not 0 <= i < n_structures]
    if wrong:
        raise DataError(f"{path} names structure {wrong[0]}; there are 0 to {n_structures - 1}")
    if len(set(used)) != len(used):
        raise DataError(f"split file {path} uses a structure in two parts, or twice in one")
    return indices


def _read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_csv(path: Path, split: Split) -> Mapping[str, Any]:
    beside = path.with_name(path.name.replace("train", "test"))
    if beside == path:
        raise ValueError("of lists of indices the one of training is named, index_train_01.csv")
    listed, test = ([int(line) for line in p.read_text().split()] for p in (path, beside))
    own = split_indices(len(listed), replace(split, file=None, test=0.0))
    return {"test": test, **{part: [listed[k] for k in own[part]] for part in ("train", "val")}}


def _read_npz(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key].tolist() for key in archive.files}


def _read_split_dict(path: Path) -> Mapping[str, Any]:
    """Read OGB's pickled NumPy arrays; no name but NumPy's own for an array is looked up."""
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, np.dtypes.Int64DType, np.dtypes.Int32DType]
    # NumPy moved it in 2.0; OGB's file is older.
    allowed += [
        (reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
    ]
    with torch.serialization.safe_globals(allowed):
        given = torch.load(path, map_location="cpu", weights_only=True)
    return {"train": given["train"].tolist(), "val": given["valid"].tolist()}


_READ_SPLIT = {".npz": _read_npz, ".pt": _read_split_dict}
