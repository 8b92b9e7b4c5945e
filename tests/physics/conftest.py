"""Every model config with generic weights, and structures to hold the laws on."""

from pathlib import Path

import pytest
from bonded import BondedHyperGraph
from structures import RATTLED

from atomeq.check.model import ModelSubject
from atomeq.potential.checkpoint import untrained_potential

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
#: Models of hypergraphs keep the laws twice: without hyperedges, and with some in every structure.
WITH_HYPEREDGES = [path for path in MODEL_CONFIGS if "EquiHGNN" in path.read_text()]
PARAMS = [pytest.param((path, False), id=path.stem) for path in MODEL_CONFIGS]
PARAMS += [
    pytest.param((path, True), id=f"{path.stem} with hyperedges") for path in WITH_HYPEREDGES
]


@pytest.fixture(scope="session", params=PARAMS)
def subject(request) -> ModelSubject:
    config, with_hyperedges = request.param
    potential = untrained_potential(config).requires_grad_()
    if with_hyperedges:
        potential._builder = BondedHyperGraph(potential.model.graph_builder())
    structures = [RATTLED[name]() for name in ("crystal", "slab", "molecule")]
    return ModelSubject(potential, ["Cu", "Mg", "O", "C", "H"], structures)
