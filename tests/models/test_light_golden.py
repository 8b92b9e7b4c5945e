"""Parity of the light models with their references, by the checkers of scripts/golden_light.py."""

from pathlib import Path

import pytest
import torch
from golden_cases import script
from golden_light import Case, Report, check, find_cases

pytestmark = pytest.mark.golden
FOLDER = Path(__file__).parents[1] / "golden" / "light_models"
CASES = find_cases(FOLDER)


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_reference_is_reproduced(path: Path) -> None:
    report = check(path)
    beyond = {
        name: found
        for name, found in report.found.items()
        if any(not deviation <= tolerance for deviation, tolerance in found.values())
    }
    assert not beyond
    assert report.passed, report.notes
    assert report.found
    if expected := set(Case.read(path).expected(torch.float64)):  # hypergraphs are no tensors
        assert expected == set(report.found)


def test_report_refuses_what_differs() -> None:
    one = torch.ones(3, dtype=torch.float64)
    report = Report()
    report.compare("same", one, one, torch.float64)
    assert report.passed
    for other in (one + 1e-7, one[:2], one * torch.nan):
        report = Report()
        report.compare("other", other, one, torch.float64)
        assert not report.passed


def test_a_case_without_a_checker_fails(tmp_path: Path, capsys) -> None:
    (tmp_path / "egnn_unheard_of").mkdir()
    (tmp_path / "egnn_unheard_of" / "c0.json").write_text("{}")
    main = script()["main"]
    assert main([str(tmp_path)]) == 1
    assert main([str(CASES[0])]) == 0
    assert "1 of 1 cases within tolerance" in capsys.readouterr().out
