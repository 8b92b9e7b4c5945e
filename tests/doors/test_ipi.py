"""i-PI moves atoms by ``atomeq serve``; skipped where it is not installed."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.potential.checkpoint import save_potential

if find_spec("ipi") is None:
    pytest.skip("i-PI is not installed: pip install atomeq[ipi]", allow_module_level=True)

STEPS = 6
PATIENCE = 300  # s, of a machine that does other things
FILE = """<simulation verbosity='low'>
  <output prefix='out'>
    <properties filename='energy' stride='1' flush='1'>
      [step, potential{{electronvolt}}, pressure_md{{megapascal}}]
    </properties>
    <trajectory filename='pos' stride='1' flush='1' cell_units='angstrom' format='xyz'>
      positions{{angstrom}}
    </trajectory>
  </output>
  <total_steps>{steps}</total_steps>
  <ffsocket mode='unix' name='served'><address>{address}</address></ffsocket>
  <system>
    <initialize nbeads='1'>
      <file mode='ase' units='angstrom'>start.extxyz</file>
    </initialize>
    <forces><force forcefield='served'/></forces>
    <motion mode='dynamics'>
      <dynamics mode='nve'><timestep units='femtosecond'>1.0</timestep></dynamics>
    </motion>
  </system>
</simulation>
"""


def test_motion_is_that_of_ase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=0)
    ase.io.write("start.extxyz", atoms)
    save_potential(small_potential(), "small")
    address = f"atomeq-ipi-{os.getpid()}"
    Path("input.xml").write_text(FILE.format(steps=STEPS, address=address))
    script = Path(sys.executable).parent / "i-pi"
    with Path("log").open("w") as log:
        server = subprocess.Popen([sys.executable, script, "input.xml"], stdout=log, stderr=log)
    try:
        start = time.monotonic()
        while not Path(f"/tmp/ipi_{address}").exists():
            assert server.poll() is None, tail()
            assert time.monotonic() - start < PATIENCE, tail()
            time.sleep(0.1)
        main(["serve", "start.extxyz", "--potential", "small", "--unix", address])
        assert server.wait(timeout=PATIENCE) == 0, tail()
    finally:
        server.kill()
    atoms.calc = AtomeqCalculator(small_potential())
    energies = [atoms.get_potential_energy()]
    with VelocityVerlet(atoms, units.fs) as dynamics:
        for _ in range(STEPS):
            dynamics.run(1)
            energies.append(atoms.get_potential_energy())
    found = np.loadtxt("out.energy")
    np.testing.assert_allclose(found[:, 1], energies, atol=1e-6)
    moved = ase.io.read("out.pos_0.xyz", index="-1")
    np.testing.assert_allclose(moved.positions, atoms.positions, atol=1e-5)
    assert abs(energies[-1] - energies[0]) > 1e-5
    stress = atoms.get_stress(voigt=False)
    kinetic = -np.trace(atoms.get_kinetic_stress(voigt=False)) / 3
    pressure = (kinetic - np.trace(stress) / 3) / (1e6 * units.Pascal)
    assert found[-1, 2] == pytest.approx(pressure, rel=1e-3)


def tail() -> str:
    return Path("log").read_text()[-2000:]
