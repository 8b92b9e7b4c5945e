"""A fit on an OC20 LMDB from its YAML to the metrics in the table, and fine-tuning from its end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from golden_cases import SLAB, published_checkpoint
from oc20 import slab_frames

from atomeq.cli import main
from atomeq.data.oc20_datamodule import graph_of_frames
from atomeq.data.oc20_write import write_lmdb
from atomeq.potential.checkpoint import load_potential

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "experiment"
LARGEST_CHANGE = 1e-3  # AdamW moves a weight by its learning rate, 5e-5, in each of a few steps
MODEL = {
    "class_path": "atomeq.models.egnn.EGNN",
    "init_args": {"cutoff": 4.0, "num_layers": 1, "hidden_channels": 8},
}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    for name, is2re in (("s2ef", False), ("is2re", True)):
        write_lmdb(tmp_path / f"{name}.lmdb", slab_frames(6, is2re=is2re), "stored")
    data = str(tmp_path / "s2ef.lmdb")
    document = {
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path / "run"),
        },
        "model": {
            "model": MODEL,
            "loss": {
                "energy": 2.0,
                "forces": 100.0,
                "kind": "l2mae",
                "energy_per": "structure",
                "free_atoms_only": True,
            },
            "metrics": {"class_path": "atomeq.training.oc20_metrics.OC20Errors"},
        },
        "data": {
            "class_path": "atomeq.data.oc20_datamodule.OC20DataModule",
            "init_args": {"train": data, "val": data, "test": {"id": data}, "max_structures": 2},
        },
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_from_an_lmdb_to_oc20s_metrics(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["fit", "-c", str(experiment)])
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    main(["test", "-c", str(experiment), f"--ckpt_path={checkpoint}"])
    assert "EFwT" in capsys.readouterr().out
    errors = json.loads((tmp_path / "run/test_errors.json").read_text())["id"]
    assert {"energy_mae", "forces_mae", "forces_cosine", "efwt", "ewt"} <= set(errors)

    out = tmp_path / "is2re.json"
    command = [
        "is2re",
        str(tmp_path / "is2re.lmdb"),
        "--potential",
        str(tmp_path / "run/potential"),
    ]
    main([*command, "--out", str(out), "--max-steps=2", "--limit=3"])
    results = json.loads(out.read_text())
    assert len(results["systems"]) == 3
    assert {"energy MAE, eV", "EwT", "ADwT"} <= set(results["metrics"])


def test_fine_tuning_starts_from_the_weights_it_is_given(experiment: Path, tmp_path: Path):
    main(["fit", "-c", str(experiment)])
    start = tmp_path / "run/potential"
    words = ["fit", "-c", str(experiment), f"--trainer.default_root_dir={tmp_path / 'tuned'}"]
    tuning = [f"--model.start_from={start}", "--trainer.max_epochs=1", "--model.references=none"]
    main([*words, *tuning, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.0"])
    before, after = load_potential(start), load_potential(tmp_path / "tuned/potential")
    for part in ("model", "references"):  # the uncertainty is fitted anew, up to rounding
        kept = getattr(after, part).state_dict()
        for name, weight in getattr(before, part).state_dict().items():
            assert torch.equal(weight, kept[name]), name


def test_fine_tuning_of_another_model_is_refused(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["fit", "-c", str(experiment)])
    words = [f"--model.start_from={tmp_path / 'run/potential'}", "--trainer.max_epochs=1"]
    words += ["--overwrite", "--model.model.init_args.hidden_channels=16"]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "-c", str(experiment), *words])
    assert exit_.value.code == 2
    assert "do not fit the EGNN" in capsys.readouterr().err


@pytest.mark.golden
def test_fine_tuning_of_a_converted_checkpoint(tmp_path: Path):
    torch.save(published_checkpoint(SLAB), tmp_path / "published.pt")
    start, run = tmp_path / "converted", tmp_path / "run"
    main(["convert", str(tmp_path / "published.pt"), str(start)])
    before = load_potential(start)
    node = tmp_path / "model.yaml"
    node.write_text(yaml.safe_dump(before.model.config()))
    write_lmdb(tmp_path / "s2ef.lmdb", slab_frames(4), "referenced")
    data = str(tmp_path / "s2ef.lmdb")
    words = ["fit", "-c", str(CONFIGS / "oc20_finetune_equiformer_v2_31m.yaml")]
    words += [f"--model.model={node}", f"--model.start_from={start}", f"--data.train={data}"]
    words += [f"--data.val={data}", f"--trainer.default_root_dir={run}"]
    main([*words, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"])
    after = load_potential(run / "potential")
    assert after.model.config() == before.model.config()
    assert float(after.references.scale) == float(before.references.scale)
    assert float(after.references.offset) == pytest.approx(-0.75)
    frames = graph_of_frames(slab_frames(1))
    energies = [float(p(p.build_graph(frames))["energy"]) for p in (before, after)]
    assert energies[0] != energies[1]
    changes = [
        float((old - new).abs().max())
        for old, new in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert 0 < max(changes) < LARGEST_CHANGE


def test_is2re_is_trained_on_relaxed_energies(experiment: Path, tmp_path: Path):
    data = str(tmp_path / "is2re.lmdb")
    main(
        [
            *("fit", "-c", str(experiment), "--model.loss.forces=0", "--model.scale=energy"),
            *(f"--data.train={data}", f"--data.val={data}", "--trainer.max_epochs=1"),
        ]
    )
    potential = load_potential(tmp_path / "run/potential")
    energies = [frame.relaxed_energy for frame in slab_frames(6, is2re=True)]
    assert np.isfinite(energies).all()
    assert potential.elements == (1, 6, 8, 29, 47, 78)
