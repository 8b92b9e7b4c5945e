"""A run killed with SIGKILL and continued ends with the weights of one that was never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

COMMAND = [sys.executable, "-c", "from atomeq.cli import main; main()"]
# Checkpoints in the middle of epochs, whose batches vary in number; or at the end of each epoch.
SCHEDULES = {
    "every 4 steps": ["--checkpoint.monitor=null", "--checkpoint.every_n_train_steps=4"],
    "every epoch": [],
}
SLOW_STEP = "--trainer.callbacks+=slow_steps.SlowSteps"


@pytest.fixture
def run(tmp_path: Path, experiment: Path):
    # Steps that take a while, so that the signal falls between a checkpoint and the end.
    (tmp_path / "slow_steps.py").write_text(
        "import time\n"
        "from lightning.pytorch import Callback\n"
        "class SlowSteps(Callback):\n"
        "    def on_train_batch_end(self, *args):\n"
        "        time.sleep(0.05)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }

    def start(folder: str, *extra: str) -> subprocess.Popen[bytes]:
        words = ["fit", "-c", str(experiment), "--trainer.max_epochs=6", "--ckpt_path=last"]
        words += [f"--trainer.default_root_dir={tmp_path / folder}", *extra]
        return subprocess.Popen(
            COMMAND + words, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
        )

    return start


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()


def last_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path, run, schedule: str):
    options = SCHEDULES[schedule]
    uninterrupted = run("whole", *options)
    killed = run("killed", *options, SLOW_STEP)
    marker = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not marker.exists():
        assert killed.poll() is None, killed.communicate()[0].decode()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    time.sleep(0.12)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    finish(uninterrupted)
    before = last_checkpoint(tmp_path / "killed")["global_step"]
    finish(run("killed", *options))

    expected, continued = (last_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert before < expected["global_step"] == continued["global_step"]
    for part in ("state_dict", "raw_weights"):
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, continued[part][name]), f"{part}: {name}"
    assert expected["lr_schedulers"] == continued["lr_schedulers"]
    assert expected["ema_updates"] == continued["ema_updates"]
