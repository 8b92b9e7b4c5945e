"""Radial networks read off tables give the numbers of single precision, of the latest weights."""

import copy
import pickle

import pytest
import torch
from ase.build import bulk

from atomeq.models.nequip import NequIP
from atomeq.nn.radial_tables import RadialTables

SINGLE = 1e-5  # of float32 networks, relative to the largest
TABLED = 2e-7  # of forces from tables in float64, likewise


def model_of(**arguments) -> NequIP:
    torch.manual_seed(1)
    model = NequIP(irreps=["6x0e", "6x0e+4x1o+2x2e", "6x0e"], elements=[29], **arguments)
    for weight in model.readout.parameters():
        torch.nn.init.normal_(weight)
    return model.requires_grad_(False)


def energy_and_forces(model: NequIP) -> tuple[torch.Tensor, torch.Tensor]:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    graph = model.graph_builder()([atoms])
    positions = graph.pos.requires_grad_()
    energy = model(graph.replace(pos=positions))["energies"].double().sum()
    return energy.detach(), torch.autograd.grad(energy, positions)[0]


def used(model: NequIP) -> bool:
    return bool(model._tables._made[1])


@pytest.mark.parametrize("onset", [None, 4.5])
def test_tables_are_good_to_single_precision(onset, monkeypatch):
    model = model_of(sevennet=None if onset is None else {"envelope_onset": onset})
    energy, forces = energy_and_forces(model)
    exact_energy, exact = energy_and_forces(copy.deepcopy(model).double())
    assert used(model)
    assert abs(energy / exact_energy - 1) < SINGLE
    assert (forces - exact).abs().max() < SINGLE * exact.abs().max()
    monkeypatch.setattr(RadialTables, "serve", lambda *_: True)
    _, tabled = energy_and_forces(copy.deepcopy(model).double())
    assert (tabled - exact).abs().max() < TABLED * exact.abs().max()


def test_weights_that_change_make_other_tables():
    model = model_of()
    before, _ = energy_and_forces(model)
    with torch.no_grad():
        model.layers[0].radial.weights[0].mul_(1.5)
    after, _ = energy_and_forces(model)
    expected, _ = energy_and_forces(copy.deepcopy(model).double())
    assert abs(after / before - 1) > 1e-3
    assert abs(after / expected - 1) < SINGLE
    model.load_state_dict(model_of().state_dict())
    assert energy_and_forces(model)[0] == before


def test_what_is_trained_or_double_is_exact():
    for model in (model_of().requires_grad_(), model_of().double()):
        energy_and_forces(model)
        assert not used(model)


def test_copies_leave_the_tables_behind():
    model = model_of()
    energy, _ = energy_and_forces(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert used(model)
        assert not used(twin)
        assert energy_and_forces(twin)[0] == energy
    assert not any("_tables" in name for name in model.state_dict())


def test_a_jump_of_the_curvature_lies_between_intervals():
    for cutoff, onset in ((5.0, 4.5), (6.0, 5.1), (4.7, 4.0)):
        n = RadialTables(cutoff, onset).n_intervals
        place = onset / cutoff * n
        assert abs(place - round(place)) < 0.01
