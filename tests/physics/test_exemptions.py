"""An exemption is an error where the law holds after all."""

import subprocess
import sys
from pathlib import Path

LAWS = """
import pytest
from exemptions import expect_failure

@pytest.fixture(autouse=True)
def exempted(request):
    expect_failure(request, {"holds": "a reason", "is_broken": "a reason", "crashes": "a reason"})

def test_holds():
    pass

def test_is_broken():
    assert False

def test_crashes():
    raise ValueError

def test_of_no_exemption():
    assert False
"""


def test_an_exempted_law_must_be_broken(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(LAWS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {Path(__file__).parents[1]}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    for line in (
        "XPASS(strict)",
        "XFAIL test_inner.py::test_is_broken",
        "FAILED test_inner.py::test_holds",
        "FAILED test_inner.py::test_crashes",
        "FAILED test_inner.py::test_of_no_exemption",
    ):
        assert line in run.stdout
