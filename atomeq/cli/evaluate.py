"""``atomeq evaluate``: a potential's errors on labels and its textbook properties, as one JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.card import SCANS, write_card
from atomeq.cli.data_stats import data_module
from atomeq.cli.plots import Cloud, Panel, plot_clouds, plot_lines
from atomeq.cli.structures import versions
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import load, stages
from atomeq.data.ase_files import read_structures
from atomeq.files import write_atomically
from atomeq.graph.to_structures import to_ase
from atomeq.potential.untrusted import read_yaml
from atomeq.properties.evaluation import Evaluation, scan
from atomeq.properties.reference_values import CrystalProperties, crystals_of

_AXES = {
    "energy_meV_per_atom": ("energy / eV per atom", 1.0),
    "forces_meV_per_A": ("force / eV/Å", 1.0),
}


def evaluate(options: Namespace) -> int:
    """Evaluate, show the tables and write the files."""
    calculator = load(options.potential, options)
    properties: dict[str, CrystalProperties] = {}
    if options.properties is not None:
        precise = load(options.potential, options, dtype="float64")
        known = crystals_of(read_yaml(options.properties))
        properties = {name: CrystalProperties(one, precise) for name, one in known.items()}
    document: dict[str, Any] = {
        "potential": {key: calculator.provenance[key] for key in ("name", "sha256")},
        "command": _command(options),
        "files": list(map(str, options.files)),
        "versions": versions(),
    }
    written = [options.out]
    if options.files:
        evaluation = _evaluation(options, calculator)
        document |= _told(evaluation)
        written.append(_pictures(options.out, evaluation))
        _show_errors(document)
    if options.scans:
        document["scans"] = {
            Path(file).name.partition(".")[0]: scan(list(read_structures(file)), calculator)
            for file in options.scans
        }
        written.append(_draw_scans(options.out.with_name(SCANS), document["scans"]))
        _show_scans(document["scans"])
    if properties:
        with stages() as report:
            document["properties"] = {
                f"{name}_{key}" if name else key: found
                for name, one in properties.items()
                for key, found in one(report).items()
            }
        _show_properties(document["properties"])
    with write_atomically(options.out) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.card:
        written.append(write_card(options.out.parent))
    say(f"wrote {', '.join(map(str, written))}")
    return 0


def _command(options: Namespace) -> str:
    words = ["atomeq evaluate", str(options.potential), *map(str, options.files)]
    given = {"kind": options.kind, "properties": options.properties, "dtype": options.dtype}
    words += [f"--{name} {value}" for name, value in given.items() if value is not None]
    words += ["--scans", *options.scans] if options.scans else []
    return " ".join([*words, f"--out {options.out}", *["--card"] * options.card, "--overwrite"])


def _evaluation(options: Namespace, calculator: AtomeqCalculator) -> Evaluation:
    structures: list[Atoms] = []
    for file in options.files:
        if Path(file).suffix in (".yaml", ".yml"):
            structures += _tests_of(Path(file), options)
            continue
        for atoms in read_structures(file):
            atoms.info["_kind"] = _kind(atoms, options.kind, file, several=len(options.files) > 1)
            structures.append(atoms)
    meter = Meter("evaluate", len(structures), unit="structures")
    with meter.running():
        return Evaluation(
            structures,
            calculator,
            kind=lambda atoms: atoms.info["_kind"],
            report=lambda done: meter.advance(done - meter.done),
        )


def _tests_of(path: Path, options: Namespace) -> list[Atoms]:
    """Return the test structures of an experiment, whole ones, less its offset of the stress."""
    data = data_module(path)
    data.reduce_supercells = False
    sets = data.structures()
    named = {name: list(some) for name, some in sets.items() if name.startswith("test/")}
    offset = (read_yaml(path).get("model") or {}).get("stress_offset", 0.0)
    found: list[Atoms] = []
    for name, some in named.items():
        for given in some:
            atoms = given if isinstance(given, Atoms) else to_ase(given)[0]  # of sets on disk
            set_name = name.removeprefix("test/")
            label = atoms.info.get(options.kind or data.labels.kind, set_name)
            atoms.info["_kind"] = str(label).removeprefix("set=")
            results = getattr(atoms.calc, "results", {})
            if "stress" in results:
                results["stress"] = results["stress"] - offset * np.array([1, 1, 1, 0, 0, 0])
            found.append(atoms)
    if not found:
        raise ValueError(f"{path} has no test set; name files of labelled structures")
    return found


def _kind(atoms: Atoms, key: str | None, file: str, *, several: bool) -> str:
    if key is not None:
        return str(atoms.info.get(key, "other"))
    return Path(file).name.partition(".")[0] if several else "all"


def _told(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "structures": evaluation.n_structures,
        "errors": evaluation.errors(),
        "by_element": evaluation.by_element(),
        "uncertainty": evaluation.coverage(),
        "uncertainty_by_kind": {
            kind: found for kind in evaluation.n_structures if (found := evaluation.coverage(kind))
        },
        "calibration": evaluation.calibration(),
    }


def _show_errors(document: Mapping[str, Any]) -> None:
    names = list(document["errors"]["all"])
    rows = [
        [kind, str(document["structures"][kind])] + [_pair(errors.get(name)) for name in names]
        for kind, errors in document["errors"].items()
    ]
    show_table(["kind", "structures", *(f"{name} MAE (RMSE)" for name in names)], rows)
    of = [[symbol, _pair(row)] for symbol, row in document["by_element"].items()]
    if len(of) > 1:
        show_table(["element", "forces_meV_per_A MAE (RMSE)"], of)
    if document["uncertainty"]:
        rows = [[name, f"{value:.3f}"] for name, value in document["uncertainty"].items()]
        show_table(["uncertainty", "share or ratio"], rows)


def _draw_scans(out: Path, scans: Mapping[str, Mapping[str, Any]]) -> Path:
    """Draw labelled energies as points on the predicted curve of each scan."""
    panels = []
    for name, found in scans.items():
        steps = range(1, 1 + len(found["labelled_eV"]))
        lines = [(steps, found["predicted_eV"])]
        labels = (steps, found["labelled_eV"])
        title = name.replace("_", " ")
        panels.append(
            Panel("structure", "energy / eV", lines, ends=False, points=labels, title=title)
        )
    return plot_lines(out, panels)


def _show_scans(scans: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        [name, str(len(found["labelled_eV"]))]
        + [f"{found[key]:.4f}" for key in ("rmse_eV", "range_labelled_eV", "range_predicted_eV")]
        for name, found in scans.items()
    ]
    show_table(["scan", "structures", "RMSE eV", "labelled range eV", "predicted range eV"], rows)


def _pair(row: Mapping[str, float] | None) -> str:
    return "-" if row is None else f"{row['mae']:.3g} ({row['rmse']:.3g})"


def _show_properties(found: Mapping[str, Mapping[str, Any]]) -> None:
    rows = []
    for name, node in found.items():
        reference = node.get("reference")
        off = "-"
        if reference:
            off = f"{100 * (node['value'] / reference - 1):+.1f} %"
        told = "-" if reference is None else f"{reference:g} ({node['source']})"
        rows.append([name, f"{node['value']:.5g}", told, off])
    show_table(["property", "value", "reference", "off by"], rows)


def _pictures(out: Path, evaluation: Evaluation) -> Path:
    """Draw labels against predictions, and of a calibrated potential errors against σ."""
    clouds = []
    for name, (label, factor) in _AXES.items():
        part = evaluation.compared[name]
        if part.label:
            x, y = (factor * np.concatenate(side).ravel() for side in (part.label, part.predicted))
            clouds.append(Cloud(f"labelled {label}", f"predicted {label}", x, y))
    for name, (label, factor) in _AXES.items():
        part = evaluation.compared[name]
        if part.sigma and part.label:
            sigma = factor * np.concatenate(part.sigma)
            error = np.abs(np.concatenate(part.label) - np.concatenate(part.predicted))
            error = factor * error.reshape(len(sigma), -1).mean(axis=1)
            clouds.append(Cloud(f"σ of {label}", "mean absolute error", sigma, error, log=True))
    return plot_clouds(out, clouds)
