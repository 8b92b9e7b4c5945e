"""MACE's second derivatives, its soft distances, and what its arguments refuse."""

import pytest
import torch
from ase.build import bulk
from structures import RATTLED

from atomeq.models.mace import MACE
from atomeq.potential.export import _exported, graph_fields
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences


def test_forces_can_be_trained():
    """The second derivative reaches every parameter of a network of two layers."""
    torch.manual_seed(0)
    model = MACE(4.0, irreps="4x0e+4x1o", lmax_edge=2, radial_channels=[8], readout_channels=4)
    potential = Potential(model).double().train()
    graph = potential.build_graph(RATTLED["molecule"]())
    forces = potential(graph, ("forces",), create_graph=True)["forces"]
    forces.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_it_computes_under_autocast():
    torch.manual_seed(0)
    model = MACE(4.0, irreps="4x0e+4x1o", lmax_edge=1, radial_channels=[8], readout_channels=4)
    potential = Potential(model)
    graph = potential.build_graph(RATTLED["molecule"]())
    expected = potential(graph, ("energy",))["energy"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energy = potential(graph, ("energy",))["energy"]
    torch.testing.assert_close(energy, expected, rtol=0.1, atol=0.1)


def test_a_trace_holds_for_every_size():
    """What an export needs: no number of atoms, edges or graphs is bound to the example's."""
    torch.manual_seed(0)
    arguments = {"irreps": "4x0e", "num_layers": 1, "lmax_edge": 1, "radial_channels": [8]}
    model = MACE(4.0, **arguments, readout_channels=4, elements=[8, 12])
    potential = Potential(model, AtomicReferences({8: -1.0, 12: -2.0})).requires_grad_(False)
    traced = _exported(potential.eval()).module()
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.1, seed=1)
    graph = potential.build_graph(atoms)
    energy, _, forces, _ = traced(*(graph[name] for name in graph_fields(model)))
    expected = potential(graph, ("energy", "forces"))
    torch.testing.assert_close(energy.to(expected["energy"]), expected["energy"])
    torch.testing.assert_close(forces.to(expected["forces"]), expected["forces"])


def test_soft_transform_leaves_long_distances_and_shortens_none_below_its_inner_radius():
    from atomeq.models.mace import _transformed

    bond = torch.full((2,), 2.0, dtype=torch.float64)
    r = torch.tensor([0.5, 9.0], dtype=torch.float64)
    d = _transformed(r, bond, "soft")
    assert d[0] == pytest.approx(1.5, abs=1e-3)  # the inner radius, 3/4 of the bond
    assert d[1] == pytest.approx(9.0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"irreps": "8x0e+4x1o"}, "one width"),
        ({"irreps": "8x0e+8x1e"}, "one width"),
        ({"irreps": "8x0e+8x2e"}, "one width"),
        ({"irreps": "8x0e+8x1o+8x2e", "lmax_edge": 1}, "at least 2"),
        ({"avg_num_neighbors": 0.0}, "must be positive"),
        ({"published": {"interactions": ["attention"]}}, "attention"),
    ],
)
def test_what_is_none_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        MACE(**arguments)
