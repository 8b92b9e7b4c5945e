"""``atomeq serve`` as the other end of ASE's SocketIOCalculator."""

import os
import threading

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.socketio import SocketIOCalculator
from ase.optimize import FIRE
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator

RECEIVED = 1e-9  # Bohr and Hartree there and back


@pytest.mark.parametrize("periodic", [True, False])
def test_another_code_gets_what_the_calculator_gives(run, workdir, capsys, periodic):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    if not periodic:
        atoms.pbc = False
        atoms.cell = None
    ase.io.write("served.extxyz", atoms)
    name = f"atomeq-{os.getpid()}-{periodic}"
    codes: list[int] = []

    def client() -> None:
        codes.append(run(f"serve served.extxyz --potential small --unix {name} --timeout 60"))

    reference = AtomeqCalculator(small_potential())
    with SocketIOCalculator(unixsocket=name, timeout=60) as server:
        thread = threading.Thread(target=client, daemon=True)
        thread.start()
        atoms.calc = server
        for _ in range(2):
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            copied = atoms.copy()
            assert energy == pytest.approx(reference.get_potential_energy(copied), abs=RECEIVED)
            np.testing.assert_allclose(forces, reference.get_forces(copied), atol=RECEIVED)
            if periodic:
                expected = reference.get_stress(copied)
                np.testing.assert_allclose(atoms.get_stress(), expected, atol=RECEIVED)
            with FIRE(atoms, logfile=None) as optimizer:
                optimizer.run(fmax=1e-3, steps=1)
    thread.join(timeout=60)
    assert codes == [0]
    assert "served" in capsys.readouterr().out


def test_nobody_listening_is_said(run, workdir, capsys):
    assert run("serve cu.extxyz --potential small --unix atomeq-nobody") == 2
    assert "start the other code first" in capsys.readouterr().err
