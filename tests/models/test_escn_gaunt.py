"""eSCN whose atoms multiply features on the sphere, as a configuration names it."""

import pytest
import torch
from structures import rattled_molecule

from atomeq.models.escn import ESCN, GauntUpdate
from atomeq.ops.edge.wigner import block_diagonal, rotation_matrix, wigner_from_matrix
from atomeq.potential.checkpoint import build_model
from atomeq.potential.potential import Potential

EXACT = 1e-12  # float64 rounding
NODE = {
    "class_path": "atomeq.models.escn.ESCN",
    "init_args": {
        "cutoff": 4.0,
        "lmax": 2,
        "mmax": 1,
        "num_layers": 1,
        "sphere_channels": 8,
        "hidden_channels": 8,
        "edge_channels": 8,
        "update": "gaunt",
    },
}


@pytest.fixture
def potential() -> Potential:
    model = build_model(NODE)
    for parameter in model.energy.parameters():  # its output starts at zero
        torch.nn.init.normal_(parameter)
    return Potential(model.double())


def test_configuration_gives_products_that_the_energy_and_force_training_feel(
    potential: Potential,
) -> None:
    graph = potential.build_graph([rattled_molecule()])
    result = potential.train()(graph, properties=("energy", "forces"))
    weights = potential.model.layers[0].update.product.first
    for value in result["energy"].sum(), result["forces"].square().sum():
        (gradient,) = torch.autograd.grad(value, weights, retain_graph=True)
        assert gradient.norm(dim=1).min() > 0  # of every degree


def test_energy_does_not_change_under_rotations_and_reflections(potential: Potential) -> None:
    atoms = rattled_molecule()
    turned = atoms.copy()
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    turn = -rotation_matrix(quaternion).numpy()
    turned.positions = atoms.positions @ turn.T
    result = potential(potential.build_graph([atoms, turned]), properties=("energy", "forces"))
    energies, forces = result["energy"], result["forces"].view(2, len(atoms), 3)
    assert (energies[1] - energies[0]).abs() <= EXACT * energies.abs().max()
    expected = forces[0] @ torch.from_numpy(turn).T
    assert (forces[1] - expected).abs().max() <= 10 * EXACT * forces.abs().max()


def test_update_is_equivariant_and_has_right_derivatives() -> None:
    update = GauntUpdate(2, 2, 2).double()
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    wigner = block_diagonal(wigner_from_matrix(-rotation_matrix(quaternion), 2))
    x = torch.randn(3, 9, 2, dtype=torch.float64, requires_grad=True)
    expected = wigner @ update(x)
    assert (update(wigner @ x) - expected).abs().max() <= EXACT * expected.abs().max()
    small = GauntUpdate(1, 1, 1).double()
    assert torch.autograd.gradcheck(small, (x[:2, :4, :1],))
    assert torch.autograd.gradgradcheck(small, (x[:2, :4, :1],))


def test_unknown_update_is_refused() -> None:
    with pytest.raises(ValueError, match="update is gate or gaunt or product, not 'tensor'"):
        ESCN(4.0, update="tensor")
