"""``atomeq fit --seeds`` leaves one committee, and goes on where it was stopped."""

from pathlib import Path

import pytest
import torch
import yaml

from atomeq.cli.training import main
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.mean import MeanPotential


def test_seeds_make_a_committee_and_go_on(tmp_path: Path, experiment: Path, monkeypatch):
    words = ["fit", "-c", str(experiment), "--seeds=2"]
    main([*words, "--trainer.max_epochs=2", "--seed_everything=5"])
    run = tmp_path / "run"
    committee = load_potential(run / "committee")
    assert isinstance(committee, MeanPotential)
    one, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in committee.members)
    assert not torch.equal(one, other)
    seeds = []
    for k in range(2):  # each is an ordinary run, whose configuration runs again
        config = yaml.safe_load((run / f"seed-{k}" / "config.yaml").read_text())
        assert config.get("seeds") is None
        assert Path(config["save_potential"]["folder"]) == run / "committee" / f"seed-{k}"
        seeds.append(config["seed_everything"])
    assert seeds == [5, 6]
    with pytest.raises(ValueError, match="earlier run"):
        main([*words, "--trainer.max_epochs=2"])
    # As a committee stopped in its second member: that one has to begin, the first goes on.
    for path in (run / "seed-1" / "checkpoints").iterdir():
        path.unlink()
    main([*words, "--trainer.max_epochs=3", "--ckpt_path=last", "--seed_everything=5"])
    for k in range(2):
        last = run / f"seed-{k}" / "checkpoints" / "last.ckpt"
        assert torch.load(last, weights_only=True)["epoch"] == 2
    with pytest.raises(ValueError, match="is a committee"):
        main(
            [
                *("fit", "-c", str(experiment), "--model.model=null"),
                *(
                    f"--model.start_from={run / 'committee'}",
                    f"--trainer.default_root_dir={tmp_path}/x",
                ),
            ]
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=1"], "two potentials or more"),
        (["--seeds=2", "--model.target=gap"], "the target"),
    ],
)
def test_seeds_are_of_several_potentials(experiment: Path, words, message):
    with pytest.raises(ValueError, match=message):
        main(["fit", "-c", str(experiment), *words])
