"""Weights between those of a potential and of one that was fine-tuned from it."""

import copy
import sys

import pytest
import torch
import weights_between
from small_potential import small_potential

from atomeq.potential.checkpoint import load_potential, metadata_of, save_potential
from atomeq.potential.potential import Potential


@pytest.fixture
def tuned() -> Potential:
    potential = copy.deepcopy(small_potential(torch.float32))
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter += 1.0
    return potential


def test_command_saves_the_weights_in_the_asked_shares(tuned, tmp_path, monkeypatch, capsys):
    start = small_potential(torch.float32)
    for name, potential in (("start", start), ("tuned", tuned)):
        save_potential(potential, tmp_path / name)
    words = [str(tmp_path / "start"), str(tmp_path / "tuned"), "0.75", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["weights_between", *words])
    weights_between.main()
    found = dict(load_potential(tmp_path / "out").named_parameters())
    for name, weight in start.named_parameters():
        assert torch.allclose(found[name], weight + 0.75, atol=1e-6), name
    assert metadata_of(tmp_path / "out")["weights_between"] == {words[0]: 0.25, words[1]: 0.75}
    with pytest.raises(SystemExit):
        weights_between.main()
    assert "exists: name a new folder" in capsys.readouterr().err


def test_ends_are_the_two_potentials_to_the_last_bit(tuned):
    start = small_potential(torch.float32)
    for share, expected in ((0.0, start), (1.0, tuned)):
        found = weights_between.between(start, tuned, share)
        pairs = zip(found.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_cannot_be_mixed_is_refused(tuned):
    start = small_potential(torch.float32)
    with pytest.raises(ValueError, match="from 0 to 1"):
        weights_between.between(start, tuned, 1.5)
    with pytest.raises(ValueError, match="these are two networks"):
        weights_between.between(small_potential(torch.float32, network="mace"), tuned, 0.5)
    tuned.references.shift[29] += 1.0
    with pytest.raises(ValueError, match="references differ in shift"):
        weights_between.between(start, tuned, 0.5)
