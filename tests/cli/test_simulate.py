import csv
import json

import ase.io
import ase.md.verlet
import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from small_potential import small_potential

import atomeq
from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.report import TrajectoryReport
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.potential.checkpoint import WEIGHTS_FILE, sha256

ROUNDED = 1e-5  # extxyz holds eight decimals of a position
MD = "md cu.extxyz --potential small --out md.extxyz"


def summary(workdir, name="out"):
    return json.loads((workdir / f"{name}.summary.json").read_text())


def expected(atoms: Atoms):
    potential = small_potential()
    results = potential(potential.build_graph(atoms), ("energy", "forces", "stress"))
    return {key: value.numpy() for key, value in results.items()}


def test_single_point_writes_what_the_potential_says(run, workdir, capsys):
    assert run("single-point cu.extxyz --potential small --out out.extxyz") == 0
    frames = ase.io.read("out.extxyz", index=":")
    assert len(frames) == 2
    for atoms, row in zip(frames, summary(workdir)["structures"], strict=True):
        reference = expected(atoms)
        assert atoms.get_potential_energy() == pytest.approx(reference["energy"][0], abs=ROUNDED)
        np.testing.assert_allclose(atoms.get_forces(), reference["forces"], atol=ROUNDED)
        stress = atoms.get_stress(voigt=False)
        np.testing.assert_allclose(stress, reference["stress"][0], atol=ROUNDED)
        assert row["energy_eV"] == pytest.approx(reference["energy"][0], abs=ROUNDED)
    assert "Cu16" in capsys.readouterr().out


def test_summary_tells_what_the_result_depends_on(run, workdir):
    assert run("single-point cu.extxyz --potential small --out out.traj --dtype float32") == 0
    found = summary(workdir)
    assert found["potential"]["sha256"] == sha256(workdir / "small" / WEIGHTS_FILE)
    assert found["dtype"] == "float32"
    assert found["device"] == "cpu"
    assert {"torch", "ase", "python", "atomeq"} <= found["versions"].keys()
    asked = {"potential": "small", "device": "cpu", "dtype": "float32"}
    assert found["settings"] == asked | {"precision": None, "ignore": "", "head": None}
    assert len(ase.io.read("out.traj", index=":")) == 2


def test_single_atom_has_an_energy(run, workdir):
    (workdir / "free.xyz").write_text("1\n\nCu 0 0 0\n")
    assert run("single-point free.xyz --potential small --out out.extxyz") == 0
    row = summary(workdir)["structures"][0]
    assert row["max_force_eV_per_A"] == 0
    assert "pressure_GPa" not in row


def test_relax_lowers_the_forces(run, workdir):
    start = np.linalg.norm(expected(ase.io.read("cu.extxyz"))["forces"], axis=1).max()
    fmax = 0.9 * start  # a random potential has no minimum nearby to go to
    words = f"relax cu.extxyz --potential small --out out.extxyz --fmax {fmax} --optimizer fire"
    assert run(words) == 0
    rows = summary(workdir)["structures"]
    for atoms, row in zip(ase.io.read("out.extxyz", index=":"), rows, strict=True):
        assert row["converged"]
        assert row["max_force_eV_per_A"] <= fmax
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() <= fmax + ROUNDED
    assert rows[1]["steps"] > 0


def test_relax_says_when_it_does_not_converge(run, workdir, capsys):
    words = "relax cu.extxyz --potential small --out out.extxyz --fmax 1e-9 --max-steps 2 --cell"
    assert run(words) == 1
    rows = summary(workdir)["structures"]
    assert [row["steps"] for row in rows] == [2, 2]
    assert "not converged in 2 steps: structures 0, 1" in capsys.readouterr().out
    start, end = ase.io.read("cu.extxyz", index=0), ase.io.read("out.extxyz", index=0)
    assert not np.allclose(start.cell, end.cell)


@pytest.mark.parametrize(
    "ensemble",
    [
        *("nve", "nvt", "nvt --thermostat langevin", "nvt --thermostat nose-hoover"),
        *("npt", "npt --barostat anisotropic", "nvt --temperature-end 500"),
    ],
)
def test_md_runs_in_every_ensemble(run, workdir, ensemble):
    assert run(f"{MD} --ensemble {ensemble} --steps 6 --interval 2 --timestep 0.5") == 0
    frames = ase.io.read("md.extxyz", index=":")
    assert [atoms.info["step"] for atoms in frames] == [0, 2, 4, 6]
    assert frames[-1].info["time_fs"] == 3.0
    assert not frames[0].constraints
    assert np.abs(frames[-1].get_momenta()).max() > 0
    with (workdir / "md.log.csv").open() as stream:
        log = list(csv.DictReader(stream))
    assert [float(line["step"]) for line in log] == [0, 2, 4, 6]
    assert all(50 < float(line["temperature_K"]) < 600 for line in log)
    assert summary(workdir, "md")["settings"]["seed"] == 0
    assert len(list(workdir.glob("md.*"))) == 6
    start, end = frames[0].cell.array, frames[-1].cell.array
    assert np.array_equal(start, end) == (not ensemble.startswith("npt"))
    if ensemble == "npt":
        np.testing.assert_allclose(end / end[0, 0], start / start[0, 0], atol=1e-7)


def test_md_reports_distances_and_displacements(run, workdir):
    assert run(f"{MD} --ensemble nve --steps 4 --interval 2 --timestep 0.5") == 0
    report = json.loads((workdir / "md.report.json").read_text())
    assert report["time_fs"] == [0, 1, 2]
    displacement = report["mean_squared_displacement_A2"]
    assert displacement[0] == 0
    assert 0 < displacement[1] < displacement[2]
    assert (workdir / "md.png").read_bytes().startswith(b"\x89PNG")


def test_radial_distribution_counts_neighbours():
    crystal, report = bulk("Cu", cubic=True, a=3.6), TrajectoryReport()
    report.add(crystal)
    r, g = report.distances
    counts = g * 4 * np.pi * r**2 * (r[1] - r[0]) * len(crystal) / crystal.get_volume()
    first = np.abs(r - 3.6 / np.sqrt(2)) < 0.2
    assert counts[first].sum() == pytest.approx(12, rel=1e-3)
    assert counts[r < 2.3].sum() == 0
    pair = TrajectoryReport()
    pair.add(Atoms("Cu2", [[0, 0, 0], [0, 0, 2.41]]))
    r, neighbours = pair.distances
    assert (neighbours * (r[1] - r[0])).sum() == pytest.approx(1)


def test_displacements_leave_out_drift_and_the_breathing_of_the_cell():
    crystal, report = bulk("Cu", cubic=True), TrajectoryReport()
    report.add(crystal)
    shifted = crystal.copy()
    shifted.positions += 0.7
    shifted.set_cell(crystal.cell * 1.05, scale_atoms=True)
    report.add(shifted)
    shifted.positions[0] += (0.21, 0, 0)  # a fourth of it is drift
    report.add(shifted)
    still, moved = report.mean_squared_displacement[1:]
    assert still == pytest.approx(0, abs=1e-20)
    assert moved == pytest.approx((0.15**2 + 3 * 0.05**2) / 4)


def test_md_repeats_itself_by_its_seed(run, workdir):
    finals = []
    for seed in (1, 1, 2):
        assert run(f"{MD} --ensemble nvt --steps 5 --seed {seed} --overwrite") == 0
        finals.append(ase.io.read("md.extxyz").positions)
    assert np.array_equal(finals[0], finals[1])
    assert not np.allclose(finals[0], finals[2])


def test_md_starts_at_the_temperature_and_keeps_given_velocities(run, workdir):
    assert run(f"{MD} --ensemble nve --steps 1 --temperature 450") == 0
    assert summary(workdir, "md")["velocities"] == "drawn"
    with (workdir / "md.log.csv").open() as stream:
        assert float(next(csv.DictReader(stream))["temperature_K"]) == pytest.approx(450)
    words = "md md.extxyz --potential small --out again.extxyz --ensemble nve --steps 1"
    assert run(words) == 0
    assert summary(workdir, "again")["velocities"] == "from the file"
    ends, starts = ase.io.read("md.extxyz"), ase.io.read("again.extxyz", index=0)
    np.testing.assert_allclose(ends.get_momenta(), starts.get_momenta(), atol=1e-6)


def test_fixed_atoms_stay_and_come_back(run, workdir):
    atoms = ase.io.read("cu.extxyz", index=0)
    atoms.set_constraint(FixAtoms([0, 1]))
    ase.io.write("fixed.traj", atoms)
    words = "md fixed.traj --potential small --out md.traj --ensemble nvt --steps 5"
    assert run(words) == 0
    end = ase.io.read("md.traj")
    np.testing.assert_allclose(end.positions[:2], atoms.positions[:2])
    assert end.constraints[0].index.tolist() == [0, 1]
    assert run(words.replace("nvt", "npt") + " --overwrite") == 2


def test_ase_integrators_stay_a_door_of_users(workdir):
    """The engine's velocity Verlet and ASE's, driven by the calculator, go the same way."""
    atoms = ase.io.read("cu.extxyz", index=0)
    atoms.set_momenta(np.random.default_rng(0).normal(0, 1, (16, 3)))
    atoms.set_momenta(atoms.get_momenta() - atoms.get_momenta().mean(axis=0))
    motion = VelocityVerlet(timestep=0.5)
    (outcome,) = atomeq.simulate(atoms, "small", motion, n_steps=20)
    atoms.calc = AtomeqCalculator("small")
    ase.md.verlet.VelocityVerlet(atoms, timestep=0.5 * ase.units.fs).run(20)
    np.testing.assert_allclose(outcome.atoms.positions, atoms.positions, atol=1e-6)
    np.testing.assert_allclose(outcome.atoms.get_momenta(), atoms.get_momenta(), atol=1e-5)


def test_progress_is_plain_text_where_there_is_no_terminal(run, capsys):
    assert run(f"{MD} --ensemble nve --steps 3") == 0
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("md nve: 3/3 steps, ")
    assert "steps/s, 0 s left" in line
    assert "\x1b" not in line
