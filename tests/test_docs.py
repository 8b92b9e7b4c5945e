"""README and docs: short, links lead somewhere, commands exist, and their Python runs.

What the API pages list has whole docstrings. The tutorials are executed as the site is built.
"""

import ast
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import benchmark
import pytest
from lightning.pytorch import Trainer

from atomeq.cli import main as command
from atomeq.training.callbacks import RunCheckpoint

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
PAGES = [ROOT / "README.md", *SITE]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
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


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_every_page_stands_in_the_index_and_in_the_sidebar() -> None:
    names = {page.relative_to(DOCS).as_posix() for page in SITE} - {"README.md", "index.md"}
    listed = {name for name in re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "README.md").read_text())}
    assert {name for name in names if not name.startswith("api/")} <= listed
    sidebar = set(toctree(DOCS / "index.md"))
    assert sidebar | {f"api/{name}" for name in toctree(DOCS / "api" / "index.md")} == names


def toctree(page: Path) -> list[str]:
    """Return the files that a page's tables of contents name."""
    blocks = re.findall(r"^```\{toctree\}\n((?:.*\n)*?)```", page.read_text(), re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [f"{line}.md" for line in lines if line and not line.startswith(":")]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_cells_of_a_tutorial_parse_and_draw_a_figure(page: Path) -> None:
    """An error in a cell is found by the build alone, but for what reading it can tell."""
    assert page.read_text().startswith("---\nfile_format: mystnb\n")
    cells = blocks(page, r"\{code-cell\}")
    python = [cell for cell in cells if not re.match(r"(:.*\n)*%%", cell)]
    names = {
        name for cell in python for node in ast.walk(ast.parse(cell)) for name in imported(node)
    }
    for name in names:
        module, _, member = name.rpartition(".")
        known = find_spec(name) if name.startswith("atomeq") and not module else None
        assert known or not module.startswith("atomeq") or hasattr(import_module(module), member)
    assert any("plt.show()" in cell for cell in python)


def imported(node: ast.AST) -> list[str]:
    """Return the full names that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def public() -> Iterator[tuple[str, Any]]:
    """Yield what the API pages list, by its full name."""
    for page in sorted((DOCS / "api").glob("*.md")):
        text = page.read_text()
        for module, names in re.findall(r"automodule:: ([\w.]+)\n +:members: (.+)", text):
            for name in names.split(", "):
                yield f"{module}.{name}", getattr(import_module(module), name)
        for name in re.findall(r"auto(?:function|class):: atomeq\.(\w+)", text):
            yield f"atomeq.{name}", getattr(import_module("atomeq"), name)


def functions(name: str, thing: Any) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Yield what is called, its full name, and what the docstring of its class adds.

    Methods that a base class explains are left out, and so are generated constructors.
    """
    if not inspect.isclass(thing):
        yield name, inspect.unwrap(thing), ""
        return
    for key, value in vars(thing).items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if not inspect.isfunction(function) or not function.__code__.co_filename.endswith(".py"):
            continue
        if key == "__init__" and function.__module__ == thing.__module__:
            yield name, function, inspect.getdoc(thing) or ""
        elif not key.startswith("_") and not any(hasattr(base, key) for base in thing.__mro__[1:]):
            yield f"{name}.{key}", function, ""


def missing(function: Callable[..., Any], doc: str) -> list[str]:
    """Return which arguments, results and errors a docstring does not name.

    An argument stands under Args or, as ``name``, in the text; a method with a single one may leave
    it to its sentence.
    """
    doc += "\n" + (inspect.getdoc(function) or "")
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    constructor = function.__name__ == "__init__"
    parameters = inspect.signature(function).parameters
    arguments = [name for name in parameters if name not in ("self", "cls")]
    if len(arguments) == 1 and len(parameters) == 2 and not constructor:
        arguments = []
    lacks = [
        f"the argument {name}"
        for name in arguments
        if not re.search(rf"^ +\*{{0,2}}{name}:|``{name}``", doc, re.MULTILINE)
    ]
    returns = ast.unparse(node.returns) if node.returns is not None else "None"
    said = re.search(r"^(Returns|Yields):|^(Return|Yield)\b", doc, re.MULTILINE)
    if not constructor and returns != "None" and not said:
        lacks.append("what it returns")
    lacks += [f"that it raises {name}" for name in raised(node) if name not in doc]
    return lacks


def raised(node: ast.FunctionDef) -> list[str]:
    """Return the errors that a function raises by name, but of what a subclass has to define."""
    calls = [each.exc for each in ast.walk(node) if isinstance(each, ast.Raise)]
    names = [ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)]
    return sorted({name for name in names if name != "NotImplementedError"})


def test_public_functions_say_what_they_take_give_and_raise() -> None:
    every = [found for name, thing in public() for found in functions(name, thing)]
    assert len(every) > 200  # the pages were read
    lacking = {name: lacks for name, function, doc in every if (lacks := missing(function, doc))}
    assert lacking == {}


def test_a_docstring_that_lacks_something_is_seen() -> None:
    def area(width: float, height: float) -> float:
        """Multiply two lengths.

        Args:
            width: Å.
        """
        if width < 0:
            raise ValueError(width)
        return width * height

    assert missing(area, "") == [
        "the argument height",
        "what it returns",
        "that it raises ValueError",
    ]


def test_links_of_the_index_have_titles_on_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which the configuration adds to
    led = runpy.run_path(str(DOCS / "conf.py"))["led_into_the_site"]
    text = "[gpu.md](gpu.md), [a GPU](gpu.md#precision), [README](../README.md#models), [x](x.md)"
    expected = "[](gpu.md), [a GPU](gpu.md#precision), [README](index.md), [x](x.md)"
    assert led(text, DOCS, DOCS / "index.md") == expected


@pytest.mark.slow
@pytest.mark.skipif(find_spec("furo") is None, reason="the site needs the dependency group docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-b", "html"]
    result = subprocess.run(
        [*command, str(DOCS), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page: Path) -> None:
    text = page.read_text()
    text = re.sub(r"^```\{code-cell\}\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
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
