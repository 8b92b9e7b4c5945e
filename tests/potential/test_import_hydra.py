"""Published checkpoints in parts: backbone and heads by name, references, stress, denoising."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read
from golden_cases import GOLDEN, case_graph
from safetensors.torch import load_file

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.graph.builders import NearestNeighborGraph
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.convert import convert_checkpoint
from atomeq.potential.import_official import official_potential, read_official
from atomeq.potential.official_names import OfficialError, build_official, official_weights

MATERIALS = GOLDEN / "materials_models"
CHECKPOINTS = MATERIALS / "checkpoint_omat"
OMAT, DENS = MATERIALS / "omat_p1_alloy_L4M2", MATERIALS / "omat_p3_dens_L2M2"
FLOAT32 = 3e-5  # of numbers up to three
RESULTS = {"fake_omat": OMAT, "fake_omat_dens": DENS}


def results(name: str) -> dict:
    return json.loads((CHECKPOINTS / f"{name}_ocpcalculator.json").read_text())


def config(case: Path) -> dict:
    return json.loads((case / "case.json").read_text())["config"]


def document(name: str) -> dict:
    """A file in the layout of OMat24's, of a case's weights and the numbers of its results."""
    case, given = RESULTS[name], results(name)
    weights = load_file(case / "weights.safetensors")
    references = torch.zeros(119)
    for number, energy in given["element_references_nonzero"].items():
        references[int(number)] = energy
    targets = {"forces": {"mean": 0.0}, "stress_isotropic": {}, "stress_anisotropic": {}}
    return {
        "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "normalizers": {
            title: {key: torch.tensor(value) for key, value in numbers.items()}
            for title, numbers in given["normalizers"].items()
        },
        "elementrefs": {"energy": {"element_references": references}},
        "config": {
            "model": copy.deepcopy(config(case)),
            "dataset": {
                "src": ["omat24/train/rattled-1000"],
                "transforms": {
                    "normalizer": {"fit": {"targets": targets, "fitted": True}},
                    "element_references": {"fit": {"targets": ["energy"], "fitted": True}},
                },
            },
        },
    }


def saved(document: dict, tmp_path: Path) -> Path:
    torch.save(document, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def structure(name: str) -> Atoms:
    given = results(name)
    return Atoms(
        numbers=given["numbers"], positions=given["positions"], cell=given["cell"], pbc=given["pbc"]
    )


@pytest.fixture(params=RESULTS)
def checkpoint(request, tmp_path) -> Path:
    """The files as published: DeNS's own, and OMat24's put together again."""
    if request.param == "fake_omat_dens":
        return CHECKPOINTS / "fake_omat_dens.pt"
    return saved(document(request.param), tmp_path).rename(tmp_path / "fake_omat.pt")


@pytest.mark.golden
def test_converted_file_gives_what_its_own_code_gives(checkpoint):
    """With the reference's roll of the frames, in which its grids on the sphere are not exact."""
    given, case = results(checkpoint.stem), RESULTS[checkpoint.stem]
    potential = official_potential(read_official(checkpoint))
    rotation = load_file(case / "inputs.safetensors")["edge_rot_mat"]
    forward = potential.model.forward
    potential.model.forward = lambda graph: forward(graph, edge_rotation=rotation)
    inputs = load_file(case / "inputs.safetensors")
    graph = potential.build_graph(structure(checkpoint.stem)).replace(
        edge_index=inputs["edge_index"], cell_offsets=inputs["cell_offsets"].long()
    )
    found = potential(graph, ("energy", "forces", "stress"))
    assert float(found["energy"]) == pytest.approx(given["energy"], rel=1e-6)
    np.testing.assert_allclose(found["forces"], given["forces"], atol=FLOAT32)
    np.testing.assert_allclose(found["stress"][0], given["stress_results"], atol=FLOAT32)


@pytest.mark.golden
def test_it_is_a_calculator_with_a_stress_and_the_cell_relaxes(checkpoint, tmp_path, capsys):
    given, atoms = results(checkpoint.stem), structure(checkpoint.stem)
    atoms.write(tmp_path / "in.xyz")
    out = tmp_path / "converted"
    main(["convert", str(checkpoint), str(out)])
    assert "EquiformerV2 with" in capsys.readouterr().out
    options = [str(tmp_path / "in.xyz"), "--potential", str(out)]
    main(["single-point", *options, "--out", str(tmp_path / "single.extxyz")])
    single = read(tmp_path / "single.extxyz")
    # The roll of the edge frames is random in the reference: 1 % of DeNS's grids of 10 points.
    gauge = json.loads((RESULTS[checkpoint.stem] / "case.json").read_text())["random_gauge_f32"]
    scale = given["normalizers"]["forces"]["rmsd"]
    allowed = 3 * scale * gauge["forces"]["maxdev"] + FLOAT32
    assert single.get_potential_energy() == pytest.approx(given["energy"], abs=1e-4)
    np.testing.assert_allclose(single.get_forces(), given["forces"], rtol=0, atol=allowed)
    np.testing.assert_allclose(
        single.get_stress(), given["get_stress_voigt"], rtol=0, atol=1e-4 * scale
    )
    words = [*options, "--cell", "--max-steps", "2", "--out", str(tmp_path / "relaxed.extxyz")]
    with pytest.raises(SystemExit, match="1"):  # two steps do not converge it
        main(["relax", *words])
    assert not np.allclose(read(tmp_path / "relaxed.extxyz").cell, atoms.cell)


def test_card_tells_the_energy_the_stress_and_the_data(tmp_path):
    folder = convert_checkpoint(saved(document("fake_omat"), tmp_path), tmp_path / "omat")
    card = (folder / "README.md").read_text()
    for words in ("total energy", "a head of its own, · 0.115", "rattled-1000", "rank2_symmetric"):
        assert words in card
    assert "OC20" not in card
    atoms = structure("fake_omat")
    atoms.calc = AtomeqCalculator(folder, dtype="float64")
    assert set(atoms.calc.implemented_properties) >= {"stress", "forces"}
    assert "hessian" not in atoms.calc.implemented_properties


def heads_named(energy: str, forces: str, stress: str, *, backbone: str) -> dict:
    """The configuration of the first case in other words."""
    node = copy.deepcopy(config(OMAT))
    options = node["heads"]["stress"]
    node["backbone"]["model"] = backbone
    node["heads"] = {
        "a": {**options, "module": stress},
        "b": {"module": energy, "reduce": "sum"},
        "c": {"module": forces},
    }
    return node


NAMES = [
    ("equiformer_v2_energy_head", "equiformer_v2_force_head", "rank2_symmetric_head"),
    ("equiformerV2_scalar_head", "equiformerV2_vector_head", "rank2_symmetric_head"),
    ("eqV2_DeNS_scalar_head", "eqV2_DeNS_vector_head", "dens_rank2_symmetric_head"),
    ("equiformer_v2_dens_energy_head", "equiformer_v2_dens_force_head", "DeNSRank2Head"),
    ("a.b.EqV2ScalarHead", "a.b.EqV2VectorHead", "a.b.Rank2SymmetricTensorHead"),
    ("a.EquiformerV2EnergyHead", "a.EquiformerV2ForceHead", "a.DeNSRank2Head"),
    ("a.DeNSScalarHead", "a.DeNSVectorHead", "DeNSRank2Head"),
    ("a.DeNSEnergyHead", "a.DeNSForceHead", "DeNSRank2Head"),
]


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("backbone", ["equiformer_v2_backbone", "x.y.EquiformerV2Backbone"])
def test_heads_are_known_by_all_their_names_and_named_freely(names, backbone):
    expected = build_official("hydra", config(OMAT))
    model = build_official("hydra", heads_named(*names, backbone=backbone))
    assert model.config() == expected.config()
    weights = load_file(OMAT / "weights.safetensors")
    renamed = {
        name.replace("heads.stress", "heads.a").replace("heads.energy", "heads.b").replace(
            "heads.forces", "heads.c").replace("energy_block", "scalar_block").replace(
            "force_block", "vector_block" if "DeNSVector" in names[1] else "force_block"
        ): tensor
        for name, tensor in weights.items()
    }  # fmt: skip
    prefixed = {f"module.{name}": tensor for name, tensor in renamed.items()}
    found, other = official_weights(model, prefixed), official_weights(expected, weights)
    assert found.keys() == other.keys()
    assert all(torch.equal(found[name], other[name]) for name in found)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module."])
def test_prefixes_of_parallel_and_compiled_training_go(prefix):
    model = build_official("hydra", config(DENS))
    weights = load_file(DENS / "weights.safetensors")
    found = official_weights(model, {prefix + name: tensor for name, tensor in weights.items()})
    assert found.keys() == model.state_dict().keys()


def test_options_of_parts_are_those_of_our_classes():
    node = config(OMAT)
    node["heads"]["energy"]["reduce"] = "mean"
    node["heads"]["stress"] |= {
        "edge_level_mlp": True, "num_mlp_layers": 3, "extensive": True, "avg_num_nodes": 31.17,
        "default_norm_type": "rms_norm_sh",
    }  # fmt: skip
    model = build_official("hydra", node)
    assert isinstance(model, EquiformerV2)
    assert model.energy_reduce == "mean"
    assert model.stress_head == {
        "decompose": True, "edge_level": True, "num_layers": 3, "source_and_target": True,
        "extensive": True, "divisor": 31.17,
    }  # fmt: skip
    assert model.graph_builder() == NearestNeighborGraph(12.0, 20, strict=False)
    assert model.energy_divisor == 31.17
    assert model.avg_degree == 61.95
    node["heads"].pop("forces")
    assert build_official("hydra", node).outputs == {"energies", "stress"}


def test_biases_of_denoising_are_folded_and_the_rest_is_left_out():
    node = config(DENS)
    weights = load_file(DENS / "weights.safetensors")
    weights["backbone.noise_schedule_sigma_embedding.weight"] = torch.ones(16, 1)
    weights["backbone.noise_schedule_sigma_embedding.bias"] = torch.full((16,), 0.25)
    found = official_weights(build_official("hydra", node), weights)
    expected = weights["backbone.sphere_embedding.weight"].double() + 0.25
    expected = expected + weights["backbone.force_embedding.bias"]
    torch.testing.assert_close(found["embedding.weight"], expected, rtol=0, atol=1e-15)
    assert not any("denoising" in name or "force_embedding" in name for name in found)


def averages(weights: dict, shift: float) -> list[torch.Tensor]:
    return [tensor + shift for name, tensor in weights.items() if not name.endswith("offset")]


def test_running_averages_of_denoising_and_of_heads_alone_are_told_apart(tmp_path):
    given = document("fake_omat_dens")
    weights = given["state_dict"]
    given["ema"] = {"shadow_params": averages(weights, 1.0)}
    averaged = read_official(saved(given, tmp_path), use_ema=True).weights
    for name in ("sphere_embedding.weight", "force_embedding.bias", "vector_block.alpha_dot"):
        original = next(tensor for key, tensor in weights.items() if key.endswith("." + name))
        assert torch.equal(averaged[name], original + 1.0)
    heads = {name: tensor for name, tensor in weights.items() if "output_heads" in name}
    given["ema"] = {"shadow_params": averages(heads, 2.0)}
    with pytest.raises(OfficialError, match="other parameters"):
        read_official(saved(given, tmp_path), use_ema=True)
    given["config"]["model"]["freeze_backbone"] = True
    averaged = read_official(saved(given, tmp_path), use_ema=True).weights
    assert torch.equal(
        averaged["sphere_embedding.weight"], weights["module.backbone.sphere_embedding.weight"]
    )


@pytest.mark.parametrize("decompose", [True, False])
def test_normalizers_of_a_stress_act_where_the_reference_has_them_act(decompose, tmp_path):
    """Trace and rest by themselves where they are predicted so, then the whole by its elements."""
    given = document("fake_omat" if decompose else "fake_omat_dens")
    if not decompose:
        node = given["config"]["model"]
        node["heads"]["stress"]["decompose"] = False
        for name in [name for name in given["state_dict"] if "irrep2_MLP" in name]:
            del given["state_dict"][name]
        given["state_dict"] = {
            name.replace("scalar_MLP", "r2tensor_MLP"): tensor
            for name, tensor in given["state_dict"].items()
        }
    given["normalizers"]["stress"] = {"mean": torch.tensor(0.5), "std": torch.tensor(3.0)}
    potential = official_potential(read_official(saved(given, tmp_path)))
    graph = potential.build_graph(structure("fake_omat" if decompose else "fake_omat_dens"))
    raw = potential.model(graph)["stress"][0].double()
    if decompose:
        # By hand: rows 0 and 4 to 8 of the change of basis, as nine numbers.
        basis = np.zeros((9, 3, 3))
        basis[0] = np.eye(3) / 3**0.5
        for row, (a, b) in {4: (0, 2), 5: (0, 1), 7: (1, 2)}.items():
            basis[row, a, b] = basis[row, b, a] = 0.5**0.5
        basis[6] = np.diag([-1, 2, -1]) / 6**0.5
        basis[8] = np.diag([-1, 0, 1]) / 2**0.5
        parts = np.einsum("kab,ab->k", basis, raw.numpy())
        parts[0] = 0.115 * parts[0] - 0.021
        parts[4:] = 0.042 * parts[4:] + 0.0007
        raw = torch.from_numpy(np.einsum("kab,k->ab", basis, parts))
    expected = (3 * raw + 0.5).numpy()
    found = potential(graph, ("stress",))["stress"][0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def without(document: dict, *path: str) -> dict:
    node = document
    for key in path[:-1]:
        node = node[key]
    node.pop(path[-1])
    return document


def changed(**heads) -> dict:
    given = document("fake_omat")
    given["config"]["model"]["heads"].update(heads)
    return given


REFUSED = {
    "fine-tuning without a backbone": (
        lambda: {
            **document("fake_omat"),
            "config": {"model": {"name": "hydra", "heads": {}, "finetune_config": {
                "starting_checkpoint": "/there/eqV2.pt"}}},
        },
        r"architecture is that of the checkpoint it started from, '/there/eqV2.pt'",
    ),
    "no heads": (lambda: without(document("fake_omat"), "config", "model", "heads"), "heads"),
    "no energy": (
        lambda: without(document("fake_omat"), "config", "model", "heads", "energy"),
        "computes the energy",
    ),
    "two of a kind": (lambda: changed(more={"module": "EqV2ScalarHead"}), "two heads"),
    "another head": (lambda: changed(more={"module": "gemnet_head"}), "head 'more'"),
    "another property": (
        lambda: changed(energy={"module": "EqV2ScalarHead", "output_name": "gap"}), "'gap'"),
    "another option": (
        lambda: changed(energy={"module": "EqV2ScalarHead", "magic": 1}), "head 'energy'.*magic=1"),
    "normalizer lost": (
        lambda: without(document("fake_omat"), "normalizers", "stress_isotropic"),
        "normalizers of stress_isotropic",
    ),
    "references lost": (
        lambda: without(document("fake_omat"), "elementrefs"), "element references of energy"),
    "references of something else": (
        lambda: {**document("fake_omat"), "elementrefs": {"gap": {}}}, "element references"),
    "two heads of one name": (
        lambda: {**document("fake_omat"), "state_dict": {
            **document("fake_omat")["state_dict"],
            "module.output_heads.x.xedge_layer_norm.bias": torch.ones(32)}},
        "one name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_with_the_reason(name, tmp_path):
    make, match = REFUSED[name]
    path = saved(make(), tmp_path)
    with pytest.raises(OfficialError, match=match):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_energy_is_in_the_scale_of_its_normalizer_with_references_behind(tmp_path):
    given = document("fake_omat")
    plain = official_potential(read_official(saved(given, tmp_path)))
    given["normalizers"]["energy"] = {"mean": torch.tensor([0.5]), "rmsd": torch.tensor([1.7])}
    scaled = official_potential(read_official(saved(given, tmp_path)))
    graph = plain.build_graph(structure("fake_omat"))
    references = sum(results("fake_omat")["element_references_nonzero"].values())
    raw = plain(graph, ("energy",))["energy"] - references
    expected = 1.7 * raw + 0.5 + references
    torch.testing.assert_close(scaled(graph, ("energy",))["energy"], expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        scaled(graph, ("forces",))["forces"], plain(graph, ("forces",))["forces"]
    )


def test_numbers_of_a_configuration_count_where_the_file_holds_none(tmp_path):
    given = document("fake_omat")
    transform = given["config"]["dataset"]["transforms"]["normalizer"]
    transform |= {"energy": {"mean": 0.0, "stdev": 1.7}, "forces": {"mean": 0.0, "stdev": 99.0}}
    official = read_official(saved(given, tmp_path))
    assert official.normalizers["energy"] == (0.0, 1.7)
    assert official.normalizers["forces"][1] == pytest.approx(2.9)


def test_what_is_derived_here_alone_is_the_gradient(tmp_path):
    given = document("fake_omat")
    for part in ("forces", "stress"):
        given["config"]["model"]["heads"].pop(part)
    given["state_dict"] = {
        k: v for k, v in given["state_dict"].items() if "heads.f" not in k and "heads.s" not in k
    }
    given["normalizers"]["energy"] = {"mean": torch.tensor(0.0), "rmsd": torch.tensor(1.7)}
    potential = official_potential(read_official(saved(given, tmp_path)))
    assert potential.conservative
    assert not potential.references.rescales_derivatives
    folder = convert_checkpoint(tmp_path / "file.pt", tmp_path / "out")
    assert load_potential(folder).gives_stress


ESCN = GOLDEN / "oc20_models" / "escn_p1_mol_L2M2"


def escn_in_parts(*heads: str, reduce: str = "sum") -> tuple[dict, dict]:
    """eSCN's case as backbone and heads: its configuration, and its weights with buffers."""
    options = {k: v for k, v in config(ESCN).items() if k != "regress_forces"}
    node = {
        "backbone": {"model": "a.b.eSCNBackbone", **options},
        "heads": {
            name: {
                "module": f"escn_{name}_head",
                **({"reduce": reduce} if name == "energy" else {}),
            }
            for name in heads
        },
    }
    weights = {}
    for name, tensor in load_file(ESCN / "weights.safetensors").items():
        part = name.partition("_block.")[0]
        owner = {"energy": "energy", "force": "force"}.get(part)
        inside = f"output_heads.{owner}." if owner in heads else "backbone."
        weights[inside + name] = tensor
    return node, weights


@pytest.mark.golden
def test_escn_in_parts_is_escn():
    whole = build_official("escn", config(ESCN))
    whole.load_state_dict(official_weights(whole, load_file(ESCN / "weights.safetensors")))
    graph = case_graph(ESCN)
    expected = whole(graph)
    for reduce in ("sum", "mean"):
        node, weights = escn_in_parts("energy", "force", reduce=reduce)
        parts = build_official("hydra", node)
        parts.load_state_dict(official_weights(parts, weights))
        found = parts(graph)
        assert torch.equal(found["forces"], expected["forces"])
        factor = 1.0 if reduce == "sum" else 1000 / graph.natoms[graph.batch]
        torch.testing.assert_close(found["energies"], expected["energies"] * factor)


def test_blocks_that_a_backbone_keeps_without_a_head_have_no_use():
    node, weights = escn_in_parts("energy")
    assert any(name.startswith("backbone.force_block") for name in weights)
    model = build_official("hydra", node)
    assert model.outputs == {"energies"}
    assert not any("force" in name for name in official_weights(model, weights))
