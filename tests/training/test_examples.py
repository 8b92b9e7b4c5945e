"""The examples for clusters pass options that parse, name what is there, and train on Ray."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from copper_experiment import copper_file, experiment  # noqa: F401

from atomeq.cli import main as command

ROOT = Path(__file__).parents[2]
SLURM, RAY = (ROOT / "docs" / "examples" / name for name in ("slurm.sh", "ray_train.py"))
# Ray counts the cores of the machine: two workers get theirs wherever this runs.
ON_RAY = """
import ray, runpy, sys
ray.init(num_cpus=3, include_dashboard=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def parsed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``atomeq fit`` understands of its words; it ends with 2 where one is wrong."""
    with pytest.raises(SystemExit) as stop:
        command([*words, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


def test_experiments_that_examples_name_are_there():
    texts = [path.read_text() for path in (SLURM, RAY, ROOT / "docs" / "clusters.md")]
    named = set(re.findall(r"configs/experiment/[a-z]\w*\.yaml", "".join(texts)))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_slurm_job_passes_options_that_parse(
    tmp_path: Path,
    experiment: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    subprocess.run(["bash", "-n", SLURM], check=True)
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM.read_text(), re.MULTILINE))
    assert told["ntasks-per-node"] == told["gpus-per-node"]
    variables = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_NNODES": told["nodes"],
        "SLURM_NTASKS_PER_NODE": told["ntasks-per-node"],
    }
    run = ["bash", str(SLURM), str(experiment)]
    done = subprocess.run(run, env=variables, check=True, capture_output=True, text=True)
    program, *words = done.stdout.splitlines()
    assert program == "atomeq"
    found = parsed(words, capsys)
    assert (found["trainer"]["num_nodes"], found["trainer"]["devices"]) == (2, "4")
    assert found["trainer"]["strategy"] == "ddp"
    assert found["checkpoint"]["every_n_train_steps"] == 1000
    assert found["checkpoint"]["monitor"] is None
    assert found["ckpt_path"] == "last"
    refused = subprocess.run(run[:2], env=variables, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "give an experiment" in refused.stderr


def test_a_worker_of_ray_passes_options_that_parse(
    experiment: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    context = SimpleNamespace(get_local_rank=lambda: 1, get_local_world_size=lambda: 4)
    for name in ("ray", "ray.train", "ray.train.torch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["ray"], "train", sys.modules["ray.train"], raising=False)
    monkeypatch.setattr(sys.modules["ray.train"], "get_context", lambda: context, raising=False)
    monkeypatch.setattr(sys.modules["ray.train.torch"], "TorchTrainer", None, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    words: list[str] = []
    fit = runpy.run_path(str(RAY))["fit"]
    monkeypatch.setitem(fit.__globals__, "main", words.extend)
    fit({"experiment": str(experiment), "workers": 8})
    assert os.environ["LOCAL_RANK"] == "1"
    found = parsed(words, capsys)
    assert (found["trainer"]["num_nodes"], found["trainer"]["devices"]) == (2, "4")
    assert (found["trainer"]["strategy"], found["ckpt_path"]) == ("ddp", "last")


@pytest.mark.slow
def test_two_workers_of_ray_train_one_potential(tmp_path: Path, experiment: Path):  # noqa: F811
    pytest.importorskip("ray.train", reason="Ray is the extra atomeq[ray]")
    document = yaml.safe_load(experiment.read_text())
    document["trainer"]["max_epochs"] = 1
    experiment.write_text(yaml.safe_dump(document))
    paths = os.pathsep.join(path for path in sys.path if path)
    variables = {
        **os.environ,
        "PYTHONPATH": paths,
        "HOME": str(tmp_path),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    subprocess.run(
        [sys.executable, "-c", ON_RAY, str(RAY), str(experiment), "2"],
        env=variables,
        cwd=tmp_path,
        check=True,
        timeout=600,
    )
    assert (tmp_path / "run" / "potential" / "config.yaml").is_file()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
