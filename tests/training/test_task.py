"""A fit lowers the errors and reports those of its potential; bad set-ups are refused."""

import csv
import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from lightning.pytorch import Trainer

from atomeq.cli import main as command
from atomeq.cli.training import main
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.splits import Split
from atomeq.models.egnn import EGNN
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.potential.checkpoint import load_potential
from atomeq.training.losses import PotentialLoss
from atomeq.training.schedules import RunSchedule, WarmupCosine, WarmupSteps
from atomeq.training.task import AtomisticTask


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics" / "version_0" / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_fit_learns_and_test_reports_it(tmp_path: Path, experiment: Path, capsys):
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=12"])
    run = tmp_path / "run"
    losses = [float(row["val/loss"]) for row in metrics(run) if row["val/loss"]]
    assert min(losses) < 0.2 * losses[0]

    path = str(run / "checkpoints" / "best.ckpt")
    main(["validate", "-c", str(experiment), "--ckpt_path", path])
    main(["test", "-c", str(experiment), "--ckpt_path", path])
    assert "held_out" in capsys.readouterr().out
    errors = json.loads((run / "test_errors.json").read_text())["held_out"]

    # The same numbers from the saved potential, structure by structure.
    data = AtomisticDataModule(train=_train_file(experiment), split=Split(val=0.1, test=0.1))
    potential = load_potential(run / "potential")
    data.use_builder(potential.build_graph)
    data.setup("test")
    graphs = data.test_sets["held_out"].graphs
    differences = torch.cat([potential(graph)["forces"] - graph.forces for graph in graphs])
    rmse = 1e3 * float(differences.square().mean().sqrt())
    assert errors["forces_rmse"] == pytest.approx(rmse, rel=1e-4)


def _train_file(experiment: Path) -> str:
    import yaml

    return yaml.safe_load(experiment.read_text())["data"]["init_args"]["train"]


def test_predictions_are_written_as_structures(tmp_path: Path, experiment: Path, copper_file: Path):
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=1"])
    run = tmp_path / "run"
    best = run / "checkpoints" / "best.ckpt"
    words = [f"--data.predict={copper_file}", f"--ckpt_path={best}"]
    main(["predict", "-c", str(experiment), *words])
    predicted = ase.io.read(run / "predictions.extxyz", index=":")
    given = ase.io.read(copper_file, index=":")
    assert len(predicted) == len(given)
    potential = load_potential(run / "potential")
    expected = potential(potential.build_graph(given[1]))
    np.testing.assert_allclose(predicted[1].positions, given[1].positions, atol=1e-7)
    assert predicted[1].get_potential_energy() == pytest.approx(float(expected["energy"][0]))
    np.testing.assert_allclose(predicted[1].get_forces(), expected["forces"], atol=1e-5)


@pytest.mark.parametrize(
    "schedule",
    [
        ["--model.scheduler=StepLR", "--model.scheduler.step_size=1"],
        [
            "--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
            "--model.scheduler.monitor=val/forces_mae",
        ],
        ["--model.scheduler=null"],
    ],
)
def test_schedules_run(experiment: Path, schedule: list[str]):
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=2", *schedule])


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own use of PyTorch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_training_without_stress_needs_no_cell(tmp_path: Path):
    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])
    structures = [atoms.copy() for _ in range(4)]
    for k, structure in enumerate(structures):
        structure.info["energy"] = -30.0 - k
        structure.arrays["forces"] = np.full((2, 3), 0.1)
    ase.io.write(tmp_path / "h2.extxyz", structures)
    task = AtomisticTask(EGNN(2.0, num_layers=1, hidden_channels=4), loss=PotentialLoss())
    data = AtomisticDataModule(train=str(tmp_path / "h2.extxyz"), split=Split(val=0.25))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    assert task.val_results["forces_mae"] > 0


def test_positions_get_no_gradient_in_training():
    task = AtomisticTask(EGNN(2.0, num_layers=1, hidden_channels=4), loss=PotentialLoss())
    weight = next(parameter for parameter in task.parameters() if parameter.requires_grad)
    positions = torch.ones_like(weight).requires_grad_()
    task.backward((3 * weight * positions).sum())
    assert positions.grad is None
    assert weight.grad is not None
    assert weight.grad.eq(3).all()


def test_wandb_logs_offline(tmp_path: Path, experiment: Path, monkeypatch):
    for key in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(key, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"offline": True, "save_dir": str(tmp_path), "project": "atomeq"},
    }
    words = ["--trainer.max_epochs=1", f"--trainer.logger={json.dumps(logger)}"]
    main(["fit", "-c", str(experiment), *words])
    import wandb

    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def rates_of(schedule: RunSchedule) -> list[float]:
    """Return the learning rates of a run of 100 steps."""
    schedule.set_total_steps(100)
    rates = []
    for _ in range(101):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


def test_the_cosine_warms_up_and_ends():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = rates_of(WarmupCosine(optimizer, warmup=0.1, final=0.05))
    assert 0 < rates[0] < rates[5] < rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="warmup"):
        WarmupCosine(optimizer, warmup=1.5)


def test_rates_fall_at_milestones_after_a_warm_up_that_starts_high():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = rates_of(WarmupSteps(optimizer, (0.5, 0.8), gamma=0.1, warmup=0.1, start=0.2))
    assert 0.2 < rates[0] < rates[9] < rates[10] == 1.0
    assert rates[49] == 1.0
    assert rates[50] == rates[79] == pytest.approx(0.1)
    assert rates[80] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="fractions of the run"):
        WarmupSteps(optimizer, (145833,))


def test_biases_and_normalisations_can_be_kept_from_weight_decay():
    # The parameters that the published code of EquiformerV2 keeps from it, by our names.
    model = EquiformerV2(4.0, lmax=1, mmax=1, num_layers=1, sphere_channels=4, num_elements=2)
    task = AtomisticTask(model, decay="weights")
    decayed, kept = task.configure_optimizers().param_groups
    assert decayed["weight_decay"] > 0
    assert kept["weight_decay"] == 0
    chosen = {id(parameter) for parameter in kept["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert {n for n, _ in model.named_parameters() if n.endswith("bias")} <= names
    assert {
        "norm_out.weight",
        "blocks.0.norm_1.weight",
        "blocks.0.attention.logit_norm.weight",
        "blocks.0.attention.radial.layers.1.weight",
    } <= names
    assert not names & {
        "embedding.weight",
        "blocks.0.attention.logit_weight",
        "blocks.0.attention.radial.elements.source.weight",
        "blocks.0.attention.first.weights.0",
        "blocks.0.feed_forward.first.weight",
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(kept["params"]) == len(trained)
    with pytest.raises(ValueError, match="decay is all or weights"):
        AtomisticTask(model, decay="biases").configure_optimizers()


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the command as a user does and return its error, which must be one line."""
    with pytest.raises(SystemExit) as exit_info:
        command(list(words))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("atomeq: error: ")
    return error


@pytest.mark.parametrize(
    ("option", "found", "suggested"),
    [
        ("--trainer.max_epoch_s=3", "trainer.max_epoch_s", "trainer.max_epochs"),
        ("--model.los.energy=3", "model.los.energy", "model.loss"),
        ("--model.model.init_args.num_layer=3", "num_layer", "num_layers"),
        ("--data.max_atom=3", "max_atom", "max_atoms"),
        ("--max_epoch=3", "max_epoch", "trainer.max_epochs"),
        ("--model.optimizer.lrr=1", "lrr", "lr"),
        ("--chekpoint.monitor=x", "chekpoint.monitor", "checkpoint.monitor"),
        ("--tsk=propagation", "tsk", "task"),
        ("--model.scheduler.init_args.warmupp=1", "warmupp", "warmup"),
        ("--model.model=EGN", "EGN", "EGNN"),
        ("--trainer.callbacks+=EarlyStoping", "EarlyStoping", "EarlyStopping"),
    ],
)
def test_a_wrong_key_is_named_with_the_closest(
    experiment: Path, capsys, option: str, found: str, suggested: str
):
    error = refusal(capsys, "fit", "-c", str(experiment), option)
    assert found in error
    assert f"did you mean '{suggested}'?" in error


def test_a_wrong_key_in_the_file_is_named(experiment: Path, capsys):
    experiment.write_text(experiment.read_text().replace("max_atoms", "max_atomz"))
    error = refusal(capsys, "fit", "-c", str(experiment))
    assert "'max_atomz'" in error
    assert "did you mean 'max_atoms'?" in error


def test_bad_files_are_one_line(tmp_path: Path, experiment: Path, capsys, monkeypatch):
    fit = ("fit", "-c", str(experiment))
    assert "no data file" in refusal(capsys, *fit, f"--data.train={tmp_path / 'no.extxyz'}")
    monkeypatch.delenv("ATOMEQ_DATA", raising=False)
    error = refusal(capsys, *fit, "--data.train=${ATOMEQ_DATA}/cu.extxyz")
    assert "ATOMEQ_DATA" in error
    assert "atomeq data download" in error
    assert "no such.yaml" in refusal(capsys, "fit", "-c", str(tmp_path / "no such.yaml"))
    assert not list(tmp_path.glob("run/potential*"))


def test_missing_labels_are_named(tmp_path: Path, experiment: Path, capsys):
    fit = ("fit", "-c", str(experiment), "--data.labels.forces=REF_forces")
    error = refusal(capsys, *fit)
    assert "no training structure has that label" in error
    assert "data.labels.forces" in error


def test_bad_checkpoints_are_one_line(tmp_path: Path, experiment: Path, capsys):
    test = ("test", "-c", str(experiment))
    assert "never trained" in refusal(capsys, *test)
    assert "missing.ckpt" in refusal(capsys, *test, "--ckpt_path=missing.ckpt")
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(b"PK\x03\x04 nothing that is a checkpoint")
    assert "damaged" in refusal(capsys, *test, f"--ckpt_path={damaged}")
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=1"])
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    wider = "--model.model.init_args.hidden_channels=16"
    error = refusal(capsys, *test, f"--ckpt_path={path}", wider)
    assert "does not fit the model" in error
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[:-2000])
    assert "damaged" in refusal(capsys, *test, f"--ckpt_path={cut}")


def test_a_pickle_is_never_executed(tmp_path: Path, experiment: Path, capsys, monkeypatch):
    # Some packages set this for the whole process; our loads say weights_only themselves.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": _Touch(tmp_path / "touched")}, tmp_path / "evil.ckpt")
    path = tmp_path / "evil.ckpt"
    for verb in ("fit", "test"):
        assert "evil.ckpt" in refusal(capsys, verb, "-c", str(experiment), f"--ckpt_path={path}")
    assert not (tmp_path / "touched").exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_inference_mode_is_refused(experiment: Path, capsys):
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=1"])
    path = experiment.parent / "run" / "checkpoints" / "last.ckpt"
    words = ("test", "-c", str(experiment), f"--ckpt_path={path}", "--trainer.inference_mode=true")
    assert "inference_mode to false" in refusal(capsys, *words)


@pytest.mark.parametrize("stress_head", ["equivariant", {"decompose": True}], ids=str)
def test_a_head_for_the_stress_learns_beside_one_for_forces(
    stress_head, tmp_path: Path, experiment: Path
):
    import yaml

    document = yaml.safe_load(experiment.read_text())
    document["model"]["model"] = {
        "class_path": "atomeq.models.equiformer_v2.EquiformerV2",
        "init_args": {
            "cutoff": 3.5, "lmax": 2, "mmax": 1, "num_layers": 1, "sphere_channels": 8,
            "attn_hidden_channels": 8, "num_heads": 2, "attn_alpha_channels": 8,
            "ffn_hidden_channels": 8, "edge_channels": 8, "num_elements": 30,
            "direct_forces": True, "stress_head": stress_head,
        },
    }  # fmt: skip
    document["model"]["loss"] = {"energy": 0.0, "forces": 0.0, "stress": 1.0}
    experiment.write_text(yaml.safe_dump(document))
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=6"])
    errors = [float(row["val/stress_mae"]) for row in metrics(tmp_path / "run") if row["val/loss"]]
    assert min(errors) < 0.7 * errors[0]
    potential = load_potential(tmp_path / "run" / "potential")
    assert potential.model.config()["init_args"]["stress_head"] == stress_head
    assert potential.gives_stress
