"""A file name may hold anything: markup, escape sequences, bytes that are no UTF-8, line breaks."""

import io
import os
from pathlib import Path

import ase.io
import pytest
from ase.build import bulk
from rich.console import Console
from small_potential import small_potential

from atomeq.cli import main
from atomeq.cli.terminal import Meter, show_table
from atomeq.potential.checkpoint import save_potential

NAMES = {
    "markup": "[red]boo[/nope].extxyz",
    "escape": "\x1b[2J\x1b]0;owned\x07cu.extxyz",
    "latin": os.fsdecode(b"m\xfcnster.extxyz"),
    "line": "a\nb.extxyz",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_potential(small_potential(), tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    for name in NAMES.values():
        for place in (name, f"out{name}"):
            Path(place).parent.mkdir(exist_ok=True)
    return tmp_path


def run(*words: str) -> int:
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("verb", ["single-point", "neb"])
def test_a_structure_of_any_name_is_computed(name, verb, capfdbinary):
    first = bulk("Cu", cubic=True)
    second = first.copy()
    second.positions[0] += 0.2
    ase.io.write("plain.extxyz", [first, second])
    os.rename("plain.extxyz", name)
    extra = ["--images", "1", "--max-steps", "1"] if verb == "neb" else []
    assert run(verb, name, "--potential", "small", "--out", f"out{name}", *extra) in (0, 1)
    assert Path(f"out{name}").exists()
    out, err = capfdbinary.readouterr()
    assert b"\x1b" not in out + err
    assert b"Traceback" not in err


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_errors_name_the_file_in_one_harmless_line(name, capsys):
    Path(name).write_text("nonsense")
    for words in (
        ("single-point", f"absent{name}", "--potential", "small", "--out", "out.extxyz"),
        ("single-point", name, "--potential", "small", "--out", "out.extxyz"),
        ("relax", name, "--potential", f"{name}", "--out", "out.extxyz"),
        ("relax", name, f"--{name}", "--potential", "small", "--out", "out.extxyz"),
    ):
        assert run(*words) == 2
        err = capsys.readouterr().err
        assert err.endswith("\n")
        assert err[:-1].isprintable()
        assert "extxyz" in err


def test_tables_and_bars_show_names_as_they_are():
    name = NAMES["markup"]
    stream = io.StringIO()
    meter = Meter(name, 1, unit=name, console=Console(file=stream, force_terminal=True, width=200))
    with meter.running():
        meter.advance(note=name)
    assert stream.getvalue().count(name) >= 2


def test_cells_of_a_table_are_no_markup(capsys):
    show_table(["[b]name[/x]", "value"], [[NAMES["markup"], NAMES["escape"]]])
    out = capsys.readouterr().out
    assert "[b]name[/x]" in out
    assert NAMES["markup"] in out
    assert "\x1b" not in out
