"""The model card of a potential: its evaluation as tables around a short text, by one template.

A folder holds ``about.md``, written by hand: title and opening, then sections such as training and
known failures. ``metrics.json`` is what ``atomeq evaluate`` wrote, ``speed.json`` what
``scripts/benchmark.py speed`` did. ``README.md`` is made of them and of ``model.yaml`` alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atomeq.files import write_atomically
from atomeq.potential.folders import ABOUT_FILE, CONFIG_FILE, METRICS_FILE, WEIGHTS_FILE
from atomeq.potential.untrusted import read_yaml

SPEED, CARD, SCANS = "speed.json", "README.md", "scans.png"
_CURVE = "learning_curve.png"
_QUANTITIES = {
    "energy_meV_per_atom": "energy, meV/atom",
    "forces_meV_per_A": "forces, meV/Å",
    "stress_GPa": "stress, GPa",
}


def write_card(folder: Path) -> Path:
    """Write the card of a potential's folder; return its path."""
    with write_atomically(folder / CARD) as partial:
        partial.write_text(card_of(folder), encoding="utf-8")
    return folder / CARD


def card_of(folder: Path) -> str:
    """Return the card of a potential's folder.

    Raises:
        FileNotFoundError: The folder lacks ``about.md`` or ``metrics.json``.
    """
    opening, _, sections = (folder / ABOUT_FILE).read_text(encoding="utf-8").partition("\n## ")
    found = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    title, _, opening = opening.strip().partition("\n")
    parts = [title, opening.strip(), _facts(folder), *_errors(found), *_uncertainty(found)]
    parts += [*_properties(found), *_scans(found)]
    if (folder / SPEED).is_file():
        parts += _speed(json.loads((folder / SPEED).read_text(encoding="utf-8")))
    parts += [f"## {sections.strip()}"] if sections else []
    if (folder / _CURVE).is_file():
        parts.append(f"![loss by epoch, error of forces by time]({_CURVE})")
    parts.append(f"Everything above but the text is of this command:\n\n    {found['command']}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(folder: Path) -> str:
    document = read_yaml(folder / CONFIG_FILE)
    node, trained = document["model"], document.get("metadata", {})
    settings = ", ".join(f"{name} {value}" for name, value in node["init_args"].items())
    terms = [term["class_path"].rpartition(".")[2] for term in document.get("terms", [])]
    rows = [
        ("model", f"`{node['class_path']}`: {settings}"),
        ("beside it", ", ".join(terms) or "nothing"),
        ("weights", f"{(folder / WEIGHTS_FILE).stat().st_size / 1e6:.2f} MB, {document['dtype']}"),
        ("trained", f"{trained.get('epochs', '?')} epochs, {trained.get('steps', '?')} steps"),
    ]
    return table(["", ""], rows)


def _errors(found: Mapping[str, Any]) -> list[str]:
    if "errors" not in found:
        return []
    names = [name for name in _QUANTITIES if name in found["errors"]["all"]]
    rows = [
        [kind, found["structures"][kind], *(_pair(errors.get(name)) for name in names)]
        for kind, errors in found["errors"].items()
    ]
    head = ["tested on", "structures", *(f"{_QUANTITIES[name]}: MAE (RMSE)" for name in names)]
    parts = ["## Errors", table(head, rows)]
    if len(found["by_element"]) > 1:
        elements = [[symbol, _pair(row)] for symbol, row in found["by_element"].items()]
        parts.append(table(["element", "forces, meV/Å: MAE (RMSE)"], elements))
    return [*parts, "![labels against predictions, errors against their promise](metrics.png)"]


def _uncertainty(found: Mapping[str, Any]) -> list[str]:
    if not found.get("uncertainty"):
        return []
    curve = found["calibration"]
    head = ["errors within", *(f"{z:g} σ" for z in curve["sigmas"])]
    rows = [
        [name, *(f"{100 * share:.0f} %" for share in curve[name])]
        for name in ("promised", "energy", "forces")
        if name in curve
    ]
    worst = found["uncertainty"].get("forces_worst_decile_over_median")
    told = (
        ""
        if worst is None
        else f"The tenth with the largest σ has {worst:.1f} times the median error of forces. "
    )
    beyond = found["uncertainty"].get("atoms_beyond_training")
    if beyond is not None:
        told += f"{100 * beyond:.1f} % of the atoms lie beyond what training has shown."
    return ["## Uncertainty", table(head, rows), told.strip(), _coverage(found)]


def _coverage(found: Mapping[str, Any]) -> str:
    """Return which errors lie within σ and 2 σ by kind, where there is more than one."""
    by_kind = found.get("uncertainty_by_kind", {})
    if len(by_kind) < 3:  # "all" and another are one
        return ""
    pairs = [(name, share) for name in ("energy", "forces") for share in ("68", "95")]
    rows = [
        [
            kind,
            *(f"{100 * one[f'{of}_{p}']:.0f} %" if f"{of}_{p}" in one else "" for of, p in pairs),
        ]
        for kind, one in by_kind.items()
    ]
    head = [f"{name} within {z}" for name in ("energies", "forces") for z in ("σ", "2 σ")]
    return table(["errors of", *head], rows)


def _properties(found: Mapping[str, Any]) -> list[str]:
    if "properties" not in found:
        return []
    rows = []
    for name, node in found["properties"].items():
        known = node.get("reference")
        told = "" if known is None else f"{known:g} ({node['source']})"
        off = "" if not known else f"{100 * (node['value'] / known - 1):+.1f} %"
        rows.append([name.replace("_", " "), f"{node['value']:.4g}", told, off])
    return ["## Properties", table(["", "computed", "reference", "off by"], rows)]


def _scans(found: Mapping[str, Any]) -> list[str]:
    if "scans" not in found:
        return []
    rows = [
        [name.replace("_", " "), len(one["labelled_eV"])]
        + [f"{1e3 * one[f'{key}_eV']:.1f}" for key in ("rmse", "range_labelled", "range_predicted")]
        for name, one in found["scans"].items()
    ]
    head = ["path", "structures", "error, meV: RMSE", "labelled range, meV", "predicted range, meV"]
    return ["## Scans", table(head, rows), f"![energies along paths: labels, curve]({SCANS})"]


def _speed(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["structures"], row["atoms"], row["threads"], f"{row['us_per_atom']:.1f}"]
        for row in found["rows"]
    ]
    where = f"{found['machine']['device']}; `{found['command']}`"
    head = ["structures", "atoms of each", "threads", "µs per atom and step"]
    return ["## Speed", table(head, rows), f"Steps of NVE, float32, median of rounds, on {where}"]


def _pair(row: Mapping[str, float] | None) -> str:
    return "" if row is None else f"{row['mae']:.3g} ({row['rmse']:.3g})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
