"""Two processes train as one with twice the batch does, go on after SIGKILL, and share fairly."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from copper_experiment import labelled_copper
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from small_models import SMALL_MODELS

from atomeq.cli import main as command
from atomeq.data.batching import BudgetBatchSampler, GraphDataset
from atomeq.graph.builders import RadiusGraph
from atomeq.models.egnn import EGNN
from atomeq.training.losses import PotentialLoss, ScalarLoss
from atomeq.training.sharded import Sharded
from atomeq.training.task import AtomisticTask

ROOT = Path(__file__).parents[2]
RELATIVE = 1e-6  # float32: sums of two halves and of the whole are rounded differently
DEFAULT = ("egnn", "escn")
STOPPED = "stopped in the middle of an epoch"
# Each of the two processes runs every list of words; those that stop say so and wait.
TRAIN = f"""
import json, signal, sys
from lightning.pytorch import Callback
from atomeq.cli import main

class Stops(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == int(sys.argv[2]):
            print({STOPPED!r}, flush=True)
            signal.pause()

class Shares(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        weights = [p for p in module.potential.model.parameters() if p.requires_grad]
        states = [trainer.optimizers[0].state[weight]["momentum_buffer"] for weight in weights]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for tensors in (weights, states, gradients):
            own = sum(tensor.to_local().numel() for tensor in tensors)
            assert own < 0.7 * sum(tensor.numel() for tensor in tensors)

if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]
    for words in json.loads(sys.argv[1]):
        main(words)
"""


def document(folder: Path, network: str) -> dict:
    return {
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "num_sanity_val_steps": 0,
        },
        "model": {
            "model": SMALL_MODELS[network],
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
            "loss": {"energy": 1.0, "forces": 1.0},
        },
        "data": {
            "class_path": "atomeq.data.datamodule.AtomisticDataModule",
            "init_args": {"train": str(folder.parent / "cu.extxyz"), "split": {"val": 5}},
        },
        "ema": {"decay": 0.9},
    }


def written(tmp_path: Path, name: str, network: str) -> list[str]:
    """Write a configuration and return the words that fit it."""
    import ase.io

    if not (tmp_path / "cu.extxyz").exists():
        ase.io.write(tmp_path / "cu.extxyz", labelled_copper(18))  # 13 to train
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document(tmp_path / name, network)))
    return ["fit", "-c", str(path)]


def start(tmp_path: Path, lists: list[list[str]], stop_at: int = -1) -> list[subprocess.Popen]:
    """Start two processes that wait for nobody but each other."""
    (tmp_path / "train.py").write_text(TRAIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    script = [sys.executable, str(tmp_path / "train.py"), json.dumps(lists), str(stop_at)]
    return [
        subprocess.Popen(
            script,
            env=shared | {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    try:
        texts = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0, text[-4000:]


def rows(run: Path) -> Iterator[dict[str, float]]:
    with (run / "metrics" / "version_0" / "metrics.csv").open() as stream:
        for row in csv.DictReader(stream):
            yield {key: float(value) for key, value in row.items() if value}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["raw_weights"]


def assert_same_run(one: Path, two: Path) -> None:
    """Losses, raw and averaged weights and the potential, to the rounding of sums."""
    pairs = list(zip(rows(one), rows(two), strict=True))
    assert len(pairs) == 6
    for expected, found in pairs:
        assert expected.keys() == found.keys()
        for key in expected.keys() - {"val/loss"}:  # of batches, whose division differs
            assert found[key] == pytest.approx(expected[key], rel=RELATIVE), f"{two.name}: {key}"
    expected, found = weights(one), weights(two)
    assert sum(float(tensor.abs().sum()) for tensor in expected.values()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected, found = (load_file(run / "potential" / "weights.safetensors") for run in (one, two))
    known = {name for name in expected if not name.startswith("uncertainty")}
    assert known <= found.keys()
    for name in known:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def assert_same_checkpoint(one: Path, two: Path) -> None:
    """Bit for bit."""
    expected, found = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, two)
    )
    assert expected["global_step"] == found["global_step"]
    for part in ("state_dict", "raw_weights"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (expected, found)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        torch.testing.assert_close(states[1][number], state, rtol=0, atol=0)


def networks() -> list:
    slow = tuple(name for name in SMALL_MODELS if name not in DEFAULT)
    return [pytest.param(DEFAULT), pytest.param(slow, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chosen", networks(), ids=" ".join)
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path, chosen: tuple[str, ...]):
    """13 structures in batches of 2 x 3: the last of an epoch leaves one process nothing.

    Each process has all weights, or its share of them, which once is put together and taken up.
    """
    more = ["--model.optimizer.momentum=0.5", "--trainer.gradient_clip_val=1"]
    more += ["--model.train_references=true", "--model.train_scale=true"]
    two = [*more, "--data.max_structures=3", "--trainer.devices=2"]
    shares = [*two, "--trainer.strategy=fsdp2", "--trainer.callbacks+=train.Shares"]
    shared = chosen[-1:] if chosen == DEFAULT else chosen  # the others at -m slow
    lists = [
        [*written(tmp_path, f"two {name}", name), *two, "--trainer.strategy=ddp"] for name in chosen
    ]
    lists += [[*written(tmp_path, f"shares {name}", name), *shares] for name in shared]
    stopped = [*written(tmp_path, "stopped", shared[-1]), *shares]
    lists += [[*stopped, "--trainer.max_epochs=2"], [*stopped, "--ckpt_path=last"]]
    running = start(tmp_path, lists)
    try:
        for name in chosen:
            command([*written(tmp_path, f"one {name}", name), *more, "--data.max_structures=6"])
    finally:
        finish(running)
    for name in chosen:
        assert_same_run(tmp_path / f"one {name}", tmp_path / f"two {name}")
    for name in shared:
        assert_same_run(tmp_path / f"one {name}", tmp_path / f"shares {name}")
    assert_same_checkpoint(tmp_path / f"shares {shared[-1]}", tmp_path / "stopped")


@pytest.mark.filterwarnings("ignore")
def test_shares_are_what_the_configuration_says_and_refuse_what_they_cannot_train():
    values = yaml.safe_load((ROOT / "configs" / "trainer" / "fsdp.yaml").read_text())
    strategy = Trainer(**values | {"accelerator": "cpu", "devices": 1}).strategy
    assert isinstance(strategy, Sharded)
    network = EGNN(3.5, num_layers=1, hidden_channels=4)
    for task, message in (
        (AtomisticTask(network, recompute=2), "leave one of the two out"),
        (LightningModule(), "take trainer.strategy ddp"),
    ):
        strategy.connect(task)
        with pytest.raises(ValueError, match=message):
            strategy.setup(task)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_two_processes_killed_in_an_epoch_end_with_the_same_weights(tmp_path: Path):
    more = ["--data.max_structures=2", "--trainer.devices=2", "--trainer.strategy=ddp"]
    more += ["--checkpoint.monitor=null", "--checkpoint.every_n_train_steps=3", "--ckpt_path=last"]
    killed = [*written(tmp_path, "killed", "egnn"), *more]
    running = start(tmp_path, [[*killed, "--trainer.callbacks+=train.Stops"]], stop_at=7)
    for process in running:  # a step after the checkpoint at 6, one before the end of an epoch
        assert process.stdout is not None
        lines = []
        for line in process.stdout:  # ends with the process, should it never stop
            lines.append(line)
            if STOPPED in line:
                break
        assert STOPPED in lines[-1], "".join(lines)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    path = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 6
    finish(start(tmp_path, [killed, [*written(tmp_path, "whole", "egnn"), *more]]))
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "killed")


def test_shares_are_disjoint_complete_and_balanced():
    rng = np.random.RandomState(0)
    atoms = labelled_copper(40)
    graphs = [RadiusGraph(2.8 + 2 * rng.rand())(one) for one in atoms]
    dataset = GraphDataset(graphs)
    whole = list(BudgetBatchSampler(dataset, max_structures=12, shuffle=True, epoch=2))
    options = {"max_structures": 4, "shuffle": True, "epoch": 2, "n_ranks": 3}
    shares = [list(BudgetBatchSampler(dataset, rank=k, **options)) for k in range(3)]
    edges = np.array([graph.n_edges for graph in graphs])
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(k for part in parts for k in part) == sorted(batch)
        loads = [edges[part].sum() for part in parts]
        assert max(loads) - min(loads) <= edges[batch].max()
    counted = [k for batch in whole for k in batch]
    assert sorted(counted) == list(range(40))


def test_an_empty_share_has_no_part_in_the_loss():
    build = RadiusGraph(3.5)
    dataset = GraphDataset([build(atoms) for atoms in labelled_copper(3)])
    graph = dataset.__getitems__([])
    assert graph["dataset_index"].tolist() == [-1]
    forces = torch.ones(graph.n_atoms, 3, requires_grad=True)
    energy = torch.ones(1, dtype=torch.float64, requires_grad=True)
    loss = PotentialLoss()({"energy": energy, "forces": forces}, graph)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert forces.grad is not None
    assert float(forces.grad.abs().sum()) == 0
    scalar = torch.ones(1)
    labelled = graph.replace(scalar=torch.full((1,), float("nan")))
    assert float(ScalarLoss()({"scalar": scalar}, labelled)["loss"]) == 0


@pytest.mark.filterwarnings("ignore")
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path):
    more = ["--trainer.max_epochs=2", "--data.split.val=6"]  # 12 to train, in full batches
    runs = {"one": ["--data.max_structures=4"], "parts": ["--data.max_structures=2"]}
    runs["parts"] += ["--trainer.accumulate_grad_batches=2", "--model.loss.forces=0"]
    runs["one"] += ["--model.loss.forces=0"]
    for name, words in runs.items():
        command([*written(tmp_path, name, "egnn"), *more, *words])
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, rtol=1e-5, atol=1e-6)
