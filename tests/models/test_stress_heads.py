"""Stress heads: the published one computes what it is said to, ours turns with the structure."""

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from e3nn import o3
from structures import rattled_crystal, rattled_molecule

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.check.model import validate_model
from atomeq.dynamics.cell import FrechetCell
from atomeq.dynamics.run import relax
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.nn import stress as heads
from atomeq.nn.stress import EquivariantStress, Rank2Stress, symmetric_basis, symmetric_tensor
from atomeq.potential.checkpoint import load_potential, save_potential, scatter_weights
from atomeq.potential.official_names import build_official
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.repulsion import ZBL

EXACT = 1e-12  # float64, relative to numbers of order one
SMALL = {
    "cutoff": 4.0, "lmax": 2, "mmax": 1, "num_layers": 1, "sphere_channels": 4,
    "attn_hidden_channels": 4, "num_heads": 2, "attn_alpha_channels": 4, "attn_value_channels": 2,
    "ffn_hidden_channels": 4, "edge_channels": 4,
}  # fmt: skip
RANK_2 = {"decompose": True, "source_and_target": True}
OPTIONS = [
    dict(zip(("decompose", "edge_level", "source_and_target", "extensive"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=4)
]


def potential_of(**options) -> Potential:
    torch.manual_seed(3)
    model = EquiformerV2(**SMALL, **options).double()
    scatter_weights(model)
    return Potential(model).requires_grad_(False).eval()


def test_basis_is_orthonormal_and_that_of_the_harmonics():
    basis = symmetric_basis().flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64))
    u = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
    harmonics = o3.spherical_harmonics(2, u, True, normalization="integral")
    products = (u[:, :, None] * u[:, None]).flatten(1) @ basis.T
    torch.testing.assert_close(harmonics, np.sqrt(15 / (8 * np.pi)) * products[:, 1:])
    torch.testing.assert_close(
        symmetric_tensor(torch.eye(6, dtype=torch.float64)).flatten(1), basis
    )


def loops(head: Rank2Stress, x, vectors, edge_index, batch, n_graphs):
    """The published head in loops over edges, atoms and structures."""
    harmonics = o3.spherical_harmonics(list(range(head.lmax + 1)), vectors, False)
    harmonics = head.harmonics_norm(harmonics[..., None])[..., 0]
    incoming = [[] for _ in range(len(x))]
    for e, (j, i) in enumerate(edge_index.T.tolist()):
        features = torch.cat([x[j], x[i]], dim=1) if head.source_and_target else x[i]
        weights = head.edge_norm((harmonics[e][:, None] * features).sum(dim=0))
        if head.decompose:
            y2 = o3.spherical_harmonics(2, vectors[e], True)
            components = torch.cat([torch.ones(1, dtype=x.dtype), y2])
        else:
            components = torch.outer(vectors[e], vectors[e]).flatten()
        incoming[i].append(components[:, None] * weights)

    def network(rows):
        if head.tensor is not None:
            return head.tensor(rows)[:, 0]
        return torch.cat([head.trace(rows[:1]), head.traceless(rows[1:])])[:, 0]

    shape = (6 if head.decompose else 9, head.edge_norm.weight.numel())
    atoms = []
    for rows in incoming:
        if head.edge_level:
            found = sum((network(row) for row in rows), x.new_zeros(shape[0]))
            atoms.append(found / max(len(rows), 1))
        else:
            atoms.append(network(sum(rows, x.new_zeros(shape)) / max(len(rows), 1)))
    result = []
    for graph in range(n_graphs):
        own = torch.stack([atoms[i] for i in range(len(x)) if batch[i] == graph])
        pooled = own.sum(dim=0) if head.extensive else own.mean(dim=0)
        if head.decompose:
            pooled = (pooled / head.divisor) @ symmetric_basis().flatten(1)
        result.append(pooled.reshape(3, 3))
    return torch.stack(result)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_published_head_is_what_loops_over_edges_give(options):
    torch.manual_seed(1)
    depth, divisor = (3, 1.0) if options["extensive"] else (1, 1.0)
    if options["decompose"] and options["extensive"]:
        divisor = 7.0
    head = Rank2Stress(2, 3, "layer_norm_sh", num_layers=depth, divisor=divisor, **options).double()
    scatter_weights(head)
    edge_index = torch.tensor([[1, 2, 0, 2, 4], [0, 0, 1, 1, 3]])  # atoms 2 and 4 receive nothing
    batch = torch.tensor([0, 0, 0, 1, 1])
    vectors = 2 * torch.randn(5, 3, dtype=torch.float64)
    x = torch.randn(5, 9, 3, dtype=torch.float64)
    arguments = (x, vectors, edge_index, batch, 2)
    torch.testing.assert_close(head(*arguments), loops(head, *arguments), atol=EXACT, rtol=0)


def test_our_head_turns_with_the_structure():
    for forces in (True, False):
        model = EquiformerV2(**SMALL, direct_forces=forces, stress_head="equivariant")
        results = validate_model(
            model.double(),
            elements=["Mg", "O"],
            structures=[rattled_crystal(), rattled_molecule()],
            only=["rotation", "permutation", "supercell extensivity", "batch equals single"],
        )
        assert all(result.passed for result in results)


def test_published_head_turns_in_its_trace_alone():
    potential = potential_of(direct_forces=True, stress_head=RANK_2)
    atoms, turned = rattled_crystal(), rattled_crystal()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    before, after = (
        potential(potential.build_graph(a), ("stress",))["stress"] for a in (atoms, turned)
    )
    trace = [float(s.diagonal(dim1=1, dim2=2).sum()) for s in (before, after)]
    assert trace[0] == pytest.approx(trace[1], rel=1e-9)
    rotation = torch.tensor(np.linalg.solve(atoms.cell.array, turned.cell.array))
    difference = after - rotation.T @ before @ rotation
    assert float(difference.abs().max()) > 1e-3 * float(before.abs().max())


def test_that_is_said_once(caplog):
    heads._say_it_is_not_equivariant.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Rank2Stress(2, 3, "layer_norm_sh")
        EquivariantStress(2, 3, 4)
    assert len(caplog.records) == 1
    assert "stress_head: equivariant" in caplog.text


@pytest.mark.parametrize("stress_head", ["equivariant", RANK_2, {"extensive": True}], ids=str)
@pytest.mark.parametrize("direct_forces", [False, True])
def test_a_stress_that_a_model_returns_is_taken(stress_head, direct_forces, tmp_path):
    potential = potential_of(direct_forces=direct_forces, stress_head=stress_head)
    assert potential.gives_stress
    graph = potential.build_graph([rattled_crystal(), rattled_crystal()])
    found = potential(graph, ("energy", "forces", "stress"))
    torch.testing.assert_close(found["stress"], potential.model(graph)["stress"])
    save_potential(potential, tmp_path)
    again = load_potential(tmp_path)
    again_found = again(graph, ("energy", "forces", "stress"))
    for key, value in found.items():
        torch.testing.assert_close(again_found[key], value)
    with pytest.raises(ValueError, match="volume"):
        potential(potential.build_graph(rattled_molecule()), ("stress",))
    with pytest.raises(ValueError, match="head"):
        Potential(potential.model, terms=[ZBL()])


def test_calculator_has_it_in_ase_s_order_and_the_cell_relaxes():
    potential = potential_of(direct_forces=True, stress_head="equivariant")
    atoms = rattled_crystal()
    atoms.calc = AtomeqCalculator(potential)
    expected = potential(potential.build_graph(atoms), ("stress",))["stress"][0].detach().numpy()
    order = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    np.testing.assert_allclose(atoms.get_stress(), [expected[pair] for pair in order], rtol=1e-12)
    (outcome,) = relax([atoms], potential, cell=FrechetCell(), max_steps=2)
    assert not np.allclose(outcome.graph.cell[0].numpy(), atoms.cell.array)
    without = AtomeqCalculator(potential_of(direct_forces=True))
    with pytest.raises(NotImplementedError, match="none for the stress"):
        without.get_property("stress", atoms)


def test_trace_and_rest_are_put_to_scale_apart():
    potential = potential_of(direct_forces=True, stress_head="equivariant")
    graph = potential.build_graph(rattled_crystal())
    raw = potential.model(graph)["stress"]
    offset = torch.arange(9, dtype=torch.float64).reshape(3, 3)
    potential.references = AtomicReferences(stress_scale=(2.0, 3.0), stress_offset=offset)
    mean = raw.diagonal(dim1=1, dim2=2).mean() * torch.eye(3, dtype=torch.float64)
    expected = 2 * mean + 3 * (raw - mean) + offset
    torch.testing.assert_close(potential(graph, ("stress",))["stress"], expected)


def test_derivatives_take_a_scale_of_their_own_where_a_file_says_so():
    potential = potential_of()
    graph = potential.build_graph(rattled_crystal())
    ordinary = potential(graph, ("energy", "forces", "stress"))
    potential.references = AtomicReferences(scale=2.0)
    scaled = potential(graph, ("energy", "forces", "stress"))
    assert not potential.references.rescales_derivatives
    potential.references = AtomicReferences(scale=2.0, force_scale=3.0, stress_scale=(5.0, 5.0))
    apart = potential(graph, ("energy", "forces", "stress"))
    assert potential.references.rescales_derivatives
    for key, factor in (("energy", 2.0), ("forces", 3.0), ("stress", 5.0)):
        torch.testing.assert_close(scaled[key], 2 * ordinary[key])
        torch.testing.assert_close(apart[key], factor * ordinary[key])


def test_both_heads_learn():
    for stress_head in ("equivariant", RANK_2):
        potential = potential_of(direct_forces=True, stress_head=stress_head).train()
        potential.requires_grad_(True)
        graph = potential.build_graph(rattled_crystal())
        potential(graph, ("stress",))["stress"].square().sum().backward()
        gradients = [parameter.grad for parameter in potential.model.stress.parameters()]
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


LONELY = {
    "an atom alone": Atoms("Mg", cell=[20, 20, 20], pbc=True),
    "the last atom without edges": Atoms(
        "MgOMg", [[0, 0, 0], [2, 0, 0], [10, 10, 10]], cell=[20, 20, 20], pbc=True
    ),
    "a pair": Atoms("MgO", [[0, 0, 0], [2, 0, 0]], cell=[20, 20, 20], pbc=True),
}


@pytest.mark.parametrize("stress_head", ["equivariant", RANK_2, {}], ids=str)
@pytest.mark.parametrize("name", LONELY)
def test_few_edges_are_as_good_as_many(name, stress_head):
    potential = potential_of(direct_forces=True, stress_head=stress_head)
    keys = ("energy", "forces", "stress")
    alone = potential(potential.build_graph(LONELY[name]), keys)
    batch = potential(potential.build_graph([rattled_crystal(), LONELY[name]]), keys)
    for key in keys:
        assert torch.isfinite(alone[key]).all()
        rows = batch[key][-len(alone[key]) :]
        torch.testing.assert_close(rows, alone[key], atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("stress_head", ["equivariant", RANK_2, {}], ids=str)
def test_one_edge_is_a_graph(stress_head):
    potential = potential_of(direct_forces=True, stress_head=stress_head)
    graph = potential.build_graph(LONELY["a pair"])
    one = graph.replace(edge_index=graph.edge_index[:, :1], cell_offsets=graph.cell_offsets[:1])
    assert all(torch.isfinite(x).all() for x in potential(one, ("forces", "stress")).values())


def test_low_degrees_have_no_stress_and_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="degree 2"):
        EquiformerV2(**{**SMALL, "lmax": 1}, stress_head="equivariant")
    with pytest.raises(ValueError, match="energy_reduce"):
        EquiformerV2(**SMALL, energy_reduce="median")
    with pytest.raises(TypeError, match="colour"):
        EquiformerV2(**SMALL, stress_head={"colour": True})


@pytest.mark.parametrize(
    ("layers", "lmax", "mmax", "expected"),
    [(8, 4, 2, 31_207_434), (10, 6, 4, 86_589_068), (20, 6, 3, 153_769_868)],
)
def test_published_sizes_have_their_number_of_parameters(layers, lmax, mmax, expected):
    config = {
        "backbone": {
            "model": "equiformer_v2_backbone", "max_num_elements": 96, "num_layers": layers,
            "lmax_list": [lmax], "mmax_list": [mmax], "attn_hidden_channels": 64,
            "attn_alpha_channels": 64, "ffn_hidden_channels": 128, "norm_type": "layer_norm_sh",
            "grid_resolution": 18, "use_grid_mlp": True,
        },
        "heads": {
            "energy": {"module": "equiformer_v2_energy_head"},
            "forces": {"module": "equiformer_v2_force_head"},
            "stress": {
                "module": "rank2_symmetric_head", "decompose": True,
                "use_source_target_embedding": True,
            },
        },
    }  # fmt: skip
    with torch.device("meta"):
        model = build_official("hydra", json.loads(json.dumps(config)))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
