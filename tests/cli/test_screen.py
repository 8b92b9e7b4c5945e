"""``atomeq screen``: the common form, what it refuses, and how it goes on."""

import json

import ase.db
import pyarrow.parquet as pq
import pytest

from atomeq.cli import screen as screen_module

STEPS = """\
steps:
  - validate
  - relax: {max_steps: 3}
  - properties
  - rank: {by: energy_per_atom, top: 5}
"""
COLUMNS = (
    "id locator formula n_atoms status reason energy energy_per_atom max_force converged n_steps"
)


@pytest.fixture
def source(workdir):
    (workdir / "in").mkdir()
    (workdir / "cu.extxyz").rename(workdir / "in" / "cu.extxyz")
    (workdir / "in" / "empty.cif").touch()
    (workdir / "steps.yaml").write_text(STEPS)
    return workdir


def rows_of(folder):
    return pq.read_table(folder / "results").to_pylist()


def test_the_common_form(run, source, capsys):
    line = "screen in --potential small --out out --config steps.yaml --fmax 0.02 --cell"
    assert run(f"{line} --export-db all.db --export-chemiscope all.json.gz") == 0
    rows = rows_of(source / "out")
    assert set(COLUMNS.split()) <= rows[0].keys()
    assert [row["locator"] for row in rows if row["status"] == "failed"] == ["in/empty.cif#0"]
    assert len(rows) == 3
    settings = json.loads(rows[0]["provenance"])["settings"]["steps"]
    assert settings[1] == {
        "relax": {"fmax": 0.02, "cell": True, "max_steps": 3, "optimizer": "fire"}
    }
    assert (source / "out" / "report.html").exists()
    assert ase.db.connect(source / "all.db").count() == 2
    assert "unreadable" in capsys.readouterr().out
    assert run("screen --out out --resume") == 0
    assert sorted(map(str, rows_of(source / "out"))) == sorted(map(str, rows))
    assert run(f"{line} --max-steps 4") == 2
    assert "max_steps was 3 and is 4" in capsys.readouterr().err


def test_charges_are_left_out_where_that_is_asked_for(run, workdir, capsys):
    atoms = ase.io.read("cu.extxyz")
    charged = atoms.copy()
    charged.info["charge"] = 1
    ase.io.write("both.extxyz", [atoms, charged])
    (workdir / "steps.yaml").write_text("steps: [validate, dedupe, single_point]")
    line = "screen both.extxyz --potential small --config steps.yaml --out"
    assert run(f"{line} strict") == run(f"{line} out --ignore charge") == 0
    plain, refused = sorted(rows_of(workdir / "strict"), key=lambda row: row["locator"])
    assert (plain["status"], refused["status"]) == ("done", "failed")
    assert "total charge 1" in refused["reason"]
    rows = rows_of(workdir / "out")
    assert [row["status"] for row in rows] == ["done", "done"]
    assert rows[0]["energy"] == rows[1]["energy"] == plain["energy"]
    assert run("screen --out out --resume") == 0
    assert rows_of(workdir / "out") == rows
    assert run(f"{line} out") == 2
    assert "ignore" in capsys.readouterr().err


def test_dry_run_writes_nothing(run, source, capsys):
    line = "screen in --potential small --out out --config steps.yaml --dry-run"
    assert run(line) == 0
    assert not (source / "out").exists()
    assert "time for all" in capsys.readouterr().out


def test_an_interrupt_says_how_to_go_on(run, source, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(screen_module, "screen", interrupted)
    assert run("screen in --potential small --out out") == 130
    assert "go on with: atomeq screen --out out --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("screen --out out", "give SOURCE and --potential"),
        ("screen --out out --resume", "holds no screening"),
        ("screen nowhere --potential small --out out", "there is no file or folder"),
        ("screen in --potential small --out out --shard 3", "--shard is k/n"),
        ("screen in --potential nothing --out out", "no potential at 'nothing'"),
    ],
)
def test_bad_input_is_one_line(run, source, capsys, line, complaint):
    assert run(line) == 2
    assert complaint in capsys.readouterr().err
