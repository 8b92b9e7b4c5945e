"""Fixtures that every folder of tests shares: seeds, small structures and the public data sets."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.constraints import FixAtoms
from structures import rattled_molecule

# Triton decides as it is imported whether its kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords have the names of folders too
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two test processes share two cores; torch would start one thread per core in each."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Weights are the same whichever tests ran before; the global state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def copper() -> Atoms:
    """A rattled, sheared fcc cell of 32 atoms: no symmetry left that could hide a fault."""
    atoms = bulk("Cu", "fcc", a=3.615, cubic=True).repeat(2)
    strain = np.array([[0.01, 0.02, 0.0], [0.0, -0.01, 0.005], [0.0, 0.0, 0.015]])
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    atoms.rattle(stdev=0.05, seed=0)
    return atoms


@pytest.fixture
def slab() -> Atoms:
    """CO on Pt(111), periodic in the plane only, with OC20's tags and a fixed lowest layer."""
    atoms = fcc111("Pt", size=(2, 2, 3), vacuum=8.0)
    layers = atoms.get_tags()  # ASE counts from the top: 1 is the surface
    carbon_monoxide = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.15]])
    add_adsorbate(atoms, carbon_monoxide, height=1.85, position="ontop")
    tags = np.concatenate([(layers == 1).astype(int), [2, 2]])
    atoms.set_tags(tags)
    atoms.set_constraint(FixAtoms(mask=np.concatenate([layers == 3, [False, False]])))
    atoms.rattle(stdev=0.02, seed=0)
    return atoms


@pytest.fixture
def molecules() -> list[Atoms]:
    """Molecules of different sizes, shapes and elements; H2 is linear, NH3 and CH4 symmetric."""
    names = ("H2O", "NH3", "CH4", "C6H6", "H2", "CH3OH")
    return [rattled_molecule(), *(molecule(name) for name in names)]


@pytest.fixture
def structures(copper: Atoms, slab: Atoms, molecules: list[Atoms]) -> list[Atoms]:
    """A mixed batch: periodic in three, two and no directions."""
    return [copper, slab, *molecules]


def _public_folder(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to the folder of public data (docs/tests.md)")
    return Path(folder)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public training sets."""
    return _public_folder("ATOMEQ_DATA")


@pytest.fixture(scope="session")
def formats_folder() -> Path:
    """The folder of samples of the OC20 file formats."""
    return _public_folder("ATOMEQ_FORMATS")
