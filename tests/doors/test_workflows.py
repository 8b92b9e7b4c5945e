"""Workflow packages drive a calculator; each test skips where its package is missing."""

import logging
import os
import warnings
from importlib import import_module
from types import ModuleType

import pytest
from ase import Atoms
from ase.build import bulk
from pymatgen.core import Lattice, Structure

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.dynamics.run import relax
from atomeq.graph.to_structures import to_pymatgen

pytestmark = pytest.mark.filterwarnings("ignore")  # what these packages announce of their own
LATTICE, BULK_MODULUS, HEAT = 2.5716, 138.0, (22.0, 24.9)  # Å, GPa, J/K/mol of cu-pbe
ENERGY = -4.10134  # eV/atom, relaxed


def module(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return import_module(name)
        except ImportError as error:
            pytest.skip(f"{error}: pip install --group workflows")


@pytest.fixture(scope="module")
def copper() -> AtomeqCalculator:
    return AtomeqCalculator("cu-pbe", dtype="float64")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("QUACC_RESULTS_DIR", "QUACC_SCRATCH_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def stretched(copper: AtomeqCalculator) -> Atoms:
    atoms = bulk("Cu", a=3.6)
    atoms.calc = copper
    return atoms


def test_janus_relaxes_fits_and_computes_phonons(copper, folder):
    calculations = "janus_core.calculations"
    point = module(f"{calculations}.single_point").SinglePoint(struct=stretched(copper)).run()
    assert point["energy"] == pytest.approx(copper.get_potential_energy(stretched(copper)))
    relaxed = module(f"{calculations}.geom_opt").GeomOpt(struct=stretched(copper), fmax=1e-3)
    relaxed.run()
    assert relaxed.struct.cell.lengths() == pytest.approx(LATTICE, abs=1e-3)
    still = {"struct": relaxed.struct, "minimize": False, "write_results": False}
    equation = module(f"{calculations}.eos").EoS(**still).run()
    assert equation["bulk_modulus"] == pytest.approx(BULK_MODULUS, rel=0.02)
    temperatures = {"temp_min": 300, "temp_max": 300, "temp_step": 10}
    phonons = module(f"{calculations}.phonons").Phonons(
        supercell=(2, 2, 2), mesh=(5, 5, 5), calcs=("thermal",), **temperatures, **still
    )
    phonons.run()
    (heat,) = phonons.results["thermal_properties"]["heat_capacity"]
    assert HEAT[0] < heat < HEAT[1]


def test_quaccs_recipes_take_a_calculator_through_matcalc(copper, folder, monkeypatch):
    monkeypatch.setitem(os.environ, "QUACC_WORKFLOW_ENGINE", "None")
    recipes = module("quacc.recipes.mlip.core")
    phonons = module("quacc.recipes.mlip.phonons")
    logging.disable(logging.WARNING)
    try:
        relaxed = recipes.relax_job(bulk("Cu", a=3.6), "matcalc", name=copper, relax_cell=True)
        given = {"all": {"library": "matcalc", "name": copper}}
        temperatures = {"t_min": 300, "t_max": 300, "t_step": 10}
        found = phonons.phonon_flow(
            relaxed["atoms"], min_lengths=5.0, job_params=given, **temperatures
        )
    finally:
        logging.disable(logging.NOTSET)
    assert relaxed["converged"]
    assert relaxed["results"]["energy"] == pytest.approx(ENERGY, abs=1e-4)
    assert relaxed["parameters"]["potential"] == "cu-pbe"
    (heat,) = found["results"]["thermal_properties"]["heat_capacity"]
    assert HEAT[0] < heat < HEAT[1]


def test_a_job_of_jobflow_hands_structures_to_the_next(folder):
    jobflow = module("jobflow")

    @jobflow.job
    def relaxed(structure: Structure, potential: str) -> dict:
        (outcome,) = relax([structure], potential, cell=True)
        return {"energy": float(outcome.energy), "structure": to_pymatgen(outcome.graph)[0]}

    corners = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    first = relaxed(Structure(Lattice.cubic(3.5), ["Cu"] * 4, corners), "cu-pbe")
    second = relaxed(first.output["structure"], "cu-pbe")
    jobs = jobflow.Flow([first, second])
    outputs = jobflow.run_locally(jobs, log=False, ensure_success=True)
    for each in (first, second):
        assert outputs[each.uuid][1].output["energy"] == pytest.approx(4 * ENERGY, abs=4e-4)
