"""The demo's crystals are what it says, and it says so where the potential cannot be had."""

import os
import subprocess
import sys

import demo_crystals
import pytest
from ase import Atoms

UNTIL_TORCH = """
import importlib.abc, os, sys
class AtTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, AtTorch())
import demo
"""


def test_threads_sleep_as_torch_is_imported():
    """Where it comes before atomeq they spin: beside another program 30 times the CPU time."""
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = free | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNTIL_TORCH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "passive"


def test_crystals_have_their_composition_and_published_numbers():
    found = demo_crystals.crystals()
    assert found.keys() == demo_crystals.LITERATURE.keys()
    rivals = demo_crystals.rivals()
    for name, atoms in {**found, **rivals}.items():
        expected = Atoms(name.partition(",")[0]).symbols.formula.reduce()[0].count()
        assert atoms.symbols.formula.reduce()[0].count() == expected, name


@pytest.mark.parametrize(
    ("name", "expected"), [("MgO", "4.100"), ("TiO2", "4.700, 3.000"), ("LiCoO2", "2.900, 14.30")]
)
def test_lattice_constants_are_those_of_the_conventional_cell(name, expected):
    assert demo_crystals.lattice(name, demo_crystals.crystals()[name]) == expected


def test_without_the_potential_the_demo_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATOMEQ_POTENTIALS", str(tmp_path / "potentials"))
    with demo_crystals.console.capture() as shown:
        assert not demo_crystals.install(tmp_path / "absent.whl")
    assert "copper alone" in shown.get()
    assert "absent.whl" in shown.get().replace("\n", "")
