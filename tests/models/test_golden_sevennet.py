"""NequIP in SevenNet's form equals the reference implementation."""

import importlib
import json
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parents[1] / "golden" / "sevennet").glob("sevennet_*"))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_equals_the_reference(case):
    description = json.loads((case / "case.json").read_text())
    report = importlib.import_module("golden").check_sevennet(case, description)
    assert {"out.energy", "out.forces"} <= set(report.deviations)
    assert report.passed, report.deviations
