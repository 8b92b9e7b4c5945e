"""The loss by its formula; labels that are not known do not count."""

import pytest
import torch

from atomeq.graph.atom_graph import AtomGraph
from atomeq.training.losses import PotentialLoss

NAN = float("nan")


@pytest.fixture
def graph() -> AtomGraph:
    """Structures of 1 and 2 atoms; the second weighs 3."""
    return AtomGraph(
        torch.zeros(3, 3),
        torch.tensor([29, 29, 29]),
        natoms=torch.tensor([1, 2]),
        energy=torch.tensor([1.0, 4.0], dtype=torch.float64),
        forces=torch.zeros(3, 3),
        stress=torch.zeros(2, 3, 3),
        weight=torch.tensor([1.0, 3.0]),
    )


@pytest.fixture
def prediction() -> dict:
    return {
        "energy": torch.tensor([1.5, 6.0], dtype=torch.float64),
        "forces": torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 0]]),
        "stress": torch.full((2, 3, 3), 0.5),
    }


def test_squares_by_hand(graph: AtomGraph, prediction: dict):
    terms = PotentialLoss(energy=2.0, forces=5.0, stress=1.0)(prediction, graph)
    assert float(terms["energy"]) == pytest.approx((0.5**2 + 3 * (2 / 2) ** 2) / 2)
    assert float(terms["forces"]) == pytest.approx((1.0 + 3 * 4.0) / 9)
    assert float(terms["stress"]) == pytest.approx((1 + 3) / 2 * 0.25)
    expected = 2 * terms["energy"] + 5 * terms["forces"] + terms["stress"]
    assert float(terms["loss"]) == pytest.approx(float(expected))


def test_absolute_and_huber_by_hand(graph: AtomGraph, prediction: dict):
    mae = PotentialLoss(energy=1, forces=0, kind="mae")(prediction, graph)
    assert float(mae["loss"]) == pytest.approx((0.5 + 3 * 1.0) / 2)
    huber = PotentialLoss(energy=1, forces=0, kind="huber", huber_delta=0.6)(prediction, graph)
    assert float(huber["loss"]) == pytest.approx((0.5**2 / 2 + 3 * 0.6 * (1 - 0.3)) / 2)


def test_unknown_labels_do_not_count(graph: AtomGraph, prediction: dict):
    forces = graph.forces.clone()
    forces[0] = NAN
    partial = graph.replace(forces=forces, energy=torch.tensor([NAN, 4.0]).double())
    predicted = {key: value.clone().requires_grad_() for key, value in prediction.items()}
    terms = PotentialLoss()(predicted, partial)
    assert float(terms["energy"].detach()) == pytest.approx(3 * 1.0)
    assert float(terms["forces"].detach()) == pytest.approx(3 * 4.0 / 6)
    terms["loss"].backward()
    assert torch.isfinite(predicted["forces"].grad).all()
    assert float(predicted["energy"].grad[0]) == 0


def test_large_total_energies_keep_their_digits(graph: AtomGraph):
    # 1 meV on 9,000 eV is below the resolution of float32.
    graph = graph.replace(energy=torch.tensor([-9000.0, -9000.0], dtype=torch.float64))
    predicted = {"energy": torch.tensor([-8999.999, -9000.0], dtype=torch.float64)}
    loss = PotentialLoss(energy=1, forces=0, kind="mae")(predicted, graph)["loss"]
    assert float(loss) == pytest.approx(0.0005, rel=1e-6)


def test_only_what_has_a_coefficient_is_asked_for():
    assert PotentialLoss(energy=1, forces=0, stress=2).properties == ("energy", "stress")


@pytest.mark.parametrize("bad", [{"energy": -1.0}, {"energy": 0.0, "forces": 0.0}])
def test_bad_coefficients_are_refused(bad: dict):
    with pytest.raises(ValueError, match="coefficients"):
        PotentialLoss(**bad)
    with pytest.raises(ValueError, match="huber_delta"):
        PotentialLoss(kind="huber", huber_delta=0)


def test_loss_without_pressure_does_not_see_a_pulay_stress(graph):
    offset = torch.diag_embed(torch.full((graph.n_graphs, 3), 0.02, dtype=graph.stress.dtype))
    shear = torch.zeros_like(graph.stress)
    shear[:, 0, 1] = 0.01
    loss = PotentialLoss(energy=0, forces=0, stress=1, pressure=False)
    blind = loss({"stress": graph.stress + offset}, graph)["loss"]
    assert float(blind) == pytest.approx(0.0, abs=1e-12)
    seen = loss({"stress": graph.stress + offset + shear}, graph)["loss"]
    assert float(seen) == pytest.approx((1 + 3) / 2 * 0.01**2 / 9, rel=1e-5)  # weights 1 and 3


def test_huber_has_a_delta_for_each_property(graph: AtomGraph, prediction: dict):
    deltas = {"energy": 0.6, "forces": 1.5}
    terms = PotentialLoss(energy=1, kind="huber", huber_delta=deltas)(prediction, graph)
    assert float(terms["energy"]) == pytest.approx((0.5**2 / 2 + 3 * 0.6 * (1 - 0.3)) / 2)
    assert float(terms["forces"]) == pytest.approx((1 / 2 + 3 * 1.5 * (2 - 0.75)) / 9)
    with pytest.raises(ValueError, match="huber_delta has energy, and the loss is of energy, fo"):
        PotentialLoss(kind="huber", huber_delta={"energy": 0.1})
    with pytest.raises(ValueError, match="must be positive"):
        PotentialLoss(kind="conditional_huber", huber_delta={"energy": 0.1, "forces": 0.0})


def test_large_forces_have_a_smaller_delta(graph: AtomGraph):
    labels = torch.tensor([[50.0, 0, 0], [0, 150.0, 0], [0, 0, 350.0]])
    graph = graph.replace(forces=labels)
    loss = PotentialLoss(energy=0, forces=1, kind="conditional_huber", huber_delta=0.5)
    found = loss({"forces": labels + 2.0}, graph)["loss"]
    costs = [delta * (2 - delta / 2) for delta in (0.5, 0.35, 0.05)]
    assert float(found) == pytest.approx(3 * (costs[0] + 3 * costs[1] + 3 * costs[2]) / 9)


def test_labels_of_a_structure_have_weights_of_their_own(graph: AtomGraph, prediction: dict):
    weighed = graph.replace(forces_weight=torch.tensor([2.0, 0.5]))
    terms = PotentialLoss()(prediction, weighed)
    assert float(terms["forces"]) == pytest.approx((2 * 1.0 + 3 * 0.5 * 4.0) / 9)
    assert float(terms["energy"]) == float(PotentialLoss()(prediction, graph)["energy"])
