"""What NequIP is made of, and what it refuses."""

import pytest
import torch
from ase.build import bulk

from atomeq.models.nequip import NequIP
from atomeq.nn.convolution import convolution_paths
from atomeq.nn.irreps import Irrep, parse_irreps
from atomeq.nn.radial import XPLOREnvelope

SMALL = ["4x0e", "4x0e+3x1o+2x2e", "4x0e"]


def graph_of(model):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    return model.graph_builder()([atoms])


@pytest.mark.parametrize("bad", ["4x0", "0x0e", "4x0e+2x0e", "x1o", "4 x1u", ""])
def test_irreps_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="irreps"):
        parse_irreps(bad)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"irreps": ["4x1o", "4x0e"]}, "0e alone"),
        ({"irreps": ["4x0e", "4x0o"]}, "0e for the energy"),
        ({"irreps": ["4x0e"]}, "each layer"),
        ({"self_connection": "none"}, "self_connection"),
        ({"avg_num_neighbors": 0.0}, "avg_num_neighbors"),
        ({"sevennet": {"envelope_onset": 6.0}}, "onset"),
    ],
)
def test_arguments_that_make_no_network_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        NequIP(**{"irreps": SMALL} | arguments)


def test_a_config_builds_the_same_network():
    torch.manual_seed(0)
    model = NequIP(irreps=SMALL, elements=[29, 13], self_connection=["linear", "species"])
    again = NequIP(**model.config()["init_args"])
    again.load_state_dict(model.state_dict())
    graph = graph_of(model)
    energies = model(graph)["energies"]
    torch.testing.assert_close(again(graph)["energies"], energies, rtol=0, atol=0)


def test_paths_with_parity_keep_what_a_mirror_keeps():
    inputs = {Irrep(1, -1): 1}
    wanted = {Irrep(l, p): 1 for l in range(3) for p in (-1, 1)}
    found = convolution_paths(inputs, wanted, 1, True)[Irrep(1, -1)]
    assert [(path.l2, irrep) for path, irrep in found] == [
        (0, Irrep(1, -1)),
        (1, Irrep(0, 1)),
        (1, Irrep(1, 1)),
        (1, Irrep(2, 1)),
    ]


def test_an_untrained_readout_adds_nothing():
    model = NequIP(irreps=SMALL)
    assert model(graph_of(model))["energies"].abs().max() == 0.0


def test_xplor_is_one_then_falls_to_zero_with_a_continuous_slope():
    envelope = XPLOREnvelope(5.0, onset=4.5)
    r = torch.tensor([1.0, 4.5 - 1e-9, 4.5 + 1e-9, 5.0 - 1e-9, 5.0, 9.0], dtype=torch.float64)
    r.requires_grad_()
    u = envelope(r)
    (slope,) = torch.autograd.grad(u.sum(), r)
    torch.testing.assert_close(u, torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))
    assert slope.abs().max() < 1e-6
