"""Potentials of every model config with generic weights, and structures to hold the laws on."""

from pathlib import Path

import pytest
from ase import Atoms
from bonded import BondedHyperGraph
from exemptions import expect_failure
from structures import RATTLED

from atomeq.potential.checkpoint import untrained_potential
from atomeq.potential.potential import Potential

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
#: Models of hypergraphs keep the laws twice: without hyperedges, and with some in every structure.
WITH_HYPEREDGES = [path for path in MODEL_CONFIGS if "EquiHGNN" in path.read_text()]
PARAMS = [pytest.param((path, False), id=path.stem) for path in MODEL_CONFIGS]
PARAMS += [
    pytest.param((path, True), id=f"{path.stem} with hyperedges") for path in WITH_HYPEREDGES
]


def build_potential(config: Path) -> Potential:
    """Build a config's model in float64; the tests differentiate by its weights."""
    return untrained_potential(config).requires_grad_()


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
