"""A loss that is no number stops the fit at its structure, with the weights of before."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.cli import main as command
from atomeq.models.egnn import EGNN


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command(list(words))
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_structure_is_named_and_written(
    tmp_path: Path, experiment: Path, copper_file: Path, capsys, monkeypatch
):
    frames = ase.io.read(copper_file, index=":")
    odd = frames[5]
    odd.positions[0] += [0.31, 0.0, 0.0]
    odd.calc = SinglePointCalculator(odd, **odd.calc.results)  # labels of where it now is
    ase.io.write(tmp_path / "cu.extxyz", frames)
    forward, at = EGNN.forward, torch.tensor(odd.positions[0])

    def breaks(model: EGNN, graph):
        hit = (graph.pos - at).abs().amax(dim=1) < 1e-6
        energies = forward(model, graph)["energies"]
        return {"energies": torch.where(hit, float("nan"), energies)}

    monkeypatch.setattr(EGNN, "forward", breaks)
    data = f"--data.train={tmp_path / 'cu.extxyz'}"
    no_validation = ["--data.split.val=0", "--data.split.test=0", "--checkpoint.monitor=null"]
    error = refusal(capsys, "fit", "-c", str(experiment), data, *no_validation)
    assert "the loss is NaN or infinite in step" in error
    assert "cu.extxyz, frame 5; look at its positions" in error
    (saved,) = ase.io.read(tmp_path / "run" / "not_finite_0.extxyz", index=":")
    np.testing.assert_allclose(saved.positions, odd.positions, atol=1e-7)
    np.testing.assert_allclose(saved.get_forces(), odd.get_forces(), atol=1e-7)


def test_weights_that_ran_away_are_said_to(experiment: Path, capsys, monkeypatch):
    step = torch.optim.AdamW.step

    def spoils(optimizer, closure=None):
        loss = step(optimizer, closure)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(float("inf"))
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", spoils)
    error = refusal(capsys, "fit", "-c", str(experiment))
    assert "in step 1: the weights are not finite (model.embedding.weight)" in error
    assert "lower the learning rate" in error
