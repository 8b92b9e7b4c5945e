import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from small_potential import small_potential
from structures import rattled_slab

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.graph.convert import StructureError
from atomeq.models.base import AtomisticModel
from atomeq.potential.checkpoint import save_potential
from atomeq.potential.potential import Potential

EXACT = 1e-12  # same graph, same float64 arithmetic up to the order of sums


@pytest.fixture(scope="module")
def potential() -> Potential:
    return small_potential()


def crystal(seed: int = 1) -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((2, 2, 1))
    atoms.symbols[::5] = "Al"
    atoms.set_cell(
        atoms.cell.array @ np.array([[1, 0.03, 0], [0, 1.01, 0.04], [0.02, 0, 1]]),
        scale_atoms=True,
    )
    atoms.rattle(0.1, seed=seed)
    return atoms


def fresh(atoms: Atoms, potential: Potential) -> tuple[float, np.ndarray]:
    results = potential(potential.build_graph(atoms))
    return results["energy"].item(), results["forces"].numpy()


class CountingPotential(Potential):
    """Notes what it is asked for."""

    def forward(self, graph, properties=("energy", "forces"), *, create_graph=None):
        calls = vars(self).setdefault("calls", [])
        calls.append(frozenset(properties))
        return super().forward(graph, properties, create_graph=create_graph)


def counting(potential: Potential) -> CountingPotential:
    return CountingPotential(copy.deepcopy(potential.model), copy.deepcopy(potential.references))


def test_results_are_those_of_the_potential(potential):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(potential)
    energy, forces = fresh(atoms, potential)
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=EXACT)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert atoms.get_potential_energies().sum() == pytest.approx(energy, abs=EXACT)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=EXACT)


def test_stress_has_the_sign_and_order_of_ase(potential):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(potential)
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    assert np.ptp(numerical) > 1e-4  # six numbers that tell the order
    np.testing.assert_allclose(atoms.get_stress(), numerical, atol=1e-9)


@pytest.mark.parametrize("structure", [Atoms("Cu2", [[0, 0, 0], [0, 0, 2.4]]), rattled_slab()])
def test_stress_needs_a_volume(potential, structure):
    structure.pbc[2] = False
    structure.calc = AtomeqCalculator(potential)
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        structure.get_stress()
    assert np.isfinite(structure.get_forces()).all()


def test_neighbours_that_are_reused_give_exact_results(potential):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(potential)
    random = np.random.default_rng(0)
    for _ in range(12):
        energy, forces = fresh(atoms, potential)
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=EXACT)
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=EXACT)
        atoms.positions += random.normal(scale=0.06, size=atoms.positions.shape)
    (builder,) = atoms.calc._local.builders.values()
    assert 1 <= builder.n_searches < 12


def test_one_instance_serves_eight_threads(potential):
    calculator = AtomeqCalculator(potential)
    structures = [[crystal(seed=10 * k + n) for n in range(4)] for k in range(8)]
    expected = [[fresh(atoms, potential) for atoms in work] for work in structures]
    barrier, wrong = threading.Barrier(8), []

    def work(k: int) -> None:
        for atoms, (energy, forces) in zip(structures[k], expected[k], strict=True):
            atoms.calc = calculator
            barrier.wait(timeout=60)
            found = atoms.get_potential_energy()
            wrong.append(abs(found - energy))
            wrong.append(np.abs(atoms.get_forces() - forces).max())
            assert calculator.atoms == atoms  # of this thread

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 64
    assert max(wrong) <= EXACT


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_compute_the_same(potential, copied):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(potential)
    energy = atoms.get_potential_energy()
    twin = copied(atoms.calc)
    assert twin.results["energy"] == energy
    other = crystal(seed=2)
    other.calc = twin
    np.testing.assert_allclose(other.get_forces(), fresh(other, potential)[1], atol=EXACT)
    assert twin.potential is not atoms.calc.potential


def test_atoms_with_a_calculator_pickle(potential):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(potential)
    assert pickle.loads(pickle.dumps(atoms)).get_potential_energy() == atoms.get_potential_energy()


def test_training_the_potential_further_does_not_change_the_calculator():
    potential = small_potential()
    trained = [p.requires_grad for p in potential.parameters()]
    atoms = crystal()
    atoms.calc = AtomeqCalculator(potential)
    assert any(trained)
    assert [p.requires_grad for p in potential.parameters()] == trained
    before = atoms.get_potential_energy()
    for parameter in potential.parameters():
        parameter.data += 0.1
    atoms.calc.reset()
    assert atoms.get_potential_energy() == before


def test_only_what_is_asked_is_computed(potential):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(counting(potential))
    calls = vars(atoms.calc.potential).setdefault("calls", [])
    atoms.get_potential_energy()
    assert calls == [{"energy", "energies"}]
    atoms.get_potential_energy()
    assert len(calls) == 1
    atoms.get_forces()
    assert calls[1:] == [{"energy", "energies", "forces"}]
    atoms.get_potential_energy()
    atoms.get_potential_energies()
    assert len(calls) == 2
    atoms.set_initial_magnetic_moments(np.ones(len(atoms)))  # nothing a potential sees
    atoms.get_forces()
    assert len(calls) == 2


def test_cell_relaxation_takes_one_pass_per_step(potential):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(counting(potential))
    optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
    optimizer.run(fmax=0.0, steps=8)
    calls = vars(atoms.calc.potential)["calls"]
    assert len(calls) <= 11  # 9 structures, and the first asked for its properties one by one


def test_structure_is_left_untouched(potential):
    atoms = crystal()
    atoms.info["energy"] = "not a number"  # a label of the user, of no concern here
    before = atoms.copy()
    atoms.calc = AtomeqCalculator(potential)
    atoms.get_stress()
    assert atoms.info == before.info
    assert atoms.arrays.keys() == before.arrays.keys()
    assert atoms == before


@pytest.mark.parametrize("dtype", ["float32", "float64", torch.float32])
def test_dtype_reaches_the_network(potential, dtype):
    calculator = AtomeqCalculator(potential, dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert calculator.dtype == expected
    atoms = crystal()
    atoms.calc = calculator
    assert atoms.get_forces().dtype == np.float64  # what ASE's integrators expect
    error = np.abs(atoms.get_forces() - fresh(atoms, potential)[1]).max()
    assert error < (1e-4 if expected == torch.float32 else EXACT)
    assert (error > EXACT) == (expected == torch.float32)


def test_dtype_is_the_potentials_own_by_default(tmp_path):
    save_potential(small_potential(torch.float32), tmp_path)
    assert AtomeqCalculator(tmp_path).dtype == torch.float32
    assert AtomeqCalculator(str(tmp_path), dtype="float64").dtype == torch.float64
    assert AtomeqCalculator(small_potential()).dtype == torch.float64


def test_provenance_names_the_weights(tmp_path):
    potential = small_potential()
    save_potential(potential, tmp_path)
    saved = AtomeqCalculator(tmp_path).provenance
    assert saved["folder"] == str(tmp_path.resolve())
    assert len(saved["sha256"]) == 64
    unsaved = AtomeqCalculator(potential).provenance
    assert unsaved["name"] is None
    potential.model.requires_grad_(False)
    next(potential.parameters()).data += 1e-6
    assert AtomeqCalculator(potential).provenance["sha256"] != unsaved["sha256"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_cuda_is_refused(potential):
    with pytest.raises(ValueError, match="CUDA"):
        AtomeqCalculator(potential, device="cuda")


@pytest.mark.gpu
def test_cuda_computes_the_same(potential):
    atoms = crystal()
    atoms.calc = AtomeqCalculator(potential, device="cuda")
    np.testing.assert_allclose(atoms.get_forces(), fresh(atoms, potential)[1], atol=1e-9)


def test_odd_dtypes_are_refused(potential):
    with pytest.raises(ValueError, match="'float32' or 'float64', not 'float16'"):
        AtomeqCalculator(potential, dtype="float16")


def _broken(name: str) -> Atoms:
    atoms = crystal()
    if name == "NaN":
        atoms.positions[3, 1] = np.nan
    elif name == "infinity":
        atoms.positions[3, 1] = np.inf
    elif name == "cell":
        atoms.cell.array[1, 1] = np.nan
    elif name == "element":
        atoms.symbols[4] = "Og"
    elif name == "empty":
        return Atoms()
    elif name == "overlap":
        atoms.positions[5] = atoms.positions[6]
    elif name == "flat":
        atoms.set_cell(np.zeros((3, 3)))
    return atoms


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NaN", r"atom 3 .*nan"),
        ("infinity", r"atom 3 .*inf"),
        ("cell", "cell"),
        ("element", r"atom 4 is Og"),
        ("empty", "no atoms"),
        ("overlap", r"0 Å apart"),
        ("flat", "pbc"),
    ],
)
@pytest.mark.parametrize("after_a_good_one", [False, True])
def test_bad_structures_are_refused_by_name(potential, name, message, after_a_good_one):
    calculator = AtomeqCalculator(potential)
    if after_a_good_one:
        calculator.get_property("forces", crystal())
    with pytest.raises(StructureError, match=message):
        calculator.get_property("energy", _broken(name))
    atoms = crystal()
    assert calculator.get_property("energy", atoms) == pytest.approx(
        fresh(atoms, potential)[0], abs=EXACT
    )


def test_a_single_atom_has_its_reference_energy(potential):
    atoms = Atoms("Cu", calculator=AtomeqCalculator(potential))
    assert np.isfinite(atoms.get_potential_energy())
    assert not atoms.get_forces().any()


class ForceHead(AtomisticModel):
    """Predicts forces themselves: towards the origin."""

    outputs = frozenset({"energies", "forces"})

    def __init__(self, cutoff: float = 4.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.stiffness = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, graph):
        return {"energies": self.stiffness * graph.pos[:, 0], "forces": -self.stiffness * graph.pos}


def test_models_with_a_force_head_have_no_stress():
    atoms = crystal()
    atoms.calc = AtomeqCalculator(Potential(ForceHead()))
    np.testing.assert_allclose(atoms.get_forces(), -atoms.positions)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
