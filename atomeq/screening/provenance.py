"""Provenance: what a row's numbers depend on, as plain values."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from atomeq.potential.committee import provenance_of as origin_of
from atomeq.potential.potential import Potential
from atomeq.screening.steps import hash_settings

_PACKAGES = ("atomeq", "torch", "torch_geometric", "numpy", "ase", "vesin", "pymatgen", "spglib")


def provenance_of(
    potential: str | Path | Potential,
    loaded: Potential,
    steps: list[dict[str, Any]],
    *,
    columns: dict[str, Any],
) -> dict[str, Any]:
    """Return the provenance of a run.

    The settings hash, by which results are known, is that of the steps that compute something, of
    dtype, precision, what is ignored and the potential's SHA-256. Filters and rankings can be
    changed without computing again. Device and versions are told but not part of it: they change
    digits, not results.

    Args:
        potential: As it was given.
        loaded: The potential that computes.
        steps: As plain values, with all defaults.
        columns: Settings of what sources say of structures, ``id_key`` and ``info``.
    """
    origin = origin_of(None if isinstance(potential, Potential) else str(potential), loaded)
    name = origin["name"] or type(loaded.model).__name__
    dtype = str(loaded.dtype).removeprefix("torch.")
    settings = {"steps": steps, "dtype": dtype, "potential_sha256": origin["sha256"], **columns}
    if loaded.precision is not None:
        settings["precision"] = loaded.precision
    if loaded.ignored:
        settings["ignore"] = sorted(loaded.ignored)
    computing = [step for step in steps if not step.keys() & {"filter", "rank"}]
    return {
        "settings_hash": hash_settings({**settings, "steps": computing}),
        "settings": settings,
        "potential": {"name": Path(name).name, "sha256": origin["sha256"]},
        "dtype": dtype,
        "device": _device(loaded.device),
        "versions": dict(_versions()),
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


@cache  # what was imported stays what it is
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from the source tree
            found[name] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """Return the commit of a source tree; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
