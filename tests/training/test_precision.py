"""What trainer.precision may be, and what is refused before the first step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from ase.build import bulk
from small_models import SMALL_MODELS

from atomeq.cli.training import main
from atomeq.potential.checkpoint import build_model, load_potential
from atomeq.potential.potential import Potential
from atomeq.training.losses import PotentialLoss
from atomeq.training.preparation import refuse_compiled, refuse_precision
from atomeq.training.task import AtomisticTask

ROUNDED = 0.1  # of bfloat16's 8 bits, after two epochs


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", "float32"), ("64-true", "float64")]
)
def test_it_trains_and_saves_whole_weights(tmp_path: Path, experiment: Path, precision, dtype):
    words = ["fit", "-c", str(experiment), "--trainer.max_epochs=1"]
    losses = {}
    for name in ("32-true", precision):
        run = tmp_path / name
        main([*words, f"--trainer.precision={name}", f"--trainer.default_root_dir={run}"])
        best = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        losses[name] = best["validation"]["loss"]
    assert losses[precision] == pytest.approx(losses["32-true"], rel=ROUNDED)
    assert load_potential(tmp_path / precision / "potential").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.precision=bf16-true"], "trained and saved in 32 or 64 bits"),
        (["--trainer.precision=16-true"], "trained and saved in 32 or 64 bits"),
        (["--trainer.precision=bf16-mixed", "escn"], "ESCN takes no mixed precision.*model.prec"),
    ],
)
def test_what_does_not_work_is_refused_before_the_first_step(
    tmp_path: Path, experiment: Path, words: list[str], message: str
):
    if words[-1] == "escn":
        document = yaml.safe_load(experiment.read_text())
        document["model"]["model"] = SMALL_MODELS["escn"]
        experiment.write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=message):
        main(["fit", "-c", str(experiment), words[0]])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_half_precision_of_a_gpu_is_refused():
    """On a CPU Lightning itself takes bfloat16 in its place."""
    task = SimpleNamespace(trainer=SimpleNamespace(precision="16-mixed"))
    with pytest.raises(ValueError, match="forces are derivatives"):
        refuse_precision(task, None)  # type: ignore[arg-type]


def test_a_compiled_network_is_refused_where_forces_are_derivatives():
    network = build_model(SMALL_MODELS["egnn"])
    task = AtomisticTask(network, loss=PotentialLoss(energy=1, forces=1))
    refuse_compiled(task)
    network.compile(backend="eager")
    with pytest.raises(ValueError, match=r"EGNN is compiled, and .* no second derivative"):
        refuse_compiled(task)
    refuse_compiled(AtomisticTask(network, loss=PotentialLoss(energy=1, forces=0)))


@pytest.mark.slow  # six CPU seconds of torch's compiler
def test_a_compiled_network_gives_no_forces_to_train_on():
    """The reason why a step is not compiled: should this pass one day, it can be."""
    model = build_model(SMALL_MODELS["egnn"]).train()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    potential = Potential(model)
    graph = potential.build_graph(bulk("Cu", cubic=True))
    graph = graph.replace(pos=graph.pos.requires_grad_())
    energy = compiled(graph)["energies"].sum()
    (gradient,) = torch.autograd.grad(energy, [graph.pos], create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        gradient.square().sum().backward()
