"""A prediction that is made again for its gradient: the same weights, less held in between."""

import csv
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from copper_experiment import labelled_copper
from small_models import SMALL_MODELS

from atomeq.cli.training import main
from atomeq.potential.checkpoint import build_model
from atomeq.potential.potential import Potential
from atomeq.training.losses import PotentialLoss
from atomeq.training.recomputed import predicted, refuse_to_recompute

DIGITS = 1e-9  # float64: parts of a batch are added in another order
CURVE = 1e-5  # float32, relative: AdamW enlarges rounding of gradients that are nearly zero
LOSS = PotentialLoss(energy=1.0, forces=1.0, stress=1.0)


def potential_of(name: str) -> Potential:
    torch.manual_seed(0)
    potential = Potential(build_model(SMALL_MODELS[name])).double().train()
    for parameter in potential.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return potential


def batch_for(potential: Potential, n_structures: int = 5):
    graph = potential.build_graph(labelled_copper(n_structures))
    return graph.replace(weight=torch.ones(n_structures, dtype=torch.float64))


def gradient(potential: Potential, at_once: int | None) -> list[torch.Tensor | None]:
    graph = batch_for(potential)
    potential.zero_grad()
    torch.manual_seed(3)
    loss = LOSS(predicted(potential, graph, LOSS.properties, at_once), graph)["loss"]
    loss.backward(inputs=[p for p in potential.parameters() if p.requires_grad])
    return [None if p.grad is None else p.grad.clone() for p in potential.parameters()]


@pytest.mark.parametrize("name", ["egnn", "escn", "mace"])
def test_gradients_are_those_of_the_whole_batch(name: str):
    potential = potential_of(name)
    whole = gradient(potential, None)
    assert sum(float(one.abs().sum()) for one in whole if one is not None) > 0
    for at_once in (1, 2, 5):
        for one, other in zip(whole, gradient(potential, at_once), strict=True):
            if one is None:
                assert other is None or not other.any()
            else:
                torch.testing.assert_close(other, one, rtol=1e-7, atol=DIGITS)


def test_dropout_and_random_frames_are_drawn_once(monkeypatch):
    """Both passes see the same random numbers, and those that follow are not used up."""
    node = SMALL_MODELS["faenet"]
    node = {**node, "init_args": {**node["init_args"], "training_frames": "stochastic"}}
    transformer = SMALL_MODELS["equiformer_v2"]
    dropped = {**transformer, "init_args": {**transformer["init_args"], "alpha_drop": 0.5}}
    for chosen in (node, dropped):
        potential = Potential(build_model(chosen)).double().train()
        for parameter in potential.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        graph = batch_for(potential, 1)
        made: list[dict] = []
        forward = Potential.forward

        def kept(self, *args, made=made, forward=forward, **options):
            made.append(forward(self, *args, **options))
            return made[-1]

        monkeypatch.setattr(Potential, "forward", kept)
        found = predicted(potential, graph, ("energy", "forces"), 1)
        state = torch.get_rng_state()
        (found["energy"].sum() + found["forces"].square().sum()).backward()
        monkeypatch.setattr(Potential, "forward", forward)
        assert torch.equal(torch.get_rng_state(), state)
        first, second = made
        torch.testing.assert_close(
            second["forces"].detach(), first["forces"], rtol=1e-9, atol=1e-12
        )
        with torch.no_grad():
            another = potential(graph, ("forces",), create_graph=False)["forces"]
        assert not torch.allclose(another, first["forces"])


class Held:
    """A tensor that a graph of autograd keeps."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_what_is_held_for_the_gradient_is_the_inputs_alone():
    potential = potential_of("egnn")
    graph = batch_for(potential)
    held = {}
    for at_once in (None, 1):
        alive: WeakSet[Held] = WeakSet()

        def pack(tensor: torch.Tensor, alive=alive) -> Held:
            one = Held(tensor)
            alive.add(one)
            return one

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
            found = predicted(potential, graph, ("energy", "forces"), at_once)
        held[at_once] = sum(one.tensor.numel() for one in alive)
        assert found["forces"].requires_grad
    assert held[None] > 100_000
    assert held[1] < 0.01 * held[None]


def test_a_fit_goes_the_same_way(tmp_path: Path, experiment: Path):
    losses = []
    for name, words in (("whole", []), ("parts", ["--model.recompute=1"])):
        run = tmp_path / name
        words = [*words, "--trainer.max_epochs=2", f"--trainer.default_root_dir={run}"]
        main(["fit", "-c", str(experiment), *words])
        with (run / "metrics" / "version_0" / "metrics.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        losses.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=CURVE)


def test_what_normalises_over_the_batch_is_refused():
    with pytest.raises(ValueError, match="normalises over the batch"):
        refuse_to_recompute(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), 2)
    with pytest.raises(ValueError, match="1 or more"):
        refuse_to_recompute(torch.nn.Linear(1, 1), 0)
