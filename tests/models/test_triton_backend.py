"""Whole models served by the Triton backend, against the reference."""

import pytest
import torch
from ase import Atoms
from edge_layers import relative

from atomeq.models.egnn import EGNN
from atomeq.models.escn import ESCN
from atomeq.potential.potential import Potential

pytest.importorskip("triton", reason="Triton is not installed: pip install atomeq[cuda]")

pytestmark = pytest.mark.triton

DOUBLE = 1e-11  # rounding of a whole model
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny_models() -> dict[str, torch.nn.Module]:
    return {
        "escn": ESCN(
            lmax=1,
            mmax=1,
            num_layers=1,
            sphere_channels=16,
            hidden_channels=16,
            edge_channels=8,
            num_radial=4,
        ),
        "egnn": EGNN(num_layers=2, hidden_channels=8, num_radial=4),
    }


@pytest.mark.parametrize("name", ["escn", "egnn"])
def test_model_agrees_with_the_reference_in_energy_forces_and_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models()[name]
    for parameter in model.parameters():  # some start from zero, and would hide what lies below
        torch.nn.init.normal_(parameter, std=0.4)
    potential = Potential(model).double().to(DEVICE)
    water = Atoms("OH2", positions=[[0, 0, 0.12], [0, 0.76, -0.48], [0.1, -0.76, -0.48]])
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ATOMEQ_BACKEND", backend)
        graph = potential.build_graph(water).to(DEVICE)
        found = potential(graph, ("energy", "forces"), create_graph=True)
        loss = found["energy"].square().sum() + found["forces"].square().sum()
        parameters = [p for p in potential.parameters() if p.requires_grad]
        trained = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [g for g in trained if g is not None]
        results.append([found["energy"], found["forces"], *gradients])
    assert results[1][1].norm() > 0
    errors = [relative(f, e) for f, e in zip(*results, strict=True)]
    assert max(errors) <= DOUBLE, errors
