"""What a model says of how far its energies depend on atoms is neither too little nor too much."""

from typing import Any

import pytest
import torch
from small_models import EGNN, SMALL_MODELS, node, wrapped
from small_models import FAENET as SMALL_FAENET

from atomeq.check.model import chain
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.faenet import FAENet
from atomeq.potential.checkpoint import build_model, scatter_weights
from atomeq.potential.mean import MeanPotential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.repulsion import ZBL
from atomeq.potential.terms import EnergyTerm


def of_two(name: str) -> dict[str, Any]:
    """The small model with two layers."""
    small = SMALL_MODELS[name]
    return {**small, "init_args": {**small["init_args"], "num_layers": 2}}


FAENET = {**SMALL_FAENET, "init_args": {**SMALL_FAENET["init_args"], "num_interactions": 2}}
MODELS = {
    **SMALL_MODELS,
    "escn of two": of_two("escn"),
    "geometric_algebra of two": of_two("geometric_algebra"),
    "lie_transformer": node("lie_transformer", "LieTransformer", num_layers=1, hidden_channels=8),
    "translations": node(
        "lie_transformer", "LieTransformer", group="T(3)", num_layers=1, hidden_channels=8
    ),
    "local frames": wrapped("local_frames", "LocalFrames", model=FAENET),
    "charged": wrapped("charged", "Charged", model=EGNN),
    "electric": wrapped("electric", "Electric", model=EGNN, hidden_channels=4),
}
EVERYWHERE = {"faenet", "equihgnn"}  # one frame of the whole structure, and bonds across it


@pytest.mark.parametrize("name", MODELS)
def test_an_energy_feels_the_atom_at_the_depth_and_none_beyond(name: str) -> None:
    torch.manual_seed(0)
    potential = Potential(build_model(MODELS[name])).double().eval()
    scatter_weights(potential)
    depth = potential.receptive_depth
    if name in EVERYWHERE:
        assert depth is None
        return
    assert depth is not None
    atoms = chain(potential.cutoff, depth + 3, ["Cu", "O"])

    def first() -> float:
        graph = potential.build_graph(atoms)
        with torch.no_grad():
            return float(potential.evaluate(graph)["energies"][0])

    still = first()
    atoms.positions[depth + 1 :] += (0.02, 0.03, -0.01)
    assert first() == still
    atoms.positions[depth] += (0.2, 0.3, -0.1)
    assert first() != still


def test_what_counts_the_atoms_of_a_structure_has_no_depth() -> None:
    small = {"num_layers": 1, "lmax": 1, "mmax": 1, "sphere_channels": 4}
    assert EquiformerV2(**small).receptive_depth == 2
    assert EquiformerV2(**small, energy_reduce="mean").receptive_depth is None
    assert FAENet(normalisation="graph").receptive_depth is None
    assert FAENet(energy_bias="graph").receptive_depth is None
    offset = AtomicReferences(offset=1.0)
    assert Potential(build_model(EGNN), offset).receptive_depth is None


def test_terms_and_members_of_a_committee_count() -> None:
    class Everything(EnergyTerm):
        """Depends on who knows what."""

    shallow = {**EGNN, "init_args": {**EGNN["init_args"], "num_layers": 1}}
    deep, flat = Potential(build_model(EGNN)), Potential(build_model(shallow), terms=[ZBL()])
    assert (deep.receptive_depth, flat.receptive_depth) == (2, 1)
    assert MeanPotential([flat, deep]).receptive_depth == 2
    flat.add_terms([Everything()])
    assert flat.receptive_depth is None
    assert MeanPotential([flat, deep]).receptive_depth is None
