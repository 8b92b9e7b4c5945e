"""``atomeq benchmark matbench-discovery``: files in, files out, and on again."""

import gzip
import importlib.util
import json

import ase.io
import numpy as np
import pytest
from ase.build import bulk


@pytest.fixture
def line(workdir):
    structures = ase.io.read(workdir / "cu.extxyz", index=":")
    entries = []
    for number, atoms in enumerate(structures):
        atoms.info["material_id"] = f"wbm-1-{number}"
        potcars = ["PAW_PBE Cu_pv 06Sep2000"]
        parameters = {"run_type": "GGA", "hubbards": {}, "potcar_symbols": potcars}
        entry = {"parameters": parameters, "data": {}}
        entries.append({"material_id": f"wbm-1-{number}", "computed_structure_entry": entry})
    ase.io.write(workdir / "initial.extxyz", structures)
    (workdir / "entries.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    reference = {"Cu": {"energy": -4.1, "composition": {"Cu": 1}}}
    (workdir / "references.json").write_text(json.dumps(reference))
    return (
        "benchmark matbench-discovery initial.extxyz --potential small --out out --max-steps 3 "
        "--entries entries.jsonl --references references.json"
    )


def test_the_common_form(run, workdir, line, capsys):
    assert run(line) == 0
    (table,) = (workdir / "out").glob("*-discovery.csv.gz")
    (lines,) = (workdir / "out").glob("*-geo-opt.jsonl.gz")
    assert f"wrote out/{table.name} and out/{lines.name}" in capsys.readouterr().out
    text = gzip.decompress(table.read_bytes()).decode()
    assert text.splitlines()[0].startswith("material_id,energy,corrected_energy,e_form_per_atom,")
    assert [row[:7] for row in text.splitlines()[1:]] == ["wbm-1-0", "wbm-1-1"]
    assert run(line) == 0
    assert gzip.decompress(table.read_bytes()).decode() == text


def test_shards_say_what_is_left(run, workdir, line, capsys):
    told = []
    for k in range(5):
        assert run(f"{line} --shard {k}/5") == 0
        told.append("left to other shards" in capsys.readouterr().out)
    assert told[0]
    assert not told[-1]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("matbench-discovery", "matbench"), "matbench-discovery"),
        (("entries.jsonl", "nothing.jsonl"), "there is no file nothing.jsonl"),
        (("references.json", "entries.jsonl"), "no elemental reference entries"),
        (("--potential small", "--potential nothing"), "no potential at 'nothing'"),
    ],
)
def test_bad_input_is_one_line(run, line, capsys, change, complaint):
    assert run(line.replace(*change)) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("phono3py") is None, reason="phono3py is not installed (atomeq[kappa])"
)
def test_the_kappa_task(run, workdir, capsys):
    atoms = bulk("Cu")
    once = np.eye(3, dtype=int)
    asked = {"fc2_supercell": once, "fc3_supercell": once, "q_point_mesh": [1, 1, 1]}
    atoms.info = {"material_id": "mp-30", **asked}
    ase.io.write(workdir / "crystals.extxyz", atoms, format="extxyz")
    line = "benchmark matbench-discovery crystals.extxyz --task kappa --potential cu-pbe --out out"
    assert run(f"{line} --max-steps 2 --displacement 0.03") == 0
    (file,) = (workdir / "out").glob("*-phonons-kappa-103.json.gz")
    assert f"wrote out/{file.name}" in capsys.readouterr().out
    (row,) = json.loads(gzip.decompress(file.read_bytes()))
    assert row["material_id"] == "mp-30"
    assert row["n_steps"] <= 2
    assert run(f"{line} --shard 1/2") == 2  # the settings are others
    assert "is of another settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--task kappa --workers 2 --entries cu.extxyz", "no use for --entries and --workers"),
        ("--task discovery --displacement 0.01", "needs --entries and --references"),
    ],
)
def test_options_of_another_task_are_refused(run, workdir, capsys, line, complaint):
    given = "benchmark matbench-discovery cu.extxyz --potential small --out out"
    assert run(f"{given} {line}") == 2
    assert complaint in capsys.readouterr().err
