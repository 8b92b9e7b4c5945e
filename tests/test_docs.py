"""README and docs: short, links lead somewhere, commands exist, and their Python runs."""

import inspect
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

import benchmark
import pytest
from lightning.pytorch import Trainer

from atomeq.cli import main as command
from atomeq.training.callbacks import RunCheckpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINED_BY_FILE = ("fit", "validate", "test", "predict")  # their options are those of the file
GROUPS = ("data", "potentials")  # a second word says what
README_LINES = 150


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command, in blocks and between backticks."""
    shell = re.sub(r"<<'EOF'.*?^EOF", "", "".join(blocks(page, "bash")), flags=re.M | re.DOTALL)
    lines = shell.replace("\\\n", " ").splitlines()
    quoted = re.findall(r"`([^`]+)`", page.read_text())
    lines += [" ".join(text.split()) for text in quoted if "\n\n" not in text]
    found = [shlex.split(line, comments=True) for line in lines if "'" not in line]
    found = [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in found]
    return [words for words in found if words]


def help_of(verb: str, second: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with suppress(SystemExit):
        command([verb, *second, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: atomeq {verb}")
    return text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "examples").iterdir()), ids=lambda path: path.name
)
def test_examples_for_clusters_are_what_they_seem(path: Path) -> None:
    """They parse, and every option of atomeq that they give is one."""
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", str(path)], check=True)
    else:
        compile(path.read_text(), str(path), "exec")
    keys = set(re.findall(r"--(trainer|checkpoint)\.(\w+)", path.read_text()))
    known = {"trainer": inspect.signature(Trainer), "checkpoint": inspect.signature(RunCheckpoint)}
    assert keys
    assert [key for part, key in keys if key not in known[part].parameters] == []


def test_readme_is_short_and_the_index_has_every_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    named = re.findall(r"`((?:scripts|configs|tests|potentials|atomeq)/[\w./-]+)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for words in commands(page):
        script = next((w for w in words if w.startswith("scripts/")), None)
        if script is not None and not any(letter in script for letter in "*{"):
            assert (ROOT / script).exists(), words
        if script == "scripts/benchmark.py" and words[-1] != script:
            assert words[words.index(script) + 1] in benchmark.benchmarks(), words
        if words[0] != "atomeq" or len(words) == 1:
            continue
        verb, second = words[1], words[2:3] if words[1] in GROUPS else []
        text = help_of(verb, second, capsys)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if verb not in TRAINED_BY_FILE:
            assert {option for option in options if option not in text} == set(), words


@pytest.mark.parametrize("name", ["README.md", "docs/first_steps.md"])
def test_python_of_the_first_minutes_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in blocks(ROOT / name, "python"):
        exec(compile(block, name, "exec"), space)
    results = space["results"]
    assert isinstance(results, dict)
    assert set(results) >= {"energy", "forces", "stress"}
    assert type(space["structure"]).__name__ == "Structure"
