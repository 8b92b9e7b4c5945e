"""Checkpoints of eSEN and EquiformerV3: the answers of the published calculators, EMA, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from safetensors.torch import load_file

from atomeq import AtomeqCalculator, load_potential
from atomeq.models.equiformer_v3 import EquiformerV3
from atomeq.models.esen import ESEN
from atomeq.potential.convert import convert_checkpoint
from atomeq.potential.import_official import read_official
from atomeq.potential.official_family import OfficialError
from atomeq.potential.official_names import build_official, official_weights

GOLDEN = Path(__file__).parents[1] / "golden"
ESEN_CASE = GOLDEN / "materials_models" / "esen_p1_batch_L3M2_conservative"
ESEN_ANSWER = GOLDEN / "materials_models" / "checkpoint_omat" / "fake_esen_ocpcalculator.json"
V3_FILE = GOLDEN / "equiformer_v3" / "checkpoint" / "fake_oam_gradient.pt"
V3_ANSWER = V3_FILE.with_name("fake_oam_gradient_ocpcalculator.json")
# of float32 on both sides, whose largest numbers are 37 eV, 5 eV/Å and 0.3 eV/Å³
TOLERANCES = {"energy": 1e-5, "forces": 1e-4, "stress": 1e-5}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def esen_checkpoint(folder: Path) -> Path:
    """The case in the layout of the published files, its normaliser and references as recorded."""
    case, answer = read(ESEN_CASE / "case.json"), read(ESEN_ANSWER)
    references = torch.zeros(119)
    for number, energy in answer["element_references_nonzero"].items():
        references[int(number)] = energy
    scales = {
        name: {key: torch.tensor(value) for key, value in values.items()}
        for name, values in answer["normalizers"].items()
    }
    buffers = {"backbone.Jd_1": torch.eye(3, dtype=torch.float64)}
    document = {
        "state_dict": load_file(ESEN_CASE / "weights.safetensors") | buffers,
        "normalizers": scales,
        "elementrefs": {"energy": {"element_references": references}},
        "config": {"model": case["config"], "trainer": "mlip_trainer"},
    }
    path = folder / "esen.pt"
    torch.save(document, path)
    return path


def answers(folder: Path, recorded: dict[str, Any], structure: dict[str, Any]) -> None:
    """Compare a converted potential with what the published calculator said."""
    atoms = Atoms(
        numbers=structure["numbers"],
        positions=structure["positions"],
        cell=structure["cell"],
        pbc=structure["pbc"],
        calculator=AtomeqCalculator(folder),
    )
    expected = {**recorded, "stress": recorded["stress_results"]}
    found = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(voigt=False),
    }
    for key, tolerance in TOLERANCES.items():
        np.testing.assert_allclose(found[key], expected[key], atol=tolerance, rtol=0)


def test_esen_answers_as_the_published_calculator(tmp_path):
    folder = convert_checkpoint(esen_checkpoint(tmp_path), tmp_path / "esen")
    answers(folder, read(ESEN_ANSWER), read(ESEN_ANSWER))
    potential = load_potential(folder)
    assert isinstance(potential.model, ESEN)
    assert potential.conservative


@pytest.mark.parametrize("use_ema", [False, True], ids=["raw weights", "averaged weights"])
def test_equiformer_v3_answers_as_the_published_calculator(tmp_path, use_ema):
    recorded = read(V3_ANSWER)
    folder = convert_checkpoint(V3_FILE, tmp_path / "v3", use_ema=use_ema)
    answers(folder, recorded["ema_answer"] if use_ema else recorded, recorded)
    assert isinstance(load_potential(folder).model, EquiformerV3)
    energies = recorded["energy"], recorded["ema_answer"]["energy"]
    assert abs(energies[0] - energies[1]) > 0.1  # the test tells them apart


def test_names_of_compiled_and_parallel_training_mean_the_same(tmp_path):
    document = torch.load(V3_FILE, weights_only=True)
    names = {
        name: name.replace("module.", "_orig_mod.module.", 1) for name in document["state_dict"]
    }
    document["state_dict"] = {names[k]: v for k, v in document["state_dict"].items()}
    torch.save(document, tmp_path / "compiled.pt")
    one, other = (read_official(path).weights for path in (V3_FILE, tmp_path / "compiled.pt"))
    assert one.keys() == other.keys()


def test_weights_of_denoising_are_left_out():
    case = GOLDEN / "equiformer_v3" / "eqv3_p2_batch_L3M2_dens_direct"
    published = load_file(case / "weights.safetensors")
    config = read(case / "case.json")["config"]
    model = build_official(config.pop("name"), config)
    taken = official_weights(model, published)
    assert taken.keys() == model.state_dict().keys()
    denoising = [name for name in published if name.startswith(("dens_block.", "force_embedding."))]
    assert len(denoising) > 10
    buffers = [name for name in published if name.endswith("offset")]
    assert len(taken) == len(published) - len(denoising) - len(buffers)
    with pytest.raises(OfficialError, match=r"head\.weight"):
        official_weights(model, {**published, "head.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("equiformer_v3", {"norm_type": "batch_norm"}, "norm_type='batch_norm'"),
        ("equiformer_v3", {"attn_activation": "sep_relu"}, "attn_activation='sep_relu'"),
        ("equiformer_v3", {"use_fourier": True}, "use_fourier=True"),
        ("esen_backbone", {"act_type": "relu"}, "act_type='relu'"),
        ("esen_backbone", {"mlp_type": "mlp"}, "mlp_type='mlp'"),
        ("esen_backbone", {"use_fourier": True}, "use_fourier=True"),
    ],
)
def test_what_is_not_known_is_refused_by_name(name, options, named):
    with torch.device("meta"), pytest.raises(OfficialError, match=named):
        build_official(name, options)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ({"attn_activation": "gate"}, {"activation": "gate"}),
        ({"attn_activation": "sep-merge_s2_swiglu_mem"}, {"activation": "merged_s2_swiglu"}),
        ({"ffn_activation": "sep_s2"}, {"feed_forward": "separable_grid_mlp", "grid_mlp": False}),
        ({"ffn_activation": "s2"}, {"feed_forward": "grid_mlp", "grid_mlp": False}),
        (
            {"ffn_activation": "gate", "use_grid_mlp": False},
            {"feed_forward": "gate", "grid_mlp": False},
        ),
        ({"norm_type": "merge_rms_norm"}, {"norm": "bare_rms_norm_sh", "logit_norm": "rms_norm"}),
        (
            {"norm_type": "sep_layer_norm", "use_attn_renorm": False},
            {"norm": "layer_norm_sh", "logit_norm": "none"},
        ),
        ({"alpha_drop": 0.1}, {"silu_logits": True, "alpha_drop": 0.1}),
        ({"use_gate_force_head": False}, {"force_activation": "separable_s2"}),
    ],
    ids=str,
)
def test_options_of_equiformer_v3(published, ours):
    with torch.device("meta"):
        model: Any = build_official("equiformer_v3", {"num_layers": 1, **published})
    assert {name: getattr(model, name) for name in ours} == ours


def test_options_of_esen():
    heads = {
        "e": {"module": "esen_mlp_energy_head", "reduce": "mean"},
        "f": {"module": "esen_linear_force_head"},
        "s": {"module": "esen_rank2_head", "decompose": True},
    }
    backbone = {"model": "esen_backbone", "distance_function": "bessel", "num_distance_basis": 8}
    with torch.device("meta"):
        model: Any = build_official("hydra", {"backbone": backbone, "heads": heads})
    assert model.outputs == {"energies", "forces", "stress"}
    assert (model.energy_reduce, model.radial_basis) == ("mean", "enveloped_bessel")
    assert (model.activation, model.feed_forward) == ("separable_s2", "grid_mlp")
