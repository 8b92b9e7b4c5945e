"""Newer Pythons than the one at hand, where this machine has them: what can be told without torch.

Every file compiles without a warning, and the face and the command's help work on the standard
library alone. The suite itself runs on the interpreter that the environment was made with.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILE = """
import sys
from pathlib import Path
files = [path for folder in sys.argv[1:] for path in Path(folder).rglob("*.py")]
for path in files:
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
print(len(files))
"""


def interpreter(version: str) -> str | None:
    """Return a Python of this version: on the path, or beside the one that runs."""
    beside = sorted(Path(sys.base_prefix).parent.glob(f"{version}.*/bin/python3"))
    for candidate in (shutil.which(f"python{version}"), *map(str, beside)):
        works = candidate and subprocess.run(
            [candidate, "-c", ""], capture_output=True, check=False
        )
        if works and works.returncode == 0:
            return candidate
    return None


@pytest.fixture(params=["3.12", "3.13", "3.14"])
def python(request: pytest.FixtureRequest) -> str:
    found = interpreter(request.param)
    return found or pytest.skip(f"this machine has no Python {request.param}")


def test_every_file_compiles_without_a_warning(python: str) -> None:
    folders = [str(ROOT / name) for name in ("atomeq", "scripts", "tests", "docs")]
    result = subprocess.run(
        [python, "-I", "-W", "error", "-c", COMPILE, *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 400  # the folders were found


def test_the_command_gives_its_help_before_anything_is_installed(python: str) -> None:
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    command = f"{path}; from atomeq.cli import main; main(['--help'])"
    result = subprocess.run(
        [python, "-I", "-S", "-W", "error", "-c", command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.startswith("usage: atomeq VERB"), result.stderr
