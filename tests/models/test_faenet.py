"""FAENet's options, and what its default mends."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from published.faenet import published
from structures import rattled_molecule, rattled_slab

from atomeq.models.faenet import FAENet
from atomeq.potential.potential import Potential

SMALL = {"hidden_channels": 48, "num_filters": 24, "num_interactions": 2, "num_gaussians": 8}
EXACT = 1e-12


def energies(model: FAENet, structures) -> np.ndarray:
    potential = Potential(model).double().eval()
    return potential(potential.build_graph(structures), ("energy",))["energy"].detach().numpy()


@pytest.mark.parametrize(
    "mp_type", ["base", "simple", "updownscale", "updownscale_base", "updown_local_env"]
)
@pytest.mark.parametrize("normalisation", ["none", "atom", "graph"])
def test_batch_equals_single_for_every_message_type(mp_type, normalisation):
    model = FAENet(5.0, mp_type=mp_type, normalisation=normalisation, complex_mp=True, **SMALL)
    structures = [rattled_molecule(), rattled_slab(), Atoms("O")]
    apart = np.concatenate([energies(model, structure) for structure in structures])
    np.testing.assert_allclose(energies(model, structures), apart, rtol=0, atol=EXACT)


def test_published_norm_mixes_structures_of_a_batch():
    model = published({"hidden_channels": 48, "pg_hidden_channels": 4, "tag_hidden_channels": 0})
    structures = [rattled_molecule(), molecule("H2O")]
    apart = np.concatenate([energies(model, structure) for structure in structures])
    assert np.abs(energies(model, structures) - apart).max() > 1e-4


@pytest.mark.parametrize("skip_connection", ["none", "add", "concat", "concat_atom"])
@pytest.mark.parametrize("energy_head", ["sum", "weighted_initial", "weighted_final"])
def test_far_structures_add_up_with_every_head(skip_connection, energy_head):
    model = FAENet(4.0, skip_connection=skip_connection, energy_head=energy_head, **SMALL)
    one, other = rattled_molecule(), molecule("H2O")
    other.positions += 40.0
    together, *apart = (energies(model, s)[0] for s in (one + other, one, other))
    assert together == pytest.approx(sum(apart), abs=EXACT)


@pytest.mark.parametrize("num_elements", [85, 119])
@pytest.mark.parametrize("phys_channels", [0, 6])
def test_every_element_has_an_energy(num_elements, phys_channels):
    model = FAENet(4.0, num_elements=num_elements, phys_channels=phys_channels, **SMALL)
    pairs = [Atoms([z, 1], [[0, 0, 0], [0, 0, 1.8]]) for z in range(1, num_elements)]
    found = energies(model, pairs)
    assert np.isfinite(found).all()
    assert len(np.unique(found.round(12))) == len(pairs)


@pytest.mark.parametrize("force_head", ["simple", "mlp", "res", "res_updown"])
@pytest.mark.parametrize("decoder_norm", ["none", "layer", "batch"])
def test_force_head_predicts_forces_of_its_own(force_head, decoder_norm):
    model = FAENet(4.0, force_head=force_head, decoder_norm=decoder_norm, **SMALL)
    potential = Potential(model).eval()
    result = potential(potential.build_graph(rattled_molecule()))
    assert not potential.conservative
    assert result["forces"].shape == (9, 3)
    assert float(result["forces"].detach().abs().max()) > 0


def test_removed_subsurface_leaves_no_trace():
    slab = rattled_slab()
    slab.set_tags([0, 0, 0, 0, 1, 1, 1, 2])
    potential = Potential(FAENet(4.0, remove_tag_0=True, **SMALL)).double().eval()
    whole = potential(potential.build_graph(slab), ("energy", "energies", "forces"))
    part = potential(potential.build_graph(slab[4:]), ("energy", "forces"))
    torch.testing.assert_close(whole["energy"], part["energy"], rtol=0, atol=EXACT)
    torch.testing.assert_close(whole["forces"][4:], part["forces"], rtol=0, atol=EXACT)
    assert whole["forces"].shape == (8, 3)
    assert not whole["energies"][:4].any()
    assert not whole["forces"][:4].any()


def test_tags_are_asked_for():
    potential = Potential(FAENet(4.0, tag_channels=4, pg_channels=8, **SMALL))
    graph = potential.build_graph(rattled_slab()).replace(tags=None)
    with pytest.raises(ValueError, match="embeds tags"):
        potential(graph)


def test_too_few_hidden_channels_are_refused():
    with pytest.raises(ValueError, match="raise hidden_channels"):
        FAENet(hidden_channels=32)


def test_published_activation_is_the_only_one():
    with pytest.raises(ValueError, match="every published configuration"):
        published({"act": "relu"})
