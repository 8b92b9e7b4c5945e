"""LAMMPS moves atoms by a potential's forces as ASE does; skipped where LAMMPS is not installed."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.md.verlet import VelocityVerlet
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.lammps import LammpsForces, lammps
from atomeq.potential.committee import NotFiniteError
from benchmarks.lammps import bars, side_by_side

try:
    lammps("-screen", "none", "-log", "none").close()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

BAR = 1e-5 * units.Pascal**-1  # of eV/Å³


def started(atoms: Atoms, elements: list[str], *, unit: str = "metal", before: str = ""):
    """LAMMPS with the atoms of a structure whose cell is lower triangular already."""
    lmp = lammps("-screen", "none", "-log", "none", "-nocite")
    (lx, _, _), (xy, ly, _), (xz, yz, lz) = atoms.cell.array
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    lmp.commands_string(f"units {unit}\natom_modify map yes\nboundary {boundary}\n{before}")
    lmp.command("box tilt large")
    lmp.command(f"region box prism 0 {lx} 0 {ly} 0 {lz} {xy} {xz} {yz}")
    lmp.command(f"create_box {len(elements)} box")
    types = [elements.index(symbol) + 1 for symbol in atoms.symbols]
    lmp.create_atoms(len(atoms), None, types, atoms.positions.ravel().tolist())
    for number, symbol in enumerate(elements, start=1):
        lmp.command(f"mass {number} {Atoms(symbol).get_masses()[0]}")
    lmp.commands_string("pair_style zero 5.0\npair_coeff * *\nneighbor 1.0 bin")
    return lmp


def alloy() -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    atoms.symbols[[1, 6]] = "Al"
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0, 0], [0.1, 1, 0], [-0.2, 0.15, 1.0]]), True)
    atoms.rattle(0.05, seed=0)
    atoms.wrap()
    return atoms


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 1, 3), vacuum=4.0, orthogonal=False)
    atoms.pbc = (True, True, False)
    return atoms


def pressure_of(lmp) -> np.ndarray:
    return np.array([lmp.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")])


@pytest.mark.parametrize("make", [alloy, slab])
def test_energy_forces_and_pressure_are_those_of_ase(make):
    atoms = make()
    lmp = started(atoms, ["Cu", "Al"])
    forces = LammpsForces(lmp, small_potential(), ["Cu", "Al"])
    forces.run("run 0")
    atoms.calc = AtomeqCalculator(small_potential())
    assert forces.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
    assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
    n = len(atoms)  # ghosts come behind
    order = np.argsort(lmp.numpy.extract_atom("id")[:n])
    assert np.allclose(lmp.numpy.extract_atom("f")[:n][order], atoms.get_forces(), atol=1e-7)
    assert np.allclose(forces.forces, atoms.get_forces(), atol=1e-7)
    periodic = atoms.copy()
    periodic.pbc = True
    if atoms.pbc.all():
        periodic.calc = AtomeqCalculator(small_potential())
        expected = -periodic.get_stress()[[0, 1, 2, 5, 4, 3]]
        assert np.allclose(pressure_of(lmp), expected * BAR, rtol=1e-6, atol=1e-2)


def in_motion(fs: float) -> tuple[Atoms, LammpsForces]:
    """Atoms in ASE and in LAMMPS with the same velocities, about to move in steps of so many fs."""
    atoms = alloy()
    atoms.set_velocities(0.02 * np.random.default_rng(0).standard_normal((8, 3)))
    atoms.calc = AtomeqCalculator(small_potential())
    lmp = started(atoms, ["Cu", "Al"], before="atom_modify sort 3 2.0")
    order = lmp.numpy.extract_atom("id")[:8] - 1
    lmp.numpy.extract_atom("v")[:8] = atoms.get_velocities()[order] * (1e3 * units.fs)  # Å/ps
    forces = LammpsForces(lmp, small_potential(), ["Cu", "Al"])
    lmp.commands_string(f"timestep {1e-3 * fs}\nfix move all nve")
    return atoms, forces


def test_motion_is_that_of_ase_however_lammps_sorts():
    atoms, forces = in_motion(1.0)
    forces.run("run 20")
    with VelocityVerlet(atoms, 1.0 * units.fs) as dynamics:
        dynamics.run(20)
    assert forces.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert np.allclose(forces.forces, atoms.get_forces(), atol=1e-5)


def test_energy_drifts_as_in_ase():
    """Slopes of the energy over 0.4 ps; it swings by more than ten times what they may differ."""
    atoms, forces = in_motion(4.0)
    totals = []
    with VelocityVerlet(atoms, 4.0 * units.fs) as dynamics:
        for _ in range(20):
            forces.run("run 5")
            dynamics.run(5)
            pair = forces.energy + forces.lmp.get_thermo("ke"), atoms.get_total_energy()
            totals.append(1e3 * np.array(pair) / len(atoms))  # meV
    slopes = np.polyfit(0.02 * np.arange(20), totals, 1)[0]
    assert np.ptp(totals, axis=0).min() > 0.01
    assert abs(slopes[0] - slopes[1]) < 1e-3  # meV/atom/ps


def test_the_benchmark_finds_the_same_drift():
    row = side_by_side(2, "float64", 2, 1)
    drifts, apart, *others = bars([row])
    assert drifts.what == "32 atoms, float64: drift in 0.004 ps, LAMMPS and ASE"
    assert apart.met
    assert 0 < row["ms_callback"] < row["ms_lammps"]
    assert [line.asked for line in others] == ["", "", "<= 2 %"]


def test_barostat_moves_the_box_by_the_potentials_pressure():
    atoms = bulk("Cu", cubic=True, a=3.4)
    lmp = started(atoms, ["Cu"])
    forces = LammpsForces(lmp, small_potential(), ["Cu"])
    before = lmp.get_thermo("vol")
    forces.run("run 0")
    sign = np.sign(lmp.get_thermo("press"))
    lmp.command("fix box all box/relax iso 0.0 vmax 0.002")
    forces.run("minimize 0 1e-6 5 20")
    assert np.sign(lmp.get_thermo("vol") - before) == sign


def test_an_error_within_the_run_ends_it_and_is_raised():
    potential = small_potential()
    lmp = started(alloy(), ["Cu", "Al"])
    forces = LammpsForces(lmp, potential, ["Cu", "Al"])
    forces.run("run 0")
    forces.potential.references.scale.fill_(float("nan"))
    lmp.command("fix move all nve")
    with pytest.raises(NotFiniteError, match="gives NaN or infinite"):
        forces.run("run 100")
    assert lmp.extract_global("ntimestep") < 5
    assert np.isnan(lmp.numpy.extract_atom("f")[:8]).all()


@pytest.mark.parametrize(
    ("elements", "unit", "message"),
    [
        (["Cu", "Al"], "real", "LAMMPS has units real"),
        (["Cu"], "metal", "2 atom types, and 1 elements"),
        (["Cu", "Zn"], "metal", "does not know 'Zn'"),
        (["Cu", "Xx"], "metal", "does not know 'Xx'"),
    ],
)
def test_what_cannot_be_right_is_refused(elements, unit, message):
    lmp = started(alloy(), ["Cu", "Al"], unit=unit)
    with pytest.raises(ValueError, match=message):
        LammpsForces(lmp, small_potential(), elements)


def test_no_box_is_refused():
    lmp = lammps("-screen", "none", "-log", "none")
    lmp.command("units metal")
    with pytest.raises(ValueError, match="no box yet"):
        LammpsForces(lmp, small_potential(), ["Cu"])


def test_several_processes_without_mpi4py_or_another_mpi_are_refused(monkeypatch):
    lmp = started(alloy(), ["Cu", "Al"])
    asked = lmp.extract_setting
    monkeypatch.setattr(
        lmp, "extract_setting", lambda name: 3 if name == "world_size" else asked(name)
    )
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match="3 processes, which speak by mpi4py"):
        LammpsForces(lmp, small_potential(), ["Cu", "Al"])
    world = SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1)))
    monkeypatch.setitem(sys.modules, "mpi4py", world)
    with pytest.raises(ValueError, match="mpi4py sees 1: they use different libraries"):
        LammpsForces(lmp, small_potential(), ["Cu", "Al"])


def many() -> Atoms:
    """Enough for two domains, with atoms of both elements."""
    atoms = alloy().repeat((2, 3, 2))
    atoms.rattle(0.05, seed=1)
    atoms.wrap()
    return atoms


def run_of_many() -> dict[str, np.ndarray]:
    """What a process sees after some steps, in which atoms cross from one domain to the other."""
    atoms = many()
    lmp = started(atoms, ["Cu", "Al"], before="atom_modify sort 3 2.0")
    lmp.commands_string("velocity all create 3000.0 7 loop all\ntimestep 0.002\nfix move all nve")
    forces = LammpsForces(lmp, small_potential(), ["Cu", "Al"])
    domain = set(lmp.numpy.extract_atom("id")[: lmp.extract_setting("nlocal")].tolist())
    forces.run("run 12")
    after = lmp.numpy.extract_atom("id")[: lmp.extract_setting("nlocal")].tolist()
    pe = lmp.get_thermo("pe")
    seen = {"energy": forces.energy, "pe": pe, "forces": forces.forces}
    seen |= {"pressure": pressure_of(lmp), "moved": len(domain.symmetric_difference(after))}
    return {key: np.asarray(value) for key, value in seen.items()}


def broken_in_one(rank: int) -> str:
    """What a process raises where the potential of the second fails."""
    lmp = started(many(), ["Cu", "Al"])
    forces = LammpsForces(lmp, small_potential(), ["Cu", "Al"])
    lmp.command("fix move all nve")
    forces.run("run 0")
    if rank == 1:
        forces.potential.references.scale.fill_(float("nan"))
    try:
        forces.run("run 100")
    except NotFiniteError as error:
        return f"{error} at step {lmp.extract_global('ntimestep')}"
    return "nothing"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    """What each of two processes saw."""
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    if find_spec("mpi4py") is None or not mpiexec.exists():
        pytest.skip("two processes need mpiexec and mpi4py: pip install mpich mpi4py")
    folder = tmp_path_factory.mktemp("two")
    code = f"""
import sys
sys.path = {sys.path!r}  # of this process, where pytest has put what tests share
from importlib.util import module_from_spec, spec_from_file_location
import numpy as np
spec = spec_from_file_location("test_lammps", {__file__!r})
tests = module_from_spec(spec)
spec.loader.exec_module(tests)
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
seen = tests.run_of_many() | {{"error": np.asarray(tests.broken_in_one(rank))}}
np.savez(f"{{sys.argv[1]}}/{{rank}}.npz", **seen)
"""
    command = [mpiexec, "-n", "2", sys.executable, "-W", "ignore", "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


def test_two_processes_find_what_one_does(of_two):
    one = run_of_many()
    assert min(int(seen["moved"]) for seen in of_two) > 0
    for seen in of_two:
        assert seen["energy"] == pytest.approx(float(one["energy"]), abs=1e-6)
        assert seen["pe"] == pytest.approx(float(one["pe"]), abs=1e-6)
        np.testing.assert_allclose(seen["forces"], one["forces"], atol=1e-6)
        np.testing.assert_allclose(seen["pressure"], one["pressure"], rtol=1e-6, atol=1e-2)


def test_an_error_in_one_process_ends_both(of_two):
    for seen in of_two:
        assert "gives NaN or infinite" in str(seen["error"])
        assert int(str(seen["error"]).split()[-1]) < 5
