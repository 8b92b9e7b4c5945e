"""Muon is torch's for matrices and AdamW for the rest; optimizers that average are switched."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from atomeq.cli.training import main
from atomeq.potential.checkpoint import load_potential
from atomeq.training.optimizers import Muon


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1))
    module.stack = nn.Parameter(torch.randn(2, 3, 3))
    return module


def steps(module: nn.Module, *optimizers: torch.optim.Optimizer, n: int) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 20).reshape(5, 4)
    for _ in range(n):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (module(x).square().sum() + (module.stack - 1).square().sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


def test_matrices_are_torchs_muon_and_the_rest_adamw():
    one, other = network(), network()
    both = Muon([{"params": list(one.parameters()), "weight_decay": 0.1}], lr=0.01, momentum=0.9)
    matrix = [other[0].weight]  # that of one row is none
    rest = [p for p in other.parameters() if p is not matrix[0]]
    muon = torch.optim.Muon(
        matrix, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    found, expected = steps(one, both, n=3), steps(other, muon, adamw, n=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="none is trained"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_schedules_and_resumes_reach_both_parts():
    straight, first = network(), network()
    expected = steps(straight, Muon(straight.parameters(), lr=0.01), n=5)
    optimizer = Muon(first.parameters(), lr=0.01)
    steps(first, optimizer, n=3)
    state = copy.deepcopy(optimizer.state_dict())
    second = Muon(first.parameters(), lr=1.0)
    second.load_state_dict(state)
    torch.testing.assert_close(steps(first, second, n=2), expected, rtol=0, atol=0)
    torch.optim.lr_scheduler.LambdaLR(second, lambda step: 0.0)
    torch.testing.assert_close(steps(first, second, n=1), expected, rtol=0, atol=0)


def test_an_optimizer_that_averages_is_saved_at_its_averages(tmp_path: Path, experiment, capsys):
    words = ["--model.optimizer=averaging_optimizer.Averaging", "--model.scheduler=null"]
    words += ["--trainer.max_epochs=2"]
    with pytest.raises(ValueError, match=r"set ema\.decay to 0"):
        main(["fit", "-c", str(experiment), *words, "--overwrite"])
    main(["fit", "-c", str(experiment), *words, "--ema.decay=0", "--overwrite"])
    run = tmp_path / "run"
    best, last = (
        torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for name in ("best", "last")
    )
    key = "potential.model.energy.0.bias"
    # The rate is zero: the weights that are validated stay where they began.
    saved = load_potential(run / "potential")
    for one in (best, last):
        assert not one["optimizer_states"][0]["param_groups"][0]["train_mode"]
        torch.testing.assert_close(one["state_dict"][key], saved.model.energy[0].bias)
    words[-1] = "--trainer.max_epochs=3"
    main(["fit", "-c", str(experiment), *words, "--ema.decay=0", "--ckpt_path=last"])
    again = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert again["epoch"] == 2
    torch.testing.assert_close(again["state_dict"][key], best["state_dict"][key])


@pytest.mark.parametrize("name", ["atomeq.training.optimizers.Muon", "schedulefree"])
def test_a_fit_learns_with_it(tmp_path: Path, experiment: Path, name: str):
    words, rate = [f"--model.optimizer={name}"], 0.05
    if name == "schedulefree":
        pytest.importorskip("schedulefree", reason="pip install atomeq[schedulefree]")
        words = ["--model.optimizer=schedulefree.AdamWScheduleFree", "--ema.decay=0"]
        words, rate = [*words, "--model.scheduler=null"], 0.01
    words += [f"--model.optimizer.lr={rate}", "--trainer.max_epochs=8"]
    main(["fit", "-c", str(experiment), *words])
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    rows = (tmp_path / "run/metrics/version_0/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert min(losses) < 0.5 * losses[0]
    assert best["epoch"] > 0
