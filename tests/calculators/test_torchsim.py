"""The adapter for torch-sim, by its own validation where that is installed."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.torchsim import _graph, torchsim_model
from atomeq.models.egnn import EGNN
from atomeq.potential.potential import Potential

EXACT = 1e-10


def structures() -> list[Atoms]:
    crystal = bulk("Cu", a=3.6)
    shear = np.array([[0, 0.1, 0], [0, 0, 0.2], [0, 0, 0]])
    crystal.set_cell(crystal.cell.array + shear, scale_atoms=True)
    crystal = crystal.repeat((2, 1, 1))
    crystal.rattle(0.05, seed=0)
    return [crystal, bulk("Cu", cubic=True)]


def state_of(many: list[Atoms], pbc: object) -> SimpleNamespace:
    """The fields of a torch_sim.SimState."""
    counts = torch.tensor([len(atoms) for atoms in many])
    return SimpleNamespace(
        positions=torch.tensor(np.concatenate([atoms.positions for atoms in many])),
        cell=torch.tensor(np.stack([atoms.cell.array.T for atoms in many])),
        pbc=pbc,
        atomic_numbers=torch.tensor(np.concatenate([atoms.numbers for atoms in many])),
        system_idx=torch.arange(len(many)).repeat_interleave(counts),
    )


@pytest.mark.parametrize("pbc", [True, torch.tensor([True, True, True]), torch.ones(2, 3) > 0])
def test_states_become_graphs_with_rows_as_lattice_vectors(pbc):
    many = structures()
    graph = _graph(state_of(many, pbc))
    assert graph.natoms.tolist() == [2, 4]
    assert bool(graph.pbc.all())
    for k, atoms in enumerate(many):
        np.testing.assert_allclose(graph.cell[k].numpy(), atoms.cell.array)
    fields = vars(state_of(many, pbc))
    assert torch.equal(_graph(fields).pos, graph.pos)


def test_without_torch_sim_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch_sim")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    from atomeq.calculators import torchsim

    torchsim._model_class.cache_clear()
    with pytest.raises(ImportError, match=r"atomeq\[torchsim\]"):
        torchsim_model(small_potential())


@pytest.fixture(scope="module")
def interface():
    try:
        return importlib.import_module("torch_sim.models.interface")
    except (ImportError, SyntaxError) as error:
        pytest.skip(f"torch-sim is not installed here ({error}): pip install torch-sim-atomistic")


@pytest.mark.filterwarnings("ignore")
def test_torch_sims_own_validation_passes(interface):
    model = torchsim_model(Potential(EGNN(cutoff=4.0, num_layers=1, hidden_channels=4).double()))
    interface.validate_model_outputs(model, torch.device("cpu"), torch.float64)


@pytest.mark.filterwarnings("ignore")
def test_the_model_gives_what_the_calculator_gives(interface):
    many = structures()
    found = torchsim_model(small_potential())(state_of(many, True))
    expected = AtomeqCalculator(small_potential()).evaluate(many, ("energy", "forces", "stress"))
    energies = [one["energy"] for one in expected]
    np.testing.assert_allclose(found["energy"].numpy(), energies, atol=EXACT)
    forces = np.concatenate([one["forces"] for one in expected])
    np.testing.assert_allclose(found["forces"].numpy(), forces, atol=EXACT)
    xx = [one["stress"][0] for one in expected]
    np.testing.assert_allclose(found["stress"][:, 0, 0].numpy(), xx, atol=EXACT)
    molecule = state_of([Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]])], False)
    alone = torchsim_model(small_potential())(molecule)
    assert not bool(alone["stress"].any())
    assert alone["forces"].abs().max() > 0
