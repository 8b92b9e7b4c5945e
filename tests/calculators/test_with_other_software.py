"""The calculator in the hands of ASE's dynamics, optimizers and filters, and of matcalc."""

import importlib
import warnings
from types import ModuleType

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.filters import (
    ExpCellFilter,
    Filter,
    FrechetCellFilter,
    StrainFilter,
    UnitCellFilter,
)
from ase.md.andersen import Andersen
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.nptberendsen import NPTBerendsen
from ase.md.nvtberendsen import NVTBerendsen
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.mep.neb import NEB
from ase.optimize import BFGS, FIRE, FIRE2, LBFGS, BFGSLineSearch, LBFGSLineSearch, MDMin
from ase.optimize.sciopt import SciPyFminCG
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator

STEP = 0.5 * units.fs
COPPER_A0, COPPER_B = 3.637, 138.0  # Å, GPa: the card of cu-pbe


@pytest.fixture(scope="module")
def calculator() -> AtomeqCalculator:
    return AtomeqCalculator(small_potential())


def crystal(calculator: AtomeqCalculator) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    atoms.calc = calculator
    return atoms


OPTIMIZERS = [BFGS, FIRE, FIRE2, LBFGS, BFGSLineSearch, LBFGSLineSearch, MDMin, SciPyFminCG]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_lowers_the_energy(calculator, optimizer):
    atoms = crystal(calculator)
    before = atoms.get_potential_energy()
    # Steps so short that a Newton step by a guessed Hessian cannot climb.
    settings = {"maxstep": 0.01} if optimizer in (BFGS, LBFGS) else {}
    with optimizer(atoms, logfile=None, **settings) as run:
        run.run(fmax=1e-3, steps=4)
    assert atoms.get_potential_energy() < before
    np.testing.assert_allclose(atoms.get_forces().sum(axis=0), 0, atol=1e-9)


FILTERS = [
    lambda atoms: Filter(atoms, indices=[0, 1]),
    StrainFilter,
    UnitCellFilter,
    ExpCellFilter,
    FrechetCellFilter,
]


@pytest.mark.filterwarnings("ignore:Use FrechetCellFilter:DeprecationWarning")
@pytest.mark.parametrize("number", range(len(FILTERS)))
def test_every_filter_lowers_the_energy(calculator, number):
    atoms = crystal(calculator)
    before = atoms.get_potential_energy()
    with FIRE(FILTERS[number](atoms), logfile=None) as run:
        run.run(fmax=1e-3, steps=4)
    assert atoms.get_potential_energy() < before


DYNAMICS = {
    "verlet": lambda atoms, rng: VelocityVerlet(atoms, STEP),
    "langevin": lambda atoms, rng: Langevin(
        atoms, STEP, temperature_K=300, friction=0.01, fixcm=False, rng=rng
    ),
    "baoab": lambda atoms, rng: LangevinBAOAB(
        atoms, STEP, temperature_K=300, T_tau=50 * units.fs, rng=rng
    ),
    "andersen": lambda atoms, rng: Andersen(
        atoms, STEP, temperature_K=300, andersen_prob=0.1, fixcm=False, rng=rng
    ),
    "bussi": lambda atoms, rng: Bussi(atoms, STEP, temperature_K=300, taut=50 * units.fs, rng=rng),
    "berendsen": lambda atoms, rng: NVTBerendsen(
        atoms, STEP, temperature_K=300, taut=50 * units.fs
    ),
    "chain": lambda atoms, rng: NoseHooverChainNVT(
        atoms, STEP, temperature_K=300, tdamp=50 * units.fs
    ),
    "mtk": lambda atoms, rng: IsotropicMTKNPT(
        atoms,
        STEP,
        temperature_K=300,
        pressure_au=0.0,
        tdamp=50 * units.fs,
        pdamp=500 * units.fs,
    ),
    "npt-berendsen": lambda atoms, rng: NPTBerendsen(
        atoms, STEP, temperature_K=300, pressure_au=0.0, compressibility_au=1.0
    ),
}


@pytest.mark.parametrize("name", DYNAMICS)
def test_every_dynamics_moves_the_atoms(calculator, name):
    atoms = crystal(calculator)
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    start = atoms.positions.copy()
    DYNAMICS[name](atoms, np.random.default_rng(1)).run(3)
    assert 1e-4 < np.abs(atoms.positions - start).max() < 0.5
    assert 10 < atoms.get_temperature() < 3000
    assert calculator.get_potential_energy(atoms) == atoms.get_potential_energy()


def test_a_shared_calculator_serves_a_band(calculator):
    start = crystal(calculator)
    end = start.copy()
    end.positions[0] += (0.2, -0.1, 0.1)
    images = [start, start.copy(), start.copy(), end]
    band = NEB(images, method="improvedtangent", allow_shared_calculator=True)
    band.interpolate()
    for image in images:
        image.calc = calculator
    forces = band.get_forces()
    assert forces.shape == (2 * len(start), 3)
    energies = [calculator.get_potential_energy(image) for image in images]
    np.testing.assert_allclose(band.energies, energies, atol=1e-10)


@pytest.fixture(scope="module")
def matcalc() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports announce
        try:
            return importlib.import_module("matcalc")
        except ImportError as error:
            pytest.skip(f"matcalc is not installed here ({error}): pip install matcalc==0.7.0")


@pytest.fixture(scope="module")
def copper() -> AtomeqCalculator:
    return AtomeqCalculator("cu-pbe", dtype="float64")


@pytest.mark.filterwarnings("ignore")
def test_matcalc_relaxes_fits_and_strains(matcalc, copper):
    atoms = bulk("Cu", a=3.60)
    relaxed = matcalc.RelaxCalc(copper, fmax=1e-3).calc(atoms)
    assert relaxed["a"] * np.sqrt(2) == pytest.approx(COPPER_A0, abs=0.02)
    settings = {"relax_structure": False, "fmax": 1e-3}
    structure = relaxed["final_structure"]
    eos = matcalc.EOSCalc(copper, max_abs_strain=0.02, n_points=7, **settings).calc(structure)
    assert eos["bulk_modulus_bm"] == pytest.approx(COPPER_B, rel=0.05)
    strains = (-0.01, -0.005, 0.005, 0.01)
    elastic = matcalc.ElasticityCalc(
        copper, units_GPa=True, norm_strains=strains, shear_strains=strains, **settings
    ).calc(structure)
    assert elastic["bulk_modulus_vrh"] == pytest.approx(COPPER_B, rel=0.05)


@pytest.mark.filterwarnings("ignore")
def test_matcalc_computes_phonons_and_moves_atoms(matcalc, copper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atoms = bulk("Cu", a=COPPER_A0)
    phonons = matcalc.PhononCalc(
        copper, relax_structure=False, supercell_matrix=np.diag([2, 2, 2]), write_phonon=False
    ).calc(atoms)
    heat = phonons["thermal_properties"]["heat_capacity"]
    assert 20 < heat[30] < 25
    dynamics = matcalc.MDCalc(
        copper, ensemble="nve", steps=3, relax_structure=False, temperature=300, seed=0
    ).calc(bulk("Cu", a=COPPER_A0, cubic=True))
    assert len(dynamics["final_structure"]) == 4
