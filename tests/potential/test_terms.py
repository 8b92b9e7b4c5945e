"""Additive terms: known values, exact gradients, and their place in a checkpoint."""

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.models.egnn import EGNN
from atomeq.potential.checkpoint import CheckpointError, load_potential, save_potential
from atomeq.potential.dispersion import DispersionD3
from atomeq.potential.potential import Potential
from atomeq.potential.repulsion import ZBL
from atomeq.potential.terms import EnergyTerm

pytest.importorskip("torch_dftd", reason="D3 dispersion is of the extra dispersion")

FORCES = 1e-7  # eV/Å, central differences over 1e-4 Å
STRESS = 1e-8  # eV/Å³
EXACT = 1e-12


def only(term: EnergyTerm, *, cutoff: float = 5.0) -> Potential:
    """A potential whose network says nothing."""
    potential = Potential(EGNN(cutoff=cutoff, num_layers=1, hidden_channels=4), terms=[term])
    for parameter in potential.parameters():
        parameter.data.zero_()
    return potential.double().eval()


def squeezed() -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=3.4, cubic=True)
    atoms.set_cell(atoms.cell.array @ [[1, 0.03, 0], [0, 1.02, 0.05], [0, 0, 0.98]], True)
    atoms.rattle(0.08, seed=0)
    return atoms


def terms() -> list[EnergyTerm]:
    return [ZBL(), DispersionD3("pbe", cutoff=7.0, coordination_cutoff=6.0)]


@pytest.mark.parametrize("term", terms(), ids=["zbl", "d3"])
def test_forces_and_stress_are_exact_derivatives(term):
    atoms = squeezed()
    atoms.calc = AtomeqCalculator(only(term))
    assert abs(atoms.get_potential_energy()) > 0.1
    numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=range(3))
    assert np.abs(numerical).max() > 1e-3
    np.testing.assert_allclose(atoms.get_forces()[:3], numerical, atol=FORCES, rtol=1e-7)
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_stress(), numerical, atol=STRESS, rtol=1e-6)


def test_zbl_of_a_close_pair_is_the_textbook_value():
    r, a = 0.3, 0.4685 / (2 * 29**0.23)
    x = r / a
    phi = (
        0.18175 * np.exp(-3.1998 * x)
        + 0.50986 * np.exp(-0.94229 * x)
        + 0.28022 * np.exp(-0.4029 * x)
        + 0.02817 * np.exp(-0.20162 * x)
    )
    expected = 14.399645 * 29**2 / r * phi
    # So far inside, the switch differs from one by 1e-5.
    pair = Atoms("Cu2", [[0, 0, 0], [0, 0, r]])
    graph = only(ZBL()).build_graph(pair)
    energies = ZBL()(graph)
    assert energies.sum().item() == pytest.approx(expected, rel=1e-3)
    assert energies[0] == energies[1]


def test_zbl_vanishes_smoothly_at_the_sum_of_radii():
    lengths = np.array([2.63, 2.6399, 2.64, 2.65])  # twice 1.32 Å
    calculator = AtomeqCalculator(only(ZBL()))
    pairs = [Atoms("Cu2", [[0, 0, 0], [0, 0, r]]) for r in lengths]
    found = calculator.evaluate(pairs)
    energies = np.array([one["energy"] for one in found])
    forces = np.array([one["forces"][1, 2] for one in found])
    assert energies[0] > 0
    assert np.all(np.diff(energies) <= 0)
    assert energies[2] == energies[3] == forces[2] == forces[3] == 0
    assert forces[1] < 1e-5


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list")  # torch-dftd's own
def test_d3_is_that_of_torch_dftd():
    from torch_dftd.torch_dftd3_calculator import TorchDFTD3Calculator

    atoms = squeezed()
    reference = TorchDFTD3Calculator(
        xc="pbe",
        damping="bj",
        cutoff=7.0,
        cnthr=6.0,
        dtype=torch.float64,
        cutoff_smoothing="poly",
        device="cpu",
    )
    expected = reference.get_potential_energy(atoms)
    calculator = AtomeqCalculator(only(terms()[1]))
    # Their Bohr radii differ in the seventh digit.
    assert calculator.get_potential_energy(atoms) == pytest.approx(expected, rel=1e-5)


def test_batches_of_terms_are_sums_of_single_structures():
    structures = [squeezed(), bulk("NaCl", "rocksalt", a=3.6), Atoms("Cl")]
    potential = Potential(EGNN(cutoff=4.0, num_layers=1, hidden_channels=4).double(), terms=terms())
    calculator = AtomeqCalculator(potential)
    for atoms, results in zip(structures, calculator.evaluate(structures), strict=True):
        energy = calculator.get_potential_energy(atoms)
        assert results["energy"] == pytest.approx(energy, abs=1e-9)
        assert results["energies"].sum() == pytest.approx(energy, abs=1e-9)


def test_a_checkpoint_carries_its_terms(tmp_path):
    bare = small_potential()
    potential = Potential(bare.model, bare.references, terms=[ZBL(1.1), *terms()[1:]])
    save_potential(potential, tmp_path)
    document = yaml.safe_load((tmp_path / "model.yaml").read_text())
    assert document["terms"][0] == {
        "class_path": "atomeq.potential.repulsion.ZBL",
        "init_args": {"radius_scale": 1.1},
    }
    atoms = bulk("Cu", a=3.2)
    energies = [
        AtomeqCalculator(one).get_potential_energy(atoms)
        for one in (potential, load_potential(tmp_path), bare)
    ]
    assert energies[0] == pytest.approx(energies[1], abs=EXACT)
    assert abs(energies[0] - energies[2]) > 0.1
    provenance = AtomeqCalculator(tmp_path).provenance
    assert provenance["terms"] == document["terms"]
    assert (
        AtomeqCalculator(potential).provenance["sha256"]
        != AtomeqCalculator(bare).provenance["sha256"]
    )


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"class_path": "os.system", "init_args": {}}, "term 'os.system' is not registered"),
        ({"class_path": "atomeq.potential.repulsion.ZBL", "init_args": {"x": 1}}, "unexpected"),
    ],
)
def test_foreign_terms_are_refused(tmp_path, node, message):
    save_potential(small_potential(), tmp_path)
    document = yaml.safe_load((tmp_path / "model.yaml").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**document, "terms": [node]}))
    with pytest.raises(CheckpointError, match=message):
        load_potential(tmp_path)


def test_terms_stay_in_float64_when_the_network_is_float32():
    atoms = squeezed()
    energies = [
        AtomeqCalculator(only(ZBL()), dtype=dtype).get_potential_energy(atoms)
        for dtype in ("float32", "float64")
    ]
    assert energies[0] == pytest.approx(energies[1], rel=EXACT)


def test_odd_settings_are_refused():
    with pytest.raises(ValueError, match="radius_scale must be positive"):
        ZBL(0.0)
    with pytest.raises(ValueError, match="no D3"):
        DispersionD3("lda-of-my-own")
    with pytest.raises(ValueError, match="cutoffs must be positive"):
        DispersionD3(cutoff=5.0, coordination_cutoff=9.0)
    model = EGNN(cutoff=4.0, num_layers=1, hidden_channels=4)
    model.outputs = frozenset({"energies", "forces"})
    with pytest.raises(ValueError, match="force head"):
        Potential(model, terms=[ZBL()])
