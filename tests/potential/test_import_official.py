"""Published checkpoints of both layouts become potentials, and nothing in them runs."""

import builtins
import json
import os
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from golden_cases import GOLDEN, SLAB
from safetensors.torch import load_file

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.import_official import convert_checkpoint
from atomeq.potential.official_names import OfficialError, build_official

CONFIG = json.loads((SLAB / "case.json").read_text())["config"]
WEIGHTS = load_file(SLAB / "weights.safetensors")
MEAN, RMSD = -0.7554450631141663, 2.887317180633545


def buffers() -> dict[str, torch.Tensor]:
    """A few of the thousands of buffers that real checkpoints hold."""
    return {
        "SO3_rotation.0.mapping.l_harmonic": torch.arange(19),
        "mappingReduced.to_m": torch.eye(19),
        "SO3_grid.4.2.to_grid_mat": torch.zeros(18, 18, 19),
        "blocks.0.norm_1.balance_degree_weight": torch.ones(24, 1),
        "blocks.0.ga.proj.expand_index": torch.zeros(25, dtype=torch.int64),
    }


def legacy() -> dict:
    """The layout of the Open Catalyst Project's published files."""
    weights = {f"module.module.{k}": v for k, v in (WEIGHTS | buffers()).items()}
    normalizers = {
        "target": {"mean": torch.tensor(MEAN), "std": torch.tensor(RMSD)},
        "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(RMSD)},
    }
    return {
        "epoch": 0.5,
        "step": np.float64(10.0),  # numpy scalars stand in real files
        "state_dict": weights,
        "normalizers": normalizers,
        "config": {
            "model": "equiformer_v2",
            "model_attributes": CONFIG,
            "task": {"dataset": "trajectory_lmdb"},
            "dataset": {"normalize_labels": True, "target_mean": MEAN},
        },
        "ema": None,
    }


def current() -> dict:
    """The layout of fairchem 1.x, the model split into backbone and heads."""
    heads = {"energy_block": "output_heads.energy.", "force_block": "output_heads.forces."}
    weights = {}
    for name, tensor in (WEIGHTS | buffers()).items():
        prefix = heads.get(name.split(".")[0], "backbone.")
        weights[f"module.{prefix}{name}"] = tensor
    backbone = {k: v for k, v in CONFIG.items() if k != "regress_forces"}
    shift = torch.zeros(119, dtype=torch.float64)
    shift[78] = -1.5
    return {
        "state_dict": weights,
        "normalizers": {
            "energy": {"mean": torch.tensor([MEAN]), "rmsd": torch.tensor([RMSD])},
            "forces": {"mean": torch.tensor([0.0]), "rmsd": torch.tensor([0.5])},
        },
        "elementrefs": {"energy": {"element_references": shift}},
        "config": {
            "model": {
                "name": "hydra",
                "backbone": {"model": "equiformer_v2_backbone", **backbone},
                "heads": {
                    "energy": {"module": "equiformer_v2_energy_head"},
                    "forces": {"module": "equiformer_v2_force_head"},
                },
            },
        },
    }


@pytest.fixture
def slab() -> Atoms:
    """The case's structure."""
    inputs = load_file(SLAB / "inputs.safetensors")
    return Atoms(
        numbers=inputs["atomic_numbers"].numpy(),
        positions=inputs["pos"].double().numpy(),
        cell=inputs["cell"][0].double().numpy(),
        pbc=True,
    )


def converted(document: dict, tmp_path, **options):
    torch.save(document, tmp_path / "checkpoint.pt")
    return convert_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "potential", **options)


@pytest.mark.golden
def test_legacy_checkpoint_gives_the_published_energy(slab, tmp_path):
    folder = GOLDEN / "oc20_models" / "checkpoint_legacy"
    expected = json.loads((folder / "ocpcalculator_result.json").read_text())
    slab.calc = AtomeqCalculator(converted(legacy(), tmp_path))
    assert slab.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-6)
    # The published forces know the roll of the frame they were computed in, to 1e-5 of 0.5.
    np.testing.assert_allclose(slab.get_forces(), expected["forces"], rtol=0, atol=1e-4)
    energies = slab.calc.results.get("energies")
    assert energies is None or energies.sum() == pytest.approx(expected["energy"], abs=1e-6)


def test_both_layouts_hold_the_same_network(slab, tmp_path):
    old = load_potential(converted(legacy(), tmp_path))
    new = load_potential(converted(current(), tmp_path))
    for name, tensor in old.model.state_dict().items():
        assert torch.equal(tensor, new.model.state_dict()[name])
    graph = old.build_graph(slab)
    difference = new(graph)["energy"] - old(graph)["energy"]
    assert float(difference) == pytest.approx(-1.5 * int((graph.atomic_numbers == 78).sum()))
    ratio = new(graph)["forces"] / old(graph)["forces"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5 / RMSD))


def test_running_average_is_taken_on_request(tmp_path):
    document = legacy()
    names = [k for k in WEIGHTS if "offset" not in k]
    document["ema"] = {"decay": 0.999, "shadow_params": [WEIGHTS[k] + 1.0 for k in names]}
    plain = load_potential(converted(document, tmp_path)).model
    averaged = load_potential(converted(document, tmp_path, use_ema=True)).model
    for name, parameter in plain.named_parameters():
        assert torch.equal(averaged.get_parameter(name), parameter + 1.0)
    document["ema"]["shadow_params"].pop()
    with pytest.raises(OfficialError, match="other parameters"):
        converted(document, tmp_path, use_ema=True)
    with pytest.raises(OfficialError, match="no running average"):
        converted(legacy(), tmp_path, use_ema=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["config"]["model_attributes"].update(use_magic=True), "use_magic=True"),
        (lambda d: d["config"].update(model="gemnet_oc"), "gemnet_oc"),
        (lambda d: d["config"]["model_attributes"].update(use_s2_act_attn=True), "use_s2_act_attn"),
        (lambda d: d["state_dict"].update({"extra.weight": torch.ones(2)}), r"extra.weight \(2,\)"),
        (lambda d: d["state_dict"].popitem() and d["state_dict"].pop(
            "module.module.sphere_embedding.weight"), "missing embedding.weight"),
        (lambda d: d["normalizers"].update(bandgap={"mean": 0.0, "rmsd": 1.0}), "bandgap"),
        (lambda d: d.update(normalizers={}), "no normalizers"),
        (lambda d: d["normalizers"]["grad_target"].update(mean=torch.tensor(0.1)), "forces"),
        (lambda d: d.pop("config"), "lacks config"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused_by_name(change, named, tmp_path):
    document = legacy()
    document["config"] = {**document["config"], "model_attributes": dict(CONFIG)}
    change(document)
    with pytest.raises(OfficialError, match=named):
        converted(document, tmp_path)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        Malicious(builtins.eval, "open('ran', 'w')"),
        Malicious(os.system, "touch ran"),
        Malicious(torch.load, "ran"),
    ],
    ids=["eval", "system", "load"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_runs(payload, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = {**legacy(), "val_metrics": payload}
    torch.save(document, "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(OfficialError, match="cannot be read without running"):
        convert_checkpoint("checkpoint.pt", "potential")
    assert not os.path.exists("ran")
    assert not os.path.exists("potential")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"not a pickle")
    with pytest.raises(OfficialError, match=r"x\.pt"):
        convert_checkpoint(path, tmp_path / "p")
    path.write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(OfficialError, match=r"x\.pt"):
        convert_checkpoint(path, tmp_path / "p")


def test_verb_writes_a_folder_with_a_card(tmp_path, capsys):
    torch.save(legacy(), tmp_path / "checkpoint.pt")
    out = tmp_path / "out"
    main(["convert", str(tmp_path / "checkpoint.pt"), str(out), "--grid-resolution", "24"])
    assert "171,202 parameters" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "171,202 parameters" in card
    assert "max_neighbors=20" in card
    potential = load_potential(out)
    assert potential.model.config()["init_args"]["grid_resolution"] == 24


def test_card_says_that_a_network_never_saw_periodic_images(tmp_path):
    document = legacy()
    assert "periodic images where" in (converted(document, tmp_path) / "README.md").read_text()
    attributes = {**CONFIG, "use_pbc": False}
    document["config"] = {**document["config"], "model_attributes": attributes}
    card = (converted(document, tmp_path) / "README.md").read_text()
    assert "trained without periodic images" in card


def test_options_of_published_runs_become_ours(slab, tmp_path):
    """Energy alone, neighbours that tie, and how weights once began."""
    document = legacy()
    document["state_dict"] = {
        name: tensor for name, tensor in document["state_dict"].items() if "force_block" not in name
    }
    changes = {
        "regress_forces": False,
        "enforce_max_neighbors_strictly": False,
        "weight_init": "normal",
    }
    document["config"] = {**document["config"], "model_attributes": {**CONFIG, **changes}}
    potential = load_potential(converted(document, tmp_path))
    assert potential.conservative
    assert potential.model.outputs == {"energies"}
    builder = potential.model.graph_builder()
    assert "strict=False" in repr(builder)
    whole = load_potential(converted(legacy(), tmp_path))
    graph = whole.build_graph(slab)
    assert torch.equal(potential(graph, ("energy",))["energy"], whole(graph)["energy"])


def test_published_sizes():
    """The number of parameters of eq2_31M_ec4_allmd and of eSCN L6M2, 12 layers."""
    large = {
        **CONFIG, "num_layers": 8, "sphere_channels": 128, "attn_hidden_channels": 64,
        "num_heads": 8, "attn_alpha_channels": 64, "attn_value_channels": 16,
        "ffn_hidden_channels": 128, "edge_channels": 128,
    }  # fmt: skip
    for forces, count in ((True, 31_058_690), (False, 27_929_345)):
        model = build_official("equiformer_v2", {**large, "regress_forces": forces})
        assert sum(p.numel() for p in model.parameters()) == count
