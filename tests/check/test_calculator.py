import copy
import math
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.check import physical_laws, thread_laws
from atomeq.check.calculator import LAWS, _chosen, check_calculator, known_elements
from atomeq.check.degenerate_structures import DEGENERATE_STRUCTURES
from atomeq.check.laws import (
    Depth,
    Law,
    LawResult,
    Measured,
    NotApplicable,
    Subject,
)
from atomeq.check.physical_laws import energy_drift
from atomeq.potential.checkpoint import untrained_potential

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))


def verdicts(factory, **options) -> dict[str, LawResult]:
    return {result.name: result for result in check_calculator(factory, **options)}


@pytest.fixture(scope="module")
def emt() -> dict[str, LawResult]:
    return verdicts(EMT, elements=["Cu", "Al"])


def argon() -> LennardJones:
    return LennardJones(sigma=3.4, epsilon=0.01, rc=7.3)


def test_our_calculator_keeps_every_law():
    potential = small_potential()
    results = verdicts(lambda: AtomeqCalculator(potential))
    assert {name: r.note for name, r in results.items() if not r.passed} == {}
    assert results["forces are -dE/dx"].figure <= 1e-8
    assert results["rotation"].figure <= 1e-12


def test_our_calculator_keeps_every_law_in_single_precision():
    potential = small_potential()
    results = verdicts(
        lambda: AtomeqCalculator(potential, dtype="float32"),
        single_precision=True,
        only=["forces are -dE/dx", "stress is dE/dε / V", "rotation", "shared by 8 threads"],
    )
    assert {name: (r.figure, r.note) for name, r in results.items() if not r.passed} == {}
    assert results["rotation"].figure > 1e-10  # float32 it was


def test_our_calculator_answers_where_there_is_an_answer():
    potential = small_potential()
    names = [law.name for law in DEGENERATE_STRUCTURES]
    results = verdicts(lambda: AtomeqCalculator(potential), only=names)
    assert len(results) == 26
    notes = {name: law.note for name, law in results.items()}
    refused = {name for name, note in notes.items() if note.startswith("refused: StructureError")}
    answered = {name for name, note in notes.items() if note.startswith("answered")}
    impossible = {
        *("atoms on one place", "no atoms", "NaN position", "infinite position", "NaN cell"),
        *("unknown element", "atom of number 0", "periodic without a cell"),
        *("coplanar lattice vectors",),
    }
    assert refused == impossible
    assert answered == results.keys() - impossible - {"arrays of wrong shape"}


@pytest.mark.slow
def test_our_calculator_computes_in_spawned_processes():
    potential = small_potential()
    law = verdicts(lambda: AtomeqCalculator(potential), only=["spawned workers"])
    assert law["spawned workers"].passed, law


@pytest.mark.slow
@pytest.mark.parametrize("config", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_every_model_keeps_every_law(config):
    potential = untrained_potential(config, scale=30.0)
    names = [law.name for law in LAWS if law.name != "NVE drift"]
    results = verdicts(lambda: AtomeqCalculator(potential), only=names)
    assert {name: (r.figure, r.note) for name, r in results.items() if r.passed is False} == {}
    exempt = {name for name, r in results.items() if r.exempt}
    assert exempt >= potential.model.exempt_laws.keys()


@pytest.mark.slow
@pytest.mark.parametrize("config", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_every_model_conserves_energy(config):
    """From the perfect crystal, with weights that know no repulsion: so in short steps.

    Whose energy steps there, and says so, drifts whatever the time step.
    """
    potential = untrained_potential(config, scale=30.0)
    structure = bulk("Cu", cubic=True).repeat((2, 1, 1))
    options = {"dynamics_structure": structure, "timestep": 0.2, "dynamics_steps": 250}
    subject = Subject(lambda: AtomeqCalculator(potential), ["Cu"], **options)
    law = next(law for law in LAWS if law.name == "NVE drift").judge(subject)
    assert law.passed is not False, law
    assert bool(law.exempt) == ("continuous at symmetry" in potential.model.exempt_laws), law


def test_emt_is_wrong_when_threads_share_it(emt):
    law = emt["shared by 8 threads"]
    assert law.passed is False
    assert law.figure > 0.01  # eV per atom or eV/Å, silently
    assert "energy wrong by up to" in law.note


def test_a_race_does_not_depend_on_luck(monkeypatch):
    """Without the crowd, where collisions are chance, two threads are made to collide."""
    monkeypatch.setattr(thread_laws, "_crowd", lambda *_: None)
    found = {thread_laws.shared_by_threads(Subject(EMT, ["Cu"])) for _ in range(2)}
    assert len(found) == 1
    assert found.pop().figure > 0.01


class Locked(EMT):
    """Right in every thread, by letting in one at a time."""

    lock = threading.RLock()

    def get_property(self, *args, **kwargs):
        with self.lock:
            self.reset()
            return copy.deepcopy(super().get_property(*args, **kwargs))


def test_a_calculator_that_lets_in_one_thread_at_a_time_keeps_the_law(monkeypatch):
    monkeypatch.setattr(thread_laws, "_INTERRUPTIONS", 2)
    measured = thread_laws.shared_by_threads(Subject(Locked, ["Cu"]))
    assert measured.figure == 0
    assert not measured.broken


def test_emt_accepts_nan_with_a_finite_energy(emt):
    law = emt["NaN refused"]
    assert law.passed is False
    assert law.figure >= 1
    energy = float(law.note.split("energy ")[-1].split(" eV")[0])
    assert math.isfinite(energy)


@pytest.mark.parametrize(
    ("name", "passed"),
    [
        ("empty structure refused", False),  # energy 0
        ("pbc without a cell refused", False),  # energy -1e6 eV
        ("pickling", False),  # holds a lambda
        ("unknown element refused", True),
        ("one per thread", True),
        ("deepcopy", True),
        ("rotation", True),
        ("reflection", True),
        ("supercell extensivity", True),
        ("skew-equivalent cell", True),
        ("forces are -dE/dx", True),
        ("stress is dE/dε / V", True),
        ("free_energy published", True),
    ],
)
def test_emt_otherwise(emt, name, passed):
    assert emt[name].passed is passed, emt[name]


def test_lennard_jones_breaks_off_at_its_cutoff():
    results = verdicts(
        argon,
        elements=["Ar"],
        only=["smooth at the cutoff", "unknown element refused", "overlapping atoms"],
    )
    cutoff = results["smooth at the cutoff"]
    assert cutoff.passed is False
    assert float(cutoff.note.split("largest at ")[1].split()[0]) == pytest.approx(7.3, abs=0.05)
    assert results["unknown element refused"].passed is False
    assert results["overlapping atoms"].passed is False  # NaN


class Faulty(Calculator):
    """Lennard-Jones with one fault at a time."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    fault = ""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        assert atoms is not None
        good = LennardJones(sigma=2.3, epsilon=0.4, rc=6.1, smooth=True)
        results = {key: good.get_property(key, atoms) for key in ("energy", "forces")}
        if self.fault == "forces":
            results["forces"] = 1.001 * results["forces"]
        if self.fault == "direction":
            results["energy"] += 1e-6 * float((atoms.positions[:, 0] ** 2).sum())
        if self.fault == "order":
            results["energy"] += 1e-6 * float(atoms.positions[0, 2])
        if self.fault == "swirl":
            turned = np.cross([0, 0, 1], atoms.positions - atoms.positions.mean(axis=0))
            results["forces"] = results["forces"] + 0.05 * turned
        if self.fault == "touches":
            atoms.info["seen"] = True
        self.results = results


def faulty(fault: str):
    return type("Faulty", (Faulty,), {"fault": fault})


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("forces", {"forces are -dE/dx"}),
        ("direction", {"rotation", "translation", "wrapping"}),
        ("order", {"permutation", "translation", "reflection"}),
        ("touches", {"structure left untouched"}),
    ],
)
def test_planted_faults_are_found(fault, broken):
    sound = verdicts(faulty(""), elements=["Cu"], only=broken)
    found = verdicts(faulty(fault), elements=["Cu"], only=broken)
    assert {name for name, r in sound.items() if r.passed} == broken
    assert {name for name, r in found.items() if r.passed is False} == broken


def test_laws_of_stress_are_skipped_without_stress():
    laws = ["stress is dE/dε / V", "free_energy published"]
    results = verdicts(faulty(""), elements=["Cu"], only=laws)
    assert results["stress is dE/dε / V"].passed is None
    assert "skipped" in results["stress is dE/dε / V"].note
    assert results["free_energy published"].passed is False


class Kinked(Calculator):
    """An energy of the volume whose second derivative jumps a little above that of the crystal."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012
    fault = 1.0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        volume = atoms.get_volume() if atoms.pbc.all() else 1.0
        excess = np.log(volume / self.threshold)
        slope = 2000 * max(excess, 0.0) + 3.0
        self.results = {
            "energy": 1000 * max(excess, 0.0) ** 2 + 3.0 * excess,
            "forces": np.zeros((len(atoms), 3)),
            "stress": self.fault * slope / volume * np.array([1, 1, 1, 0, 0, 0]),
        }


@pytest.mark.parametrize(("fault", "passed"), [(1.0, True), (1.0001, False)])
def test_differences_across_a_jump_of_the_second_derivative_are_no_fault(fault, passed):
    volume = Subject(EMT, ["Cu"]).crystal().get_volume()
    kinked = type("Kinked", (Kinked,), {"fault": fault, "threshold": volume * 1.0002})
    law = "stress is dE/dε / V"
    assert verdicts(kinked, elements=["Cu"], only=[law])[law].passed is passed


def test_dynamics_of_a_slow_calculator_are_cut_down_unless_numbers_are_given(monkeypatch):
    for seconds, expected in ((1e-3, (108, 2500)), (0.1, (32, 600)), (5.0, (32, 250))):
        monkeypatch.setattr(physical_laws, "_seconds_of", lambda *_, s=seconds: s)
        atoms, n_steps = physical_laws._affordable(Subject(EMT, ["Cu"]))
        assert (len(atoms), n_steps) == expected
        given = Subject(EMT, ["Cu"], dynamics_structure=bulk("Cu"), dynamics_steps=700)
        atoms, n_steps = physical_laws._affordable(given)
        assert (len(atoms), n_steps) == (1, 700)


def test_energy_drift_of_a_short_run():
    atoms = bulk("Ar", cubic=True).repeat(2)
    subject = Subject(argon, ["Ar"], dynamics_structure=atoms, dynamics_steps=50, temperature=20)
    seen = []
    subject.on_step = lambda step, steps: seen.append((step, steps))
    measured = energy_drift(subject)
    assert measured.figure < 1.0
    assert "32 atoms, 0.1 ps" in measured.note
    assert seen[-1] == (50, 50)


def test_energy_drift_is_found_where_forces_are_not_gradients():
    options = {"dynamics_steps": 100, "dynamics_structure": bulk("Cu", cubic=True).repeat(2)}
    sound = energy_drift(Subject(faulty(""), ["Cu"], **options)).figure
    assert energy_drift(Subject(faulty("swirl"), ["Cu"], **options)).figure > 10 * sound


def test_each_depth_adds_to_the_one_before():
    quick, default, full = (
        {law.name for law in _chosen(None, depth=depth)} for depth in get_args(Depth)
    )
    assert default - quick == {"NVE drift"}
    assert full - default == {"spawned workers", *(law.name for law in DEGENERATE_STRUCTURES)}
    assert full == {law.name for law in LAWS}
    assert len(full) == len(LAWS)
    with pytest.raises(ValueError, match="no law 'beauty'"):
        _chosen(["beauty"], depth="full")


def test_a_stumble_is_no_refusal():
    class Stumbles(EMT):
        def calculate(self, *args, **kwargs):
            raise self.error

    def error_of(kind, text):
        return type("Stumbles", (Stumbles,), {"error": kind(text)})

    for kind, text, passed in (
        (IndexError, "list index out of range", False),
        (np.linalg.LinAlgError, "Singular matrix", False),
        (ValueError, "", False),
        (ValueError, "positions must be finite", True),
        (NotImplementedError, "no potential for Og", True),
    ):
        law = verdicts(error_of(kind, text), elements=["Cu"], only=["NaN position"])
        assert law["NaN position"].passed is passed, (kind, text)


def test_hundred_atoms_of_copper_are_108():
    assert len(Subject(EMT, ["Cu"]).hundred_atoms()) == 108


def test_elements_are_those_the_calculator_states_or_accepts():
    potential = small_potential()
    assert known_elements(lambda: AtomeqCalculator(potential)) == ["Al", "Cu"]
    assert known_elements(EMT)[:2] == ["Cu", "Al"]
    assert "Fe" not in known_elements(EMT)
    # Of all the elements those of ordinary structures, not hydrogen, helium and lithium.
    universal = type("Universal", (EMT,), {"elements": tuple(range(1, 95))})
    assert known_elements(universal)[:3] == ["Cu", "Al", "Si"]
    organic = type("Organic", (EMT,), {"elements": (1, 6, 8)})
    assert known_elements(organic) == ["C", "O", "H"]  # of the first are the crystals


def test_steps_are_short_where_hydrogen_moves():
    for symbol, fs in (("H", 0.5), ("Cu", 2)):
        start = Atoms([symbol, "Cu"], [[0, 0, 0], [0, 0, 2.0]])
        options = {"dynamics_structure": start, "dynamics_picoseconds": 0.002}
        (law,) = check_calculator(EMT, elements=["Cu"], only=["NVE drift"], **options)
        assert f"in steps of {fs} fs" in law.note


def test_what_is_no_calculator_of_anything_is_refused():
    class Refuses(Calculator):
        implemented_properties = ["energy"]  # noqa: RUF012

        def calculate(self, *args, **kwargs):
            raise RuntimeError("not today")

    with pytest.raises(ValueError, match="not today"):
        check_calculator(Refuses)
    with pytest.raises(ValueError, match="'Xx' is not a chemical symbol"):
        check_calculator(EMT, elements=["Xx"])


@pytest.mark.parametrize(
    ("outcome", "passed"),
    [
        (Measured(0.5), True),
        (Measured(1.5), False),
        (Measured(math.nan), False),
        (Measured(0.0, broken=True), False),
        (ZeroDivisionError("oops"), False),
        (NotApplicable("no"), None),
    ],
)
def test_judgement(outcome, passed):
    def measure(subject):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    result = Law("law", measure, "eV", 1.0, 1.0).judge(Subject(EMT, ["Cu"]))
    assert result.passed is passed


def test_structures_hold_every_known_element():
    subject = Subject(EMT, ["Cu", "Al", "Ni"])
    for atoms in (subject.crystal(), subject.cluster()):
        assert set(atoms.symbols) == {"Cu", "Al", "Ni"}
    assert isinstance(subject.crystal(), Atoms)
    assert not subject.cluster().pbc.any()


class OneFrame(Calculator):
    """Energies of pairs, of which distant fragments share one: a fault, or an exemption."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    elements = (29,)
    exempt_laws = {"separated fragments add": "one frame for all"}  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if len(atoms) > 20 and self.fails:
            raise RuntimeError("too large")
        self.results = {"energy": float(len(atoms)) ** 2, "forces": np.zeros((len(atoms), 3))}

    fails = False


class Failing(OneFrame):
    fails = True


def test_a_law_that_the_method_is_exempt_from_is_no_fault():
    names = ["separated fragments add", "supercell extensivity", "permutation"]
    results = verdicts(OneFrame, only=names)
    law = results["separated fragments add"]
    assert law.passed is None
    assert law.note == "exempt: one frame for all"
    assert law.figure > 1
    assert results["supercell extensivity"].passed is False
    assert results["permutation"].passed is True
    crashed = verdicts(Failing, only=names)["separated fragments add"]
    assert crashed.passed is False  # an exemption is from the law, not from computing


def test_an_exemption_covers_the_kin_of_its_law():
    names = {law.name for law in LAWS}
    kin = {law.name: law.along_with for law in LAWS if law.along_with}
    assert set(kin.values()) <= names
    assert kin["NVE drift"] == "continuous at symmetry"
