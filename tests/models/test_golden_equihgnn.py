"""The published forms of MHNN and EquiHGNN, and their hypergraphs, against the reference code."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted((ROOT / "tests" / "golden" / "light_models").glob("equihgnn_*/*.json"))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_form_agrees_with_the_reference(case: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    report = importlib.import_module("golden_light").check(case)
    assert report.passed, (report.notes, report.found)
