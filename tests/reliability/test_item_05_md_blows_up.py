"""Item 5: dynamics that blow up stop with the step and the way out, and keep their frames."""

import json

import ase.io
import numpy as np
import pytest

HOT = "md cu.extxyz --potential small --out md.extxyz --timestep 200 --temperature 200000"


def test_a_run_that_blows_up_says_at_which_step(run, workdir, capsys):
    assert run(f"{HOT} --ensemble nve --steps 50") == 1
    text = capsys.readouterr().out
    assert "broke down after step 0" in text
    assert "exploded" in text
    assert "(step 1)" in text
    assert "Take a smaller --timestep than 200 fs" in text
    found = json.loads((workdir / "md.summary.json").read_text())
    assert (found["status"], found["steps"]) == ("failed", 0)


@pytest.mark.parametrize("thermostat", ["bussi", "langevin"])
def test_frames_before_the_end_are_kept(thermostat, run, workdir, capsys):
    """Heated to where two ångström a step are exceeded, on the way."""
    words = "md cu.extxyz --potential small --out md.extxyz --timestep 10 --interval 3 --steps 400"
    heat = f"--temperature 300 --temperature-end 3e6 --thermostat {thermostat}"
    assert run(f"{words} {heat} --thermostat-time 20") == 1
    found = json.loads((workdir / "md.summary.json").read_text())
    assert found["status"] == "failed"
    assert f"(step {found['steps'] + 1})" in capsys.readouterr().out
    steps = [atoms.info["step"] for atoms in ase.io.read("md.extxyz", index=":")]
    regular = list(range(0, found["steps"] + 1, 3))
    assert steps == sorted({*regular, found["steps"]})
    assert len(steps) > 2
    for atoms in ase.io.read("md.extxyz", index=":"):
        assert np.isfinite(atoms.get_forces()).all()
        assert np.isfinite(atoms.get_momenta()).all()


def test_one_that_blows_up_harms_no_other(run, workdir, capsys):
    structures = ase.io.read("cu.extxyz", index=":")
    structures[0].set_momenta(np.full((16, 3), 1e3) * np.sign(structures[0].positions - 2))
    ase.io.write("two.extxyz", structures)
    words = "md two.extxyz --potential small --index : --steps 8 --interval 4 --ensemble nve"
    assert run(f"{words} --timestep 0.5 --out md.extxyz") == 1
    rows = json.loads((workdir / "md.summary.json").read_text())["structures"]
    assert [row["status"] for row in rows] == ["failed", "completed"]
    assert "structure 0 broke down" in capsys.readouterr().out
    assert len(ase.io.read("md-1.extxyz", index=":")) == 3
