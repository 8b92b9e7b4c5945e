"""Potentials of every model config with generic weights, and structures to hold the laws on."""

from pathlib import Path

import pytest
from ase import Atoms
from exemptions import expect_failure
from structures import RATTLED

from atomeq.potential.checkpoint import untrained_potential
from atomeq.potential.potential import Potential

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))


def build_potential(config: Path) -> Potential:
    """Build a config's model in float64; the tests differentiate by its weights."""
    return untrained_potential(config).requires_grad_()


@pytest.fixture(scope="session", params=MODEL_CONFIGS, ids=lambda path: path.stem)
def potential(request) -> Potential:
    return build_potential(request.param)


@pytest.fixture(params=RATTLED, ids=str)
def structure(request) -> Atoms:
    return RATTLED[request.param]()


@pytest.fixture(autouse=True)
def exempted_law_fails(request: pytest.FixtureRequest) -> None:
    if "potential" in request.fixturenames:
        expect_failure(request, request.getfixturevalue("potential").model.exempt_laws)
