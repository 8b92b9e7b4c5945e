"""Averaged weights are what is validated, tested and saved; raw weights are what trains on."""

from pathlib import Path

import pytest
import torch
import yaml
from copper_experiment import labelled_copper

from atomeq.cli.training import TrainingCLI, main
from atomeq.models.egnn import EGNN
from atomeq.potential.checkpoint import CheckpointError, load_potential
from atomeq.training.callbacks import ExponentialMovingAverage, weights_of
from atomeq.training.task import AtomisticTask


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_the_average_follows_its_formula():
    module = torch.nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(decay=0.5)
    average.setup(None, module, "fit")  # pyright: ignore
    expected = module.weight.detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            module.weight += 1.0
        trainer = type("Trainer", (), {"global_step": step})()
        average.on_train_batch_end(trainer, module)  # pyright: ignore
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    assert torch.allclose(average._average[0], expected)
    with pytest.raises(ValueError, match="decay"):
        ExponentialMovingAverage(decay=1.0)


def test_a_run_leaves_its_folder_complete(tmp_path: Path, experiment: Path):
    main(["fit", "-c", str(experiment)])
    run = tmp_path / "run"
    assert (run / "config.yaml").is_file()
    assert (run / "metrics" / "version_0" / "metrics.csv").is_file()

    best = checkpoint(run, "best")
    raw, average = best["raw_weights"], best["state_dict"]
    assert any(not torch.equal(raw[name], average[name]) for name in raw)

    potential = load_potential(run / "potential")
    saved, expected = potential.state_dict(), weights_of(best, "potential")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert potential.elements == (29,)


def test_a_saved_potential_knows_how_far_off_it_may_be(tmp_path: Path, experiment: Path, caplog):
    main(["fit", "-c", str(experiment), "--data.split.val=0.4", "--trainer.max_epochs=1"])
    run = tmp_path / "run"
    first = load_potential(run / "potential")
    assert first.uncertainty is not None
    graph = first.build_graph(labelled_copper(2))
    assert (first(graph, ("forces_uncertainty",))["forces_uncertainty"] > 0).all()
    metadata = yaml.safe_load((run / "potential" / "model.yaml").read_text())["metadata"]
    assert metadata["coverage"]["forces_68"] == pytest.approx(0.683, abs=0.01)
    # What starts from it has other weights, and another uncertainty or none.
    words = [f"--model.start_from={run / 'potential'}", "--model.model=null"]
    words += [f"--trainer.default_root_dir={tmp_path / 'next'}", "--trainer.max_epochs=1"]
    few = ["--data.split.val=0.1"]  # two structures are too few
    with caplog.at_level("INFO", logger="atomeq"):
        main(["fit", "-c", str(experiment), *words, *few])
    assert load_potential(tmp_path / "next" / "potential").uncertainty is None
    assert "does not know its uncertainty: 2 held-out energies are too few" in caplog.text
    words += ["--save_potential.calibrate_on=0", "--trainer.default_root_dir"]
    main(["fit", "-c", str(experiment), *words, str(tmp_path / "off"), "--data.split.val=0.4"])
    assert load_potential(tmp_path / "off" / "potential").uncertainty is None


def test_last_checkpoint_follows_a_run_that_does_not_improve(tmp_path: Path, experiment: Path):
    """With a learning rate of zero no epoch beats the first, and yet the run has come further."""
    main(["fit", "-c", str(experiment), "--model.optimizer.init_args.lr", "0.0"])
    assert checkpoint(tmp_path / "run", "best")["epoch"] == 0
    assert checkpoint(tmp_path / "run", "last")["epoch"] == 2


def scores(saved: dict) -> dict[str, float]:
    """The lowest val/loss so far, as each of those who wait for a lower one remembers it."""
    found = {
        key.partition("{")[0]: float(state[name])
        for key, state in saved["callbacks"].items()
        for name in ("best_model_score", "best_score")
        if name in state
    }
    return found | {"plateau": saved["plateau"]["best"]}


def test_scores_of_another_loss_do_not_count(tmp_path: Path, experiment: Path):
    """A run that goes on with a larger loss never beats the old scores, and must not have to."""
    plateau = "lightning.pytorch.cli.ReduceLROnPlateau"
    words = ["fit", "-c", str(experiment), f"--model.scheduler={plateau}"]
    words += ["--model.scheduler.monitor=val/loss", "--trainer.callbacks+=EarlyStopping"]
    words += ["--trainer.callbacks.monitor=val/loss"]
    main([*words, "--trainer.max_epochs=2"])
    old = scores(checkpoint(tmp_path / "run"))
    assert set(old) == {"RunCheckpoint", "EarlyStopping", "plateau"}
    main([*words, "--ckpt_path=last", "--trainer.max_epochs=3"])
    kept = scores(checkpoint(tmp_path / "run"))
    assert all(kept[name] <= old[name] for name in old)
    larger = [f"--model.loss.{part}=1000.0" for part in ("energy", "forces", "stress")]
    main([*words, "--ckpt_path=last", "--trainer.max_epochs=4", *larger])
    new = scores(checkpoint(tmp_path / "run"))
    assert all(new[name] > 10 * old[name] for name in old)
    assert checkpoint(tmp_path / "run", "best")["epoch"] == 3


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own use of PyTorch
def test_validation_sees_the_average(tmp_path: Path, experiment: Path, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    step = AtomisticTask.validation_step

    def spy(self: AtomisticTask, batch, batch_idx: int) -> None:
        seen.append({name: p.detach().clone() for name, p in self.named_parameters()})
        step(self, batch, batch_idx)

    monkeypatch.setattr(AtomisticTask, "validation_step", spy)
    cli = TrainingCLI(["fit", "-c", str(experiment), "--trainer.max_epochs=2"])
    last = checkpoint(tmp_path / "run")
    for name, parameter in cli.model.named_parameters():
        assert torch.equal(seen[-1][name], last["state_dict"][name])
        assert torch.equal(parameter, last["state_dict"][name]), "the task ends with the average"


class Unregistered(EGNN):
    """A model that a saved potential could not name."""


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path, experiment: Path):
    path = f"{Unregistered.__module__}.{Unregistered.__qualname__}"
    with pytest.raises(CheckpointError, match="Unregistered cannot be saved"):
        main(["fit", "-c", str(experiment), "--model.model.class_path", path])
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "potential").exists()
