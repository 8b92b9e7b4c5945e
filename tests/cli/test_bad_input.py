import os
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
import torch
from ase import Atoms

from atomeq.files import write_atomically

ATOMEQ = [sys.executable, "-c", "from atomeq.cli import main; main()"]
SINGLE_POINT = "single-point {} --potential small --out out.extxyz"


@pytest.fixture
def files(workdir: Path) -> Path:
    text = (workdir / "cu.extxyz").read_text()
    (workdir / "truncated.extxyz").write_text(text[: len(text) // 3])
    (workdir / "empty.extxyz").write_text("")
    (workdir / "garbage.cif").write_bytes(bytes(range(256)))
    (workdir / "nan.extxyz").write_text("2\npbc=F\nCu 0 0 0\nCu 0 nan 2\n")
    (workdir / "close.extxyz").write_text("2\npbc=F\nCu 0 0 0\nCu 0 0 0.01\n")
    ase.io.write(workdir / "gold.extxyz", Atoms("Au2", [[0, 0, 0], [0, 0, 2.5]]))
    (workdir / "folder").mkdir()
    shutil.copytree(workdir / "small", workdir / "damaged")
    weights = workdir / "damaged" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    shutil.copytree(workdir / "small", workdir / "future")
    model = workdir / "future" / "model.yaml"
    model.write_text(model.read_text().replace("checkpoint_version: 1", "checkpoint_version: 99"))
    return workdir


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SINGLE_POINT.format("absent.cif"), "no file absent.cif"),
        (SINGLE_POINT.format("truncated.extxyz"), "cannot read structures from truncated.extxyz"),
        (SINGLE_POINT.format("empty.extxyz"), "cannot read structures from empty.extxyz"),
        (SINGLE_POINT.format("garbage.cif"), "cannot read structures from garbage.cif"),
        (SINGLE_POINT.format("nan.extxyz"), "nan.extxyz[0] (Cu2): position of atom 1"),
        (SINGLE_POINT.format("close.extxyz"), "0.01 Å apart"),
        (SINGLE_POINT.format("gold.extxyz"), "Au"),
        ("single-point cu.extxyz --potential absent --out out.extxyz", "no potential at 'absent'"),
        ("single-point cu.extxyz --potential damaged --out out.extxyz", "SHA-256"),
        ("single-point cu.extxyz --potential future --out out.extxyz", "checkpoint_version 99"),
        ("single-point cu.extxyz --potential small --out out.pdb", ".extxyz"),
        ("single-point cu.extxyz --potential small --out nowhere/out.extxyz", "no folder nowhere"),
        ("single-point cu.extxyz --potential small --out out.extxyz --device tpu", "tpu"),
        ("single-point cu.extxyz --potential small --out out.extxyz --dtype half", "half"),
        ("single-point cu.extxyz --potential small", "out"),
        ("relax cu.extxyz --potential small --out out.extxyz --fmaxx 1", "--fmaxx"),
        ("relax cu.extxyz --potential small --out out.extxyz --fmax -1", "fmax"),
        ("relax atom.extxyz --potential small --out out.extxyz --optimizer magic", "magic"),
        ("relax gold.extxyz --potential small --out out.extxyz --cell", "Au"),
        ("md atom.extxyz --potential small --out out.extxyz", "nothing can move"),
        ("md cu.extxyz --potential small --out out.extxyz --ensemble nph", "nph"),
        ("md cu.extxyz --potential small --out out.extxyz --steps 0", "steps"),
        ("md cu.extxyz --potential small --out out.extxyz --index 7", "cannot read structures"),
        ("check absent", "no potential at 'absent'"),
        ("check absent.yaml", "absent.yaml is not readable YAML"),
        ("check small/model.yaml", "the model None"),
        ("check small --quick --full", "not allowed with argument"),
        ("check no_such_module:factory", "cannot import no_such_module:factory"),
        ("check math:pi", "not something to call"),
        ("check math:sqrt", "math:sqrt() raised TypeError"),
        ("check builtins:dict", "not an ASE calculator"),
        ("check small --json nowhere/laws.json", "no folder nowhere"),
        ("check small --only beauty", "no law 'beauty'"),
        ("relaxx small", "there is no 'relaxx'"),
    ],
)
def test_error_is_one_line_and_leaves_nothing(files, run, capsys, line, message):
    before = sorted(files.rglob("*"))
    assert run(line) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert len(errors) == 1
    assert message in errors[0]
    assert errors[0].startswith("atomeq")
    assert sorted(files.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_cuda_is_an_error(run, workdir, capsys):
    line = "single-point cu.extxyz --potential small --out out.extxyz --device cuda"
    assert run(line) == 2
    assert "finds no CUDA" in capsys.readouterr().err


def test_process_shows_no_traceback(workdir):
    words = ["single-point", "absent.cif", "--potential", "small", "--out", "out.extxyz"]
    done = subprocess.run([*ATOMEQ, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "atomeq: error: there is no file absent.cif\n"


def test_traceback_is_there_for_those_who_ask(run, monkeypatch):
    monkeypatch.setenv("ATOMEQ_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run(SINGLE_POINT.format("absent.cif"))


def test_atomic_write_replaces_or_leaves(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), write_atomically(path) as partial:
        partial.write_text(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with write_atomically(path) as partial:
        assert partial.suffix == ".json"
        assert str(os.getpid()) in partial.name
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(IsADirectoryError), write_atomically(tmp_path):
        pass
