"""eSEN: its size as published, its forces where an edge lies on the y axis, its options."""

import numpy as np
import pytest
import torch
from along_axis import FIVE_POINTS, STEP, check_forces_beside_y, computed
from ase import Atoms
from structures import rattled_crystal, rattled_molecule

from atomeq.models.esen import ESEN
from atomeq.potential.checkpoint import scatter_weights
from atomeq.potential.potential import Potential
from checkers import esen
from checkers.roll import reference_rotation

SMALL = {
    "cutoff": 4.0, "lmax": 2, "mmax": 1, "num_layers": 1, "sphere_channels": 4,
    "hidden_channels": 4, "edge_channels": 4,
}  # fmt: skip
PUBLISHED = {
    "radial_basis": "gaussian", "num_radial": 16, "feed_forward": "silu_gate", "chiral": True,
    "bias": True, "max_neighbors": 300, "skip_isolated": True,
}  # fmt: skip
GRID = {"activation": "separable_s2", "feed_forward": "grid_mlp", "grid_resolution": 40}


def potential_of(**options) -> Potential:
    torch.manual_seed(3)
    potential = Potential(ESEN(**{**SMALL, **options})).double().eval()
    scatter_weights(potential)
    return potential


@pytest.mark.parametrize(
    ("num_radial", "published"),
    [(64, 30_161_153), (10, 30_085_121)],  # eSEN-30M-OAM and eSEN-30M-MP on Matbench Discovery
)
def test_published_sizes(num_radial, published):
    with torch.device("meta"):
        model = ESEN(
            lmax=3, mmax=2, num_layers=10, sphere_channels=128, hidden_channels=128,
            edge_channels=128, num_elements=100, **{**PUBLISHED, "num_radial": num_radial},
        )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == published


@pytest.mark.parametrize("angle", [0.0, 0.03, 0.08], ids=lambda angle: f"{angle} degrees")
@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=["default", "published"])
def test_forces_are_right_for_an_edge_along_y(options, angle):
    """The reference cuts the gradient within 0.081 degrees of the axis."""
    check_forces_beside_y(potential_of(**options), angle)


@pytest.mark.parametrize("options", [{}, PUBLISHED, GRID, {"direct_forces": True}], ids=str)
def test_every_parameter_learns(options):
    torch.manual_seed(4)
    potential = Potential(ESEN(**{**SMALL, **options})).train()
    result = potential(potential.build_graph([rattled_crystal(), rattled_molecule()]))
    (result["energy"].square().sum() + result["forces"].square().sum()).backward()
    idle = {name for name, p in potential.named_parameters() if p.grad is None}
    assert idle <= {"model.forces.bias"}  # of a scalar that nobody reads


def test_forces_of_a_grid_are_those_of_the_energy_as_far_as_the_grid_is_fine():
    potential = potential_of(**GRID)
    atoms = rattled_molecule()
    _, forces = computed(potential, atoms)
    moved = [atoms.copy(), atoms.copy()]
    for sign, one in zip((1, -1), moved, strict=True):
        one.positions[1, 0] += sign * STEP
    plus, minus = (computed(potential, one)[0] for one in moved)
    assert (minus - plus) / (2 * STEP) == pytest.approx(forces[1, 0], abs=1e-6)


def test_only_the_published_form_has_a_step_where_the_last_edge_goes():
    """Its blocks leave out structures without edges; beside others the result is the same."""
    energies = {}
    for name, options in (("default", {}), ("published", {**PUBLISHED, "max_neighbors": None})):
        potential = potential_of(**options)
        dimers = [Atoms("CO", [[0, 0, 0], [0, 0, 4.0 + step]]) for step in (-1e-6, 1e-6)]
        alone = [computed(potential, atoms)[0] for atoms in dimers]
        together = potential(potential.build_graph(dimers), ("energy",))["energy"]
        np.testing.assert_allclose(together.detach(), alone, atol=1e-12)
        energies[name] = alone
    near, far = energies["default"]
    assert near == pytest.approx(far, abs=1e-9)
    near, far = energies["published"]
    assert abs(near - far) > 1e-3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mmax": 3}, "mmax=3"),
        ({"norm": "batch_norm"}, "batch_norm"),
        ({"activation": "relu"}, "relu"),
        ({"feed_forward": "relu"}, "relu"),
        ({"radial_basis": "fourier"}, "fourier"),
        ({"energy_reduce": "max"}, "max"),
        ({"lmax": 0, "mmax": 0, "direct_forces": True}, "lmax=0"),
    ],
)
def test_unknown_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        ESEN(**{**SMALL, **options})


def test_golden_checks_add_what_forces_of_the_reference_have_through_the_roll():
    """With SiLU on a coarse grid the energy sees the roll, which the reference differentiates."""
    coarse = {**GRID, "grid_resolution": None, "num_layers": 2, "lmax": 3, "mmax": 2}
    model = potential_of(**coarse).model
    for parameter in model.parameters():
        parameter.data *= 1.5
    maps = [(block.message.first, block.message.second) for block in model.blocks]
    gauge, graph = (0.9, 0.2, 0.6), model.graph_builder()(rattled_molecule())
    rotation = reference_rotation(graph.edge_vectors(), gauge)
    turned = rotation @ torch.nn.functional.normalize(graph.edge_vectors(), dim=1)[:, :, None]
    expected = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)[:, None].expand_as(turned)
    torch.testing.assert_close(turned, expected, atol=1e-12, rtol=0)
    blind, seeing = (
        esen.outputs(model, graph, rotation, maps, given)["out.forces"] for given in (None, gauge)
    )
    differences = torch.zeros_like(blind)
    for index in np.ndindex(*blind.shape):
        for sign, weight in FIVE_POINTS:
            pos = graph.pos.clone()
            pos[index] += sign * STEP
            moved = graph.replace(pos=pos)
            frames = reference_rotation(moved.edge_vectors(), gauge)
            energy = model(moved, edge_rotation=frames)["energies"].sum().detach()
            differences[index] += weight / (12 * STEP) * energy
    missing = (blind - differences).abs().max()
    assert missing > 1e-3 * differences.abs().max()
    assert (seeing - differences).abs().max() < 1e-5 * missing
