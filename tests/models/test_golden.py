"""Every recorded case of tests/golden is reproduced, by the checkers that lie beside the cases."""

from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN

from checkers.cases import Case, FileCase
from checkers.registry import check, families, family_of, find_cases, main
from checkers.report import Report

pytestmark = pytest.mark.golden
CASES = [Case.read(path) for path in find_cases(GOLDEN)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_reference_is_reproduced(case: Case) -> None:
    report = check(case)
    assert not report.beyond()
    assert report.passed, report.notes
    expected = set(case.expected(torch.float64)) if has_tensors(case) else set(report.found)
    if isinstance(case, FileCase):
        assert expected == set(report.found)
    assert {name for name in expected if name.startswith(("out.energy", "out.forces"))} <= set(
        report.found
    )


def has_tensors(case: Case) -> bool:
    return not isinstance(case, FileCase) or bool(case.tensors)  # hypergraphs are no tensors


def test_every_family_has_a_case() -> None:
    assert {family_of(case) for case in CASES} == set(families())


def test_two_families_do_not_take_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    other = next(module for module in families() if module is not family_of(case))
    monkeypatch.setattr(other, "handles", lambda case: True)
    with pytest.raises(ValueError, match="must tell it apart"):
        family_of(case)


def test_report_refuses_what_differs() -> None:
    one = torch.ones(3, dtype=torch.float64)
    report = Report(FileCase.tolerances)
    report.compare("same", one, one, torch.float64)
    assert report.passed
    for other in (one + 1e-7, one[:2], one * torch.nan):
        report = Report(FileCase.tolerances)
        report.compare("other", other, one, torch.float64)
        assert not report.passed
        assert report.beyond() == ["other"]


def test_a_case_without_a_checker_fails(tmp_path: Path, capsys) -> None:
    (tmp_path / "egnn_unheard_of").mkdir()
    (tmp_path / "egnn_unheard_of" / "c0.json").write_text("{}")
    assert main([str(tmp_path)]) == 1
    assert main([str(CASES[0].path)]) == 0
    assert "1 of 1 cases within tolerance" in capsys.readouterr().out


def test_json_beside_the_cases_is_none(tmp_path: Path, capsys) -> None:
    (tmp_path / "params.json").write_text('{"model": "egnn of no case"}')
    (tmp_path / "list.json").write_text("[1, 2]")
    assert find_cases(tmp_path) == []
    assert main([str(tmp_path)]) == 1
    assert "0 of 0 cases" in capsys.readouterr().out
