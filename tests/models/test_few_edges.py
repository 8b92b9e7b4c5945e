"""Structures without edges, with an isolated last atom or one edge: references crash on some."""

import numpy as np
import pytest
import torch
from ase import Atoms

from atomeq.models.base import AtomisticModel
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.equiformer_v3 import EquiformerV3
from atomeq.models.escn_published import PublishedESCN
from atomeq.models.esen import ESEN
from atomeq.models.mace import MACE
from atomeq.models.nequip import NequIP
from atomeq.potential.checkpoint import scatter_weights
from atomeq.potential.potential import Potential

SMALL = {"cutoff": 4.0, "lmax": 2, "mmax": 1, "num_layers": 1, "edge_channels": 4}
TRANSFORMER = {
    "sphere_channels": 4, "attn_hidden_channels": 4, "num_heads": 2, "attn_alpha_channels": 4,
    "attn_value_channels": 2, "ffn_hidden_channels": 4,
}  # fmt: skip
CONVOLUTIONAL = {"sphere_channels": 4, "hidden_channels": 4}
PUBLISHED_V3 = {"grid_mlp": True, "attn_epsilon": 1e-8, "chiral": True, "max_neighbors": 300}
PUBLISHED_ESEN = {"feed_forward": "silu_gate", "chiral": True, "bias": True, "skip_isolated": True}
PUBLISHED_V2 = {
    "activation": "separable_s2", "feed_forward": "grid_mlp", "norm": "layer_norm_sh",
    "element_pairs": "shared", "envelope": False, "max_neighbors": 20, "chiral": True,
    "radial_basis": "gaussian", "direct_forces": True,
}  # fmt: skip
ESCN = {"cutoff": 4.0, "lmax": (2,), "mmax": (1,), "num_layers": 1, "num_sphere_samples": 8}
IRREPS = {"irreps": ["4x0e", "4x0e+2x1e", "4x0e"], "parity": False, "sevennet": {}}
HEAD = {"direct_forces": True, "stress_head": "equivariant"}
RANK2 = {"direct_forces": True, "stress_head": {"decompose": True, "source_and_target": True}}
BUILDERS = {
    "EquiformerV2": lambda: EquiformerV2(**SMALL, **TRANSFORMER),
    "EquiformerV2, heads": lambda: EquiformerV2(**SMALL, **TRANSFORMER, **RANK2),
    "EquiformerV2, published": lambda: EquiformerV2(**SMALL, **TRANSFORMER, **PUBLISHED_V2),
    "eSCN, published": lambda: PublishedESCN(**ESCN, **CONVOLUTIONAL, edge_channels=4),
    "MACE": lambda: MACE(4.0, irreps="4x0e+4x1o", correlation=2, elements=[1, 6, 8]),
    "NequIP as SevenNet": lambda: NequIP(4.0, **IRREPS, elements=[1, 6, 8]),
    "EquiformerV3": lambda: EquiformerV3(**SMALL, **TRANSFORMER),
    "EquiformerV3, published": lambda: EquiformerV3(**SMALL, **TRANSFORMER, **PUBLISHED_V3),
    "EquiformerV3, heads": lambda: EquiformerV3(
        **SMALL, **TRANSFORMER, direct_forces=True, direct_stress=True
    ),
    "ESEN": lambda: ESEN(**SMALL, **CONVOLUTIONAL),
    "ESEN, published": lambda: ESEN(**SMALL, **CONVOLUTIONAL, **PUBLISHED_ESEN),
    "ESEN, heads": lambda: ESEN(**SMALL, **CONVOLUTIONAL, **HEAD),
    "ESEN, published heads": lambda: ESEN(**SMALL, **CONVOLUTIONAL, **PUBLISHED_ESEN, **RANK2),
}
CELL = [30.0, 30.0, 30.0]
PROPERTIES = ("energy", "forces", "stress")
EXACT = 1e-12  # rounding of float64
SAMPLED = 1e-3  # eV/Å, of a lone atom: the published points on a sphere do not sum to zero


@pytest.fixture(params=BUILDERS)
def potential(request) -> Potential:
    torch.manual_seed(0)
    model: AtomisticModel = BUILDERS[request.param]()
    potential = Potential(model).double().eval()
    scatter_weights(potential)
    return potential


def asked_of(potential: Potential) -> tuple[str, ...]:
    return PROPERTIES if potential.gives_stress else PROPERTIES[:2]


def least_force(potential: Potential) -> float:
    return SAMPLED if isinstance(potential.model, PublishedESCN) else 0.0


def computed(potential: Potential, structures: list[Atoms]) -> dict[str, np.ndarray]:
    result = potential(potential.build_graph(structures), asked_of(potential))
    return {key: value.detach().numpy() for key, value in result.items()}


def atoms(symbols: str, *positions: list[float]) -> Atoms:
    return Atoms(symbols, positions, cell=CELL, pbc=True)


def test_without_edges(potential):
    """An atom alone, atoms far apart, and a batch of nothing else."""
    alone, apart = atoms("C", [1, 2, 3]), atoms("CO", [1, 2, 3], [9, 9, 9])
    found = computed(potential, [alone, apart])
    assert all(np.isfinite(value).all() for value in found.values())
    assert np.abs(found["forces"]).max() <= least_force(potential)
    one = computed(potential, [alone])
    assert one["energy"][0] == pytest.approx(found["energy"][0], abs=EXACT)
    if potential.conservative:
        assert np.abs(found["stress"]).max() == 0.0
        other = computed(potential, [atoms("O", [1, 2, 3])])["energy"][0]
        assert found["energy"][1] == pytest.approx(one["energy"][0] + other, abs=EXACT)


def test_an_isolated_atom_at_the_end_or_amid(potential):
    bond, far = ([1.0, 2.0, 3.0], [1.5, 3.0, 3.2]), [15.0, 15.0, 15.0]
    at_end = computed(potential, [atoms("COH", *bond, far)])
    amid = computed(potential, [atoms("CHO", bond[0], far, bond[1])])
    assert all(np.isfinite(value).all() for value in at_end.values())
    assert at_end["energy"] == pytest.approx(amid["energy"], abs=EXACT)
    np.testing.assert_allclose(at_end["forces"], amid["forces"][[0, 2, 1]], atol=EXACT)
    if potential.gives_stress:
        np.testing.assert_allclose(at_end["stress"], amid["stress"], atol=EXACT)
    assert np.abs(at_end["forces"][2]).max() <= least_force(potential)
    assert np.abs(at_end["forces"][:2]).max() > 1e-6


def test_one_edge(potential):
    graph = potential.build_graph([atoms("COH", [1, 2, 3], [1.5, 3, 3.2], [15, 15, 15])])
    one = graph.replace(edge_index=graph.edge_index[:, :1], cell_offsets=graph.cell_offsets[:1])
    assert one.n_edges == 1
    found = potential(one, asked_of(potential))
    assert found["forces"].shape == (3, 3)
    assert all(torch.isfinite(value).all() for value in found.values())
