"""Every model trains in several processes: no parameter waits for a gradient that never comes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ase.build import molecule
from copper_experiment import copper_file, experiment  # noqa: F401

from atomeq.models.base import AtomisticModel
from atomeq.models.egnn import EGNN
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.equihgnn import EquiHGNN
from atomeq.models.escn import ESCN
from atomeq.models.faenet import FAENet
from atomeq.models.frame_averaged import FrameAveraged
from atomeq.models.segno import SEGNO
from atomeq.potential.checkpoint import build_model, load_potential
from atomeq.training.task import AtomisticTask

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
ENCODERS = {
    "egnn": lambda: EGNN(4.0, num_layers=2, hidden_channels=8),
    "escn": lambda: ESCN(4.0, lmax=1, mmax=1, num_layers=1, sphere_channels=4, hidden_channels=8),
    "equiformer_v2": lambda: EquiformerV2(
        4.0, lmax=1, mmax=1, num_layers=1, sphere_channels=4, direct_forces=True
    ),
    "faenet": lambda: FrameAveraged(FAENet(4.0, hidden_channels=64, num_filters=8)),
    "segno": lambda: SEGNO(4.0, num_steps=2, hidden_channels=8),
}


def without_gradient(model: AtomisticModel) -> list[str]:
    """Return the trained parameters that a step on energies and forces leaves alone."""
    task = AtomisticTask(model)
    graph = task.build_graph([molecule("CH3COOH"), molecule("CH3CH2OH")])
    prediction = task.potential(graph, ("energy", "forces"), create_graph=True)
    torch.stack([value.square().sum() for value in prediction.values()]).sum().backward()
    return [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_trained_parameter_gets_a_gradient(config: Path):
    assert without_gradient(build_model(yaml.safe_load(config.read_text()))) == []


@pytest.mark.parametrize("encoder", ENCODERS)
def test_nothing_of_an_encoder_waits_for_a_gradient(encoder: str):
    model = EquiHGNN(ENCODERS[encoder](), num_layers=1, hidden_channels=8, perceive=False)
    assert without_gradient(model) == []


def test_two_processes_train_egnn(tmp_path: Path, experiment: Path):  # noqa: F811
    """Two CPU processes over gloo, started as ``atomeq fit`` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["fit", "-c", str(experiment), "--trainer.max_epochs=2", "--trainer.devices=2"]
    words += ["--trainer.strategy=ddp", "--model.model.init_args.num_layers=2"]
    script = tmp_path / "train.py"
    script.write_text(f"from atomeq.cli import main\nmain({words})\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert load_potential(tmp_path / "run" / "potential").elements == (29,)
