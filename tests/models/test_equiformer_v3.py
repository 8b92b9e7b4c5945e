"""EquiformerV3: its sizes as published, what it mends, and its options by their definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from along_axis import check_forces_beside_y, computed
from ase import Atoms
from ase.build import bulk
from structures import rattled_crystal, rattled_molecule

from atomeq.models.equiformer_v3 import EquiformerV3, FactoredFeedForward
from atomeq.nn.attention import relative_softmax
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.potential.checkpoint import build_model, scatter_weights
from atomeq.potential.official_names import build_official
from atomeq.potential.potential import Potential

PUBLISHED_CONFIGS = Path(__file__).parents[2] / "configs" / "model" / "published"
SMALL = {
    "cutoff": 4.0, "lmax": 2, "mmax": 1, "num_layers": 1, "sphere_channels": 4,
    "attn_hidden_channels": 4, "num_heads": 2, "attn_alpha_channels": 4, "attn_value_channels": 2,
    "ffn_hidden_channels": 4, "edge_channels": 4,
}  # fmt: skip
PUBLISHED = {
    "radial_basis": "gaussian", "num_radial": 16, "grid_mlp": True, "attn_epsilon": 1e-8,
    "chiral": True, "max_neighbors": 300,
}  # fmt: skip
DIRECT = {"direct_forces": True, "direct_stress": True}
MATERIALS = {  # what the published runs on crystals have in common
    "max_radius": 6.0, "max_neighbors": 300, "num_layers": 7, "num_channels": 128,
    "attn_hidden_channels": 32, "attn_alpha_channels": 64, "ffn_hidden_channels": 512, "lmax": 4,
    "regress_stress": True, "avg_num_nodes": 1, "direct_prediction": False,
}  # fmt: skip
DIRECT_RUN = {**MATERIALS, "direct_prediction": True}
OC20 = {
    "max_neighbors": 20, "max_radius": 12.0, "num_layers": 8, "attn_hidden_channels": 64, "lmax": 6,
    "num_radial_basis": 128, "regress_stress": False, "avg_num_nodes": 77.81317,
}  # fmt: skip
EXACT = 1e-12  # rounding of float64


def potential_of(**options) -> Potential:
    torch.manual_seed(3)
    potential = Potential(EquiformerV3(**{**SMALL, **options})).double().eval()
    scatter_weights(potential)
    return potential


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({**MATERIALS, "num_radial_basis": 10}, 30_278_113),
        ({**MATERIALS, "num_radial_basis": 64}, 30_333_409),
        ({**MATERIALS, "num_radial_basis": 64, "lmax": 6}, 48_841_313),
        ({**DIRECT_RUN, **OC20}, 91_390_274),
        ({}, 109_796_866),
    ],
    ids=["MPtrj", "OAM", "OMat24 L = 6", "OC20", "defaults"],
)
def test_published_sizes(options, published):
    with torch.device("meta"):
        model = build_official("equiformer_v3", options)
    assert sum(p.numel() for p in model.parameters()) == published


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({**DIRECT_RUN, "num_radial_basis": 10}, 34_859_044),
        ({**DIRECT_RUN, "num_radial_basis": 64}, 34_928_164),
        ({**DIRECT_RUN, "num_radial_basis": 64, "lmax": 6}, 57_077_924),
    ],
    ids=["MPtrj", "OMat24", "OMat24 L = 6"],
)
def test_published_sizes_less_what_denoises(options, published):
    """A second force head and an embedding of forces, which structures without noise never feel."""
    with torch.device("meta"):
        model = build_official("equiformer_v3_dens", options)
    head = sum(p.numel() for p in model.forces.parameters())
    embedding = (model.lmax + 1) * model.sphere_channels + model.sphere_channels
    assert sum(p.numel() for p in model.parameters()) + head + embedding == published


@pytest.mark.parametrize(
    ("name", "size"), [("equiformer_v3_30m", 30_333_409), ("esen_30m", 30_161_153)]
)
def test_configurations_of_published_models_have_their_size(name, size):
    node = yaml.safe_load((PUBLISHED_CONFIGS / f"{name}.yaml").read_text())
    assert sum(p.numel() for p in build_model(node).parameters()) == size


@pytest.mark.parametrize("angle", [0.0, 0.08], ids=lambda angle: f"{angle} degrees")
@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=["default", "published"])
def test_forces_are_right_for_an_edge_along_y(options, angle):
    """The reference cuts the gradient within 0.081 degrees of the axis."""
    check_forces_beside_y(potential_of(**options), angle)


def test_only_the_published_form_tells_mirror_images_apart():
    atoms = Atoms("OOHH", [[0, 0.73, 0], [0, -0.73, 0], [0.8, 0.9, 0.5], [-0.8, -0.9, 0.5]])
    mirrored = atoms.copy()
    mirrored.positions[:, 0] *= -1
    for options, differs in (({}, False), (PUBLISHED, True)):
        potential = potential_of(**options)
        difference = abs(computed(potential, atoms)[0] - computed(potential, mirrored)[0])
        assert (difference > 1e-6) == differs


@pytest.mark.parametrize("options", [{}, PUBLISHED, {**PUBLISHED, **DIRECT}], ids=str)
def test_each_structure_of_a_batch_has_its_own_periodicity(options):
    """The reference takes that of the first for all."""
    potential = potential_of(**options)
    salt = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    salt.rattle(0.05, seed=1)
    free = salt.copy()
    free.pbc = False
    alone = [computed(potential, atoms)[0] for atoms in (salt, free)]
    together = potential(potential.build_graph([salt, free]), ("energy",))["energy"].detach()
    np.testing.assert_allclose(together, alone, atol=EXACT)
    assert abs(alone[0] - alone[1]) > 1e-3


@pytest.mark.parametrize("options", [{}, PUBLISHED, DIRECT], ids=str)
def test_every_parameter_learns(options):
    torch.manual_seed(4)
    potential = Potential(EquiformerV3(**{**SMALL, **options})).train()
    properties = ("energy", "forces", "stress")
    structures = [rattled_crystal(), rattled_crystal()]
    result = potential(potential.build_graph(structures), properties)
    sum(result[key].square().sum() for key in properties).backward()
    assert not [name for name, p in potential.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mmax": 3}, "mmax=3"),
        ({"norm": "batch_norm"}, "batch_norm"),
        ({"logit_norm": "batch_norm"}, "batch_norm"),
        ({"activation": "relu"}, "relu"),
        ({"feed_forward": "relu"}, "relu"),
        ({"feed_forward": "gate", "grid_mlp": True}, "gate"),
        ({"radial_basis": "fourier"}, "fourier"),
        ({"activation": "s2", "attn_grid": [5, 5]}, "grid of 5 x 5"),
    ],
)
def test_unknown_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        EquiformerV3(**{**SMALL, **options})


# Options of the published form, by their definitions


@pytest.mark.parametrize(
    ("name", "on_grid", "of_scalars", "joined"),
    [
        ("product", "product", "swiglu", "add"),
        ("separable_s2_swiglu", "swiglu", "swiglu", "replace"),
        ("merged_s2_swiglu", "swiglu", "swiglu", "add"),
        ("separable_s2_square", "product", "product", "replace"),
        ("s2_swiglu", "swiglu", None, None),
    ],
)
def test_folded_maps_are_those_on_the_grid(name, on_grid, of_scalars, joined):
    torch.manual_seed(5)
    network = FactoredFeedForward(3, 5, 6, nonlinearity=name, grid_resolution=[10, 10]).double()
    scatter_weights(network)
    x = torch.randn(4, 16, 5, dtype=torch.float64)
    grid = SphereGrid(3, 3, n_beta=10, n_alpha=10, normalization="component")
    values = network.grid_first(grid.to_matrix(like=x) @ network.first(x))  # (4, n_points, 12)
    pair = {
        "product": lambda v: v[..., :6] * v[..., 6:],
        "swiglu": lambda v: torch.nn.functional.silu(v[..., :6]) * v[..., 6:],
    }
    values = pair[on_grid](values)
    if name == "product":
        values = values * torch.sigmoid(network.gates(x[:, 0]))[:, None]
    y = grid.from_matrix(like=x) @ network.grid_second(values)
    if of_scalars is not None:
        scalars = pair[of_scalars](network.scalars(x[:, 0]))
        y[:, 0] = scalars if joined == "replace" else y[:, 0] + scalars
    torch.testing.assert_close(network(x), network.second(y), atol=EXACT, rtol=0)


def test_published_softmax_is_relative_to_the_largest_logit():
    logits = torch.tensor([[0.3], [0.1], [-2.0]], dtype=torch.float64)
    envelope = torch.tensor([0.5, 0.2, 0.7], dtype=torch.float64)
    index, epsilon = torch.tensor([0, 0, 2]), 0.25
    weights = relative_softmax(logits, envelope, index, 4, epsilon)[:, 0]
    shifted = torch.tensor([1.0, np.exp(-0.2)]) * envelope[:2]
    torch.testing.assert_close(weights[:2], shifted / (shifted.sum() + epsilon))
    assert float(weights[2]) == pytest.approx(0.7 / (0.7 + epsilon))
    bare = relative_softmax(logits, None, index, 4, 0.0)[:, 0]
    torch.testing.assert_close(bare[:2], torch.softmax(logits[:2, 0], dim=0))


@pytest.mark.parametrize("shared_radial", [True, False])
def test_added_features_are_those_side_by_side_through_one_map(shared_radial):
    """W (r_j x_j + r_i x_i) is [W, W] [r_j x_j, r_i x_i]."""
    added = potential_of(add_merge=True, shared_radial=shared_radial, num_layers=2)
    side_by_side = potential_of(shared_radial=shared_radial, num_layers=2)
    weights = side_by_side.state_dict()
    for name, tensor in added.state_dict().items():
        if tensor.shape != weights[name].shape:
            channels = SMALL["sphere_channels"]
            per_degree = tensor.unflatten(-1, (-1, channels))
            tensor = torch.cat([per_degree, per_degree], dim=-1).flatten(-2)
        weights[name] = tensor
    side_by_side.load_state_dict(weights)
    atoms = rattled_molecule()
    energy, forces = computed(added, atoms)
    expected, expected_forces = computed(side_by_side, atoms)
    assert energy == pytest.approx(expected, abs=EXACT)
    np.testing.assert_allclose(forces, expected_forces, atol=EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "bare_rms_norm_sh", "logit_norm": "rms_norm"},
        {"norm": "layer_norm_sh", "logit_norm": "none", "softcap": 2.0},
        {"silu_logits": True, "element_pairs": False, "shared_radial": False},
        {"activation": "gate", "feed_forward": "gate", "grid_mlp": False, "add_merge": True},
        {"envelope": False},
    ],
    ids=str,
)
def test_exact_options_commute_with_rotations(options):
    potential = potential_of(**{**PUBLISHED, **DIRECT, **options})
    atoms = rattled_crystal()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.T)
    turned.positions = atoms.positions @ turn.T
    graph = potential.build_graph([atoms, turned])
    result = {k: v.detach() for k, v in potential(graph, ("energy", "forces", "stress")).items()}
    assert float(result["energy"][0] - result["energy"][1]) == pytest.approx(0, abs=1e-11)
    forces, turned_forces = result["forces"].numpy().reshape(2, -1, 3)
    np.testing.assert_allclose(turned_forces, forces @ turn.T, atol=1e-11)
    stress, turned_stress = result["stress"].numpy()
    np.testing.assert_allclose(turned_stress, turn @ stress @ turn.T, atol=1e-11)
    assert np.abs(stress - np.eye(3) * np.trace(stress) / 3).max() > 1e-6
