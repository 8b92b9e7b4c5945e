"""Distributions that a test installs: a folder on the path with metadata, as pip leaves it."""

import importlib
import sys
from pathlib import Path

import pytest


def install(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    name: str,
    entry_points: dict[str, dict[str, str]],
    modules: dict[str, str],
) -> None:
    """Put modules and their metadata into a folder, where this process and its children look.

    Args:
        monkeypatch: Takes the folder from the path again.
        folder: A new one.
        name: Of the distribution.
        entry_points: Group, name and ``module:object`` of each.
        modules: Source of each module by its name.
    """
    folder.mkdir()
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, offers in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in offers.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    importlib.invalidate_caches()
