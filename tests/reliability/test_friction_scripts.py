"""What the scripts do to a machine is what its owner asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("environment", "installs"),
    [({}, False), ({"ATOMEQ_TEST_BROWSER": "1"}, True), ({"CI": "true"}, True)],
)
def test_test_sh_installs_a_browser_only_where_asked(tmp_path, environment, installs):
    for folder in ("scripts", ".venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts/test.sh", tmp_path / "scripts")
    (tmp_path / "scripts/setup.sh").touch()
    tools = {  # all that the script may call; what would install notes that it was called
        "bin/apt-get": 'echo "apt-get $*" >> "$LOG"',
        ".venv/bin/python": 'echo "python $*" >> "$LOG"',
    }
    for name, line in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "sh", "id", "dirname", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        [shutil.which("bash") or "bash", "scripts/test.sh", "tests/graph"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin"), "LOG": str(tmp_path / "log"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls[-1] == "python -m pytest -n 2 tests/graph"
    assert (len(calls) > 1) == installs
    assert ("ATOMEQ_TEST_BROWSER=1" in done.stdout) != installs
    assert "apt-get" in "".join(calls) or not (installs and os.getuid() == 0)
