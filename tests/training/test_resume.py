"""A run killed with SIGKILL and continued ends with the weights of one that was never stopped."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atomeq.cli import main as command

COMMAND = [sys.executable, "-c", "from atomeq.cli import main; main()"]
# Checkpoints in the middle of epochs, whose batches vary in number; or at the end of each epoch.
SCHEDULES = {
    "every 4 steps": ["--checkpoint.monitor=null", "--checkpoint.every_n_train_steps=4"],
    "every epoch": [],
}
STOPPED = "stopped between two checkpoints"
# The signal has to fall between a checkpoint and the end, so the run stops there until it comes.
STOPS = f"""
import signal
from pathlib import Path
from lightning.pytorch import Callback

class Stops(Callback):
    n_steps = 0

    def on_train_batch_end(self, trainer, *args):
        folder = Path(trainer.default_root_dir)
        self.n_steps += (folder / "checkpoints" / "last.ckpt").exists()
        if self.n_steps == 3:
            print({STOPPED!r}, flush=True)
            signal.pause()
"""
Words = Callable[..., list[str]]


@pytest.fixture
def words(tmp_path: Path, experiment: Path) -> Words:
    """The words of a fit in a folder."""

    def of(folder: str, *more: str) -> list[str]:
        given = ["fit", "-c", str(experiment), "--trainer.max_epochs=6", "--ckpt_path=last"]
        return [*given, f"--trainer.default_root_dir={tmp_path / folder}", *more]

    return of


def kill_between_checkpoints(folder: Path, words: list[str]) -> None:
    """Run until the callback says that it waits, and send SIGKILL."""
    (folder / "stops.py").write_text(STOPS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    given = [*COMMAND, *words, "--trainer.callbacks+=stops.Stops"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(given, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:  # ends with the process, should it never wait
            lines.append(line)
            if STOPPED in line:
                process.kill()
        assert STOPPED in "".join(lines), "".join(lines)


def last_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path, words: Words, schedule: str):
    options = SCHEDULES[schedule]
    kill_between_checkpoints(tmp_path, words("killed", *options))
    before = last_checkpoint(tmp_path / "killed")["global_step"]
    command(words("killed", *options))
    command(words("whole", *options))

    expected, continued = (last_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert before < expected["global_step"] == continued["global_step"]
    for part in ("state_dict", "raw_weights"):
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, continued[part][name]), f"{part}: {name}"
    assert expected["lr_schedulers"] == continued["lr_schedulers"]
    assert expected["ema_updates"] == continued["ema_updates"]
