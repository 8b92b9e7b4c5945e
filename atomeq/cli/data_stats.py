"""``atomeq data stats``: what is in a data set, before anything is trained on it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ase import Atoms
from jsonargparse import Namespace

from atomeq.cli.data import label_keys
from atomeq.cli.terminal import say, show_table
from atomeq.data.ase_files import (
    DATA_VARIABLE,
    DATABASE_SUFFIXES,
    DataError,
    LabelKeys,
    expand_data_path,
    read_structures,
)
from atomeq.data.copies import RADIUS
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.molecule_files import STORED_FORMATS, reader_of
from atomeq.data.splits import Split
from atomeq.data.stored_files import StoredStructures
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.training.statistics import data_statistics

_SUFFIXES = (".extxyz", ".xyz", ".traj", *DATABASE_SUFFIXES, *STORED_FORMATS)
_COMPRESSED = (".gz", ".bz2", ".xz")
_SHOWN = 10
_COLUMNS = (
    *("set", "structures", "distinct", "atoms", "elements", "E", "F", "stress"),
    *("E/atom\neV", "F rms\neV/Å", "F max\neV/Å", "net F max\nmeV/Å/atom"),
    *("stress\nGPa", "volume\nÅ³/atom"),
)
_DATA_CLASS = "atomeq.data.datamodule.AtomisticDataModule"


def show_statistics(options: Namespace) -> int:
    """Show what is in data sets."""
    labels = label_keys(options.labels)
    sets: dict[str, Iterator[tuple[str, AtomGraph]]] = {}
    for source in options.sources:
        for name, structures in _sets_of(source, labels).items():
            sets[name if name not in sets else f"{source}:{name}"] = structures
    found = data_statistics(sets)
    if options.json:
        say(json.dumps(found, indent=2))
        return 0
    _show(found)
    return 0


def _sets_of(source: str, labels: LabelKeys) -> dict[str, Iterator[tuple[str, AtomGraph]]]:
    path = expand_data_path(source)
    if not path.exists() and os.environ.get(DATA_VARIABLE):
        path = Path(os.environ[DATA_VARIABLE]) / source
    if not path.exists():
        raise DataError(
            f"there is no file or folder {source}, nor one of that name in {DATA_VARIABLE}; "
            "`atomeq data download` fetches known sets"
        )
    if path.suffix in (".yaml", ".yml"):
        divided = data_module(path).structures()
        return {name: _divided(some) for name, some in divided.items()}
    single = path.is_file() or path.suffix in STORED_FORMATS
    files = [path] if single else sorted(path.iterdir())
    readable = [file for file in files if single or _plain_suffix(file) in _SUFFIXES]
    if not readable:
        raise DataError(f"{path} holds no files of structures ({', '.join(_SUFFIXES)})")
    return {
        file.name.removesuffix("".join(file.suffixes)): _graphs(
            file.name, read_structures(file, labels=labels, reader=reader_of(file))
        )
        for file in readable
    }


def _plain_suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in _COMPRESSED else file.suffix


def data_module(path: Path) -> AtomisticDataModule:
    """Return the data of a configuration; paths in it are relative to the file they stand in."""
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    node = node.get("data", node) if isinstance(node, dict) else node
    if isinstance(node, str):
        return data_module(path.parent / node)
    if not isinstance(node, dict) or node.get("class_path") != _DATA_CLASS:
        raise DataError(f"{path} does not name data of class_path {_DATA_CLASS}")
    given: dict[str, Any] = {**node.get("init_args", {})}
    if (given.get("split") or {}).get("file") is not None:
        file = _resolved(given["split"]["file"], path.parent)
        given["split"] = {**given["split"], "file": file}
    given.update((key, type_(**given[key])) for key, type_ in _PARTS.items() if key in given)
    for key in ("train", "val"):
        if given.get(key) is not None:
            given[key] = _resolved(given[key], path.parent)
    for name, files in (given.get("test") or {}).items():
        given["test"][name] = _resolved(files, path.parent)
    return AtomisticDataModule(**given)


_PARTS = {"split": Split, "labels": LabelKeys}


def _resolved(files: Any, folder: Path) -> Any:
    if isinstance(files, list):
        return [_resolved(file, folder) for file in files]
    return files if str(files).startswith("${") else str(folder / files)


def _graphs(name: str, structures: Iterator[Atoms]) -> Iterator[tuple[str, AtomGraph]]:
    build = RadiusGraph(RADIUS)
    for frame, atoms in enumerate(structures):
        yield f"{name}, frame {frame}", build(atoms)


def _divided(structures: list[Atoms] | StoredStructures) -> Iterator[tuple[str, AtomGraph]]:
    build = RadiusGraph(RADIUS)
    for k, one in enumerate(structures):
        stored = isinstance(structures, StoredStructures)
        yield structures.place(k) if stored else one.info["place"], build(one)


def _show(found: dict[str, Any]) -> None:
    rows = []
    for name, one in found["sets"].items():
        rows.append(
            [
                name,
                str(one["structures"]),
                str(found["copies"][name]["distinct"]),
                _between(one["atoms"], "{:.0f}"),
                _few(list(one["elements"])),
                *(str(one["labels"][key]) for key in ("energy", "forces", "stress")),
                _between(one["energy_per_atom_eV"], "{:.3f}"),
                _number(one["force_rms_eV_per_A"]),
                _number(one["force_max_eV_per_A"]),
                _number(one["net_force_max_eV_per_A_atom"], 1e3),
                _between(one["stress_GPa"], "{:.1f}"),
                _between(one["volume_per_atom_A3"], "{:.1f}"),
            ]
        )
    show_table(_COLUMNS, rows, most=len(rows))
    _show_references(found["references"])
    for line in _findings(found):
        say(line)
    rows = [
        [pair, f"{one['shortest_A']:.3f}", f"{one['of_covalent_radii']:.2f}", one["place"]]
        for pair, one in found["distances"].items()
    ]
    say("")
    show_table(["pair", "shortest\nÅ", "of radii", "where"], rows, most=_SHOWN)


def _show_references(references: dict[str, Any]) -> None:
    shift = references.get("shift_eV")
    if not shift:
        return
    say(
        f"\nenergies of elements by least squares leave {references['left_rms_meV_per_atom']:.1f} "
        "meV/atom"
        + (
            f"; compositions leave {references['undetermined']} of them undetermined"
            if references["undetermined"]
            else ""
        )
    )
    isolated = references["isolated_eV"]
    rows = [
        [element, f"{energy:.4f}", f"{isolated[element]:.4f}" if element in isolated else "-"]
        for element, energy in shift.items()
    ]
    show_table(["element", "fitted, eV", "isolated atom, eV"], rows, most=_SHOWN)


def _findings(found: dict[str, Any]) -> Iterator[str]:
    """Yield what should be looked at, a line each; that there is nothing is one too."""
    lines = []
    for name, one in found["sets"].items():
        copies = found["copies"][name]
        if copies["distinct"] < one["structures"]:
            example = " = ".join(copies["example"][:2])
            lines.append(
                f"copies: {one['structures'] - copies['distinct']} structures of {name} repeat "
                f"others ({example})"
            )
        lines += [
            f"contradiction: {' and '.join(pair['places'][:2])} are copies whose energies "
            f"differ by {1e3 * pair['energy_eV_per_atom']:.1f} meV/atom"
            for pair in copies["contradicting"]
        ]
        if set(electrons := dict(one["electrons"])) - {"neutral"}:
            lines.append(
                f"electrons: of {name} "
                + ", ".join(f"{n} are {said}" for said, n in sorted(electrons.items()))
                + "; a potential without `charge` refuses all but neutral ones"
            )
        if one["net_forces"]:
            lines.append(
                f"net force: {one['net_forces']} structures of {name} have forces with a sum, at "
                f"most {1e3 * one['net_force_max_eV_per_A_atom']:.1f} meV/Å per atom"
            )
    for leak in found["leakage"]:
        one, other = leak["sets"]
        lines.append(
            f"leak: {leak['structures']} structures of {other} are copies of some in {one} "
            f"({' = '.join(leak['example'])})"
        )
    lines += [
        f"outlier: {far['place']}: {far['what']} {far['value']:.4g}, typical {far['typical']:.4g}"
        for far in found["outliers"]
    ]
    lines += [
        f"short: {pair} {one['shortest_A']:.3f} Å, {one['of_covalent_radii']:.2f} of the covalent "
        f"radii ({one['place']})"
        for pair, one in found["distances"].items()
        if one["short"]
    ][:_SHOWN]
    yield ""
    yield from lines or ["nothing that should be looked at: no copies, leaks, outliers"]


def _few(elements: list[str]) -> str:
    return " ".join(elements) if len(elements) <= 6 else f"{len(elements)}"


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:.3g}"


def _between(values: dict[str, float], form: str) -> str:
    if not values:
        return "-"
    low, high = form.format(values["min"]), form.format(values["max"])
    return low if low == high else f"{low}..{high}"
