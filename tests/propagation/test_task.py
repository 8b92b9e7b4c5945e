"""Propagators are trained, tested and continued from the command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from atomeq.cli.training import main
from atomeq.models.egnn_published import VelocityEGNN
from atomeq.models.segno import SEGNOPropagator
from atomeq.propagation.batches import PropagationSet
from atomeq.propagation.datamodules import NBodyDataModule
from atomeq.propagation.nbody import NBodyRecipe, simulate
from atomeq.propagation.particles import ParticleView
from atomeq.propagation.task import PropagationTask

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("nbody_*.yaml"))
SMALL = [f"--data.recipe.num_{part}=8" for part in ("train", "val", "test")]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_fits_and_tests(tmp_path: Path, monkeypatch, capsys, experiment: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-c", str(experiment), *SMALL]
    main(["fit", *words, "--trainer.max_epochs=5"])
    run = tmp_path / "runs" / experiment.stem
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == "propagation"
    main(["test", *words, f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"])
    assert "position MSE" in capsys.readouterr().out
    assert json.loads((run / "test_errors.json").read_text())["test"]["mse"] > 0
    # The saved configuration is complete.
    main(["fit", "-c", str(run / "config.yaml"), "--trainer.default_root_dir=again"])


def test_untrained_weights_are_not_tested(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="never trained"):
        main(["test", "-c", str(EXPERIMENTS[0]), *SMALL])


def test_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task 'astrology' is unknown; there are potential"):
        main(["fit", "--task", "astrology"])


def test_an_epoch_sees_every_system_once_in_its_own_order() -> None:
    recipe = NBodyRecipe(num_train=7, num_val=0, num_test=0, frames=(0, 1))
    part = simulate(recipe)["train"]
    systems = PropagationSet(part, ParticleView(), from_frame=0, to_frame=1, batch_size=3, seed=0)
    assert len(systems) == 3
    orders = []
    for systems.epoch in (0, 1, 0):
        batches = list(systems)
        assert [len(batch.pos) for batch in batches] == [15, 15, 5]
        orders.append(torch.cat([batch.pos for batch in batches]).view(7, 5, 3))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    everything = part.at(0)[0]
    assert torch.equal(orders[1][:, 0].sort(0).values, everything[:, 0].sort(0).values)


def test_features_belong_to_their_edges() -> None:
    part = simulate(NBodyRecipe(num_train=2, num_val=0, num_test=0, frames=(0, 1)))["train"]
    (batch,) = PropagationSet(part, ParticleView(), from_frame=0, to_frame=1, batch_size=2)
    source, target = batch.edge_index
    squared = ((batch.pos[source] - batch.pos[target]) ** 2).sum(1)
    charges = part.charges.flatten()
    torch.testing.assert_close(batch.edge_features[:, 1], squared)
    torch.testing.assert_close(batch.edge_features[:, 0], charges[source] * charges[target])
    torch.testing.assert_close(batch.node_features[:, 0], batch.velocities.norm(dim=1))
    assert torch.equal(batch.target.view(2, 5, 3), part.at(1)[0])


def test_of_masses_a_network_sees_distances_only() -> None:
    recipe = NBodyRecipe("gravity", num_train=2, num_val=0, num_test=0, frames=(0, 1))
    part = simulate(recipe)["train"]
    view = ParticleView("gravity")
    (batch,) = PropagationSet(part, view, from_frame=0, to_frame=1, batch_size=2)
    source, target = batch.edge_index
    squared = ((batch.pos[source] - batch.pos[target]) ** 2).sum(1)
    torch.testing.assert_close(batch.edge_features, squared[:, None])


def test_velocities_are_lengths_per_long_step() -> None:
    part = simulate(NBodyRecipe(num_train=2, num_val=0, num_test=0, frames=(0, 5)))["train"]
    view = ParticleView(time=0.5)
    (batch,) = PropagationSet(part, view, from_frame=0, to_frame=5, batch_size=2)
    torch.testing.assert_close(batch.velocities, 0.5 * part.at(0)[1].flatten(0, 1))
    torch.testing.assert_close(batch.target_velocities, 0.5 * part.at(5)[1].flatten(0, 1))
    torch.testing.assert_close(batch.node_features[:, 0], batch.velocities.norm(dim=1))


def test_a_network_without_velocities_is_not_trained_on_them() -> None:
    with pytest.raises(ValueError, match="VelocityEGNN gives no velocities"):
        PropagationTask(VelocityEGNN(hidden_channels=8), velocity_weight=1.0)


def test_gradients_that_overflow_are_left_out() -> None:
    """Clipped, an infinite gradient would be NaN, and with it every weight from then on."""
    task = PropagationTask(SEGNOPropagator(hidden_channels=8))
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task.on_before_optimizer_step(optimizer)
    assert all(bool((p.grad == 1).all()) for p in task.parameters() if p.grad is not None)
    next(task.parameters()).grad[0, 0] = torch.inf
    task.on_before_optimizer_step(optimizer)
    assert all(bool((p.grad == 0).all()) for p in task.parameters() if p.grad is not None)
    assert task.skipped_steps == 1


def test_only_the_first_training_systems_are_used(tmp_path: Path) -> None:
    recipe = NBodyRecipe(num_train=4, num_val=1, num_test=1, frames=(0, 1))
    data = NBodyDataModule(
        str(tmp_path), recipe=recipe, from_frame=0, to_frame=1, max_train=3, batch_size=2
    )
    data.setup("fit")
    assert [len(batch.pos) for batch in data.train_dataloader()] == [10, 5]
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == 1
