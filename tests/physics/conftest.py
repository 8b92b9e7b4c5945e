"""Potentials of every model config with generic weights, and structures to hold the laws on."""

from pathlib import Path

import pytest
import torch
import yaml
from ase import Atoms
from bonded import BondedHyperGraph
from exemptions import expect_failure
from structures import RATTLED

from atomeq.potential.checkpoint import build_model
from atomeq.potential.potential import Potential

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
#: Models of hypergraphs keep the laws twice: without hyperedges, and with some in every structure.
WITH_HYPEREDGES = [path for path in MODEL_CONFIGS if "EquiHGNN" in path.read_text()]
PARAMS = [pytest.param((path, False), id=path.stem) for path in MODEL_CONFIGS]
PARAMS += [
    pytest.param((path, True), id=f"{path.stem} with hyperedges") for path in WITH_HYPEREDGES
]


def build_potential(config: Path) -> Potential:
    """Build a config's model in float64, away from the zeros and ones of its initialisation."""
    node = yaml.safe_load(config.read_text())
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(node)
    potential = Potential(model).double().eval()
    for parameter in potential.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.05 * noise
    return potential


@pytest.fixture(scope="session", params=PARAMS)
def potential(request) -> Potential:
    config, with_hyperedges = request.param
    made = build_potential(config)
    if with_hyperedges:
        made._builder = BondedHyperGraph(made.model.graph_builder())
    return made


@pytest.fixture(params=RATTLED, ids=str)
def structure(request) -> Atoms:
    return RATTLED[request.param]()


@pytest.fixture(autouse=True)
def exempted_law_fails(request: pytest.FixtureRequest) -> None:
    if "potential" in request.fixturenames:
        expect_failure(request, request.getfixturevalue("potential").model.exempt_laws)
