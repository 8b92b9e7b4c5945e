"""EquiformerV2: its options make models, train, and refuse what does not go together."""

import pytest
import torch
from structures import rattled_crystal, rattled_molecule

from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.nn.attention import smooth_softmax
from atomeq.potential.potential import Potential

SMALL = {
    "cutoff": 4.0, "lmax": 2, "mmax": 1, "num_layers": 1, "sphere_channels": 4,
    "attn_hidden_channels": 4, "num_heads": 2, "attn_alpha_channels": 4, "attn_value_channels": 2,
    "ffn_hidden_channels": 4, "edge_channels": 4,
}  # fmt: skip
PUBLISHED = {
    "activation": "separable_s2", "feed_forward": "separable_grid_mlp", "norm": "layer_norm_sh",
    "radial_basis": "gaussian", "num_radial": 50, "chiral": True, "envelope": False,
    "max_neighbors": 8, "direct_forces": True, "alpha_drop": 0.1, "drop_path": 0.3,
    "proj_drop": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=["default", "published"])
def test_every_trained_parameter_learns(options):
    torch.manual_seed(4)
    potential = Potential(EquiformerV2(**SMALL, **options)).train()
    result = potential(potential.build_graph([rattled_crystal(), rattled_molecule()]))
    (result["energy"].square().sum() + result["forces"].square().sum()).backward()
    idle = [n for n, p in potential.named_parameters() if p.requires_grad and p.grad is None]
    # the energy is read from scalars, which the separable head makes apart from the grid
    assert all("energy." in name for name in idle) if options else not idle


def test_dropout_is_of_training_alone():
    model = EquiformerV2(**SMALL, **PUBLISHED)
    graph = Potential(model).build_graph(rattled_molecule())
    assert not torch.equal(model(graph)["energies"], model(graph)["energies"])
    model.eval()
    assert torch.equal(model(graph)["energies"], model(graph)["energies"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mmax": 3}, "mmax=3"),
        ({"norm": "batch_norm"}, "batch_norm"),
        ({"activation": "relu"}, "relu"),
        ({"feed_forward": "relu"}, "relu"),
        ({"radial_basis": "fourier"}, "fourier"),
        ({"element_pairs": "some"}, "some"),
        ({"activation": "s2", "grid_resolution": 5}, "grid of 5 x 5"),
    ],
)
def test_unknown_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        EquiformerV2(**{**SMALL, **options})


def test_smooth_softmax_forgets_an_edge_as_its_envelope_vanishes():
    logits = torch.tensor([[0.3], [200.0], [-1.0]])
    index = torch.tensor([0, 0, 1])
    weights = smooth_softmax(logits, torch.tensor([1.0, 1e-3, 1e-6]), index, 3)
    assert torch.isfinite(weights).all()
    assert float(weights[2, 0]) == pytest.approx(1e-6 * torch.tensor(-1.0).exp().item(), rel=1e-4)
    gone = smooth_softmax(logits[[0, 2]], torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 1)
    alone = smooth_softmax(logits[[0]], torch.tensor([1.0]), torch.tensor([0]), 1)
    assert float(gone[0, 0]) == float(alone[0, 0])


@pytest.mark.parametrize("envelope", [0.0, -2e-6])
def test_an_edge_at_the_cutoff_takes_no_weight_however_large_its_logit(envelope: float):
    """Trained logits reach hundreds, and rounding leaves envelopes below 0."""
    logits = torch.tensor([[200.0], [0.0], [-1.0]], requires_grad=True)
    index = torch.tensor([0, 0, 0])
    weights = smooth_softmax(logits, torch.tensor([envelope, 1.0, 1.0]), index, 1)
    alone = smooth_softmax(logits[1:], torch.ones(2), index[1:], 1)
    torch.testing.assert_close(weights, torch.cat([torch.zeros(1, 1), alone]))
    (gradient,) = torch.autograd.grad(weights[1].sum(), logits)
    assert torch.isfinite(gradient).all()
