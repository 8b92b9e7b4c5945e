"""A MACE of mace-torch trained on acetylacetone by its own command, to be tested by ours.

The network is 32x0e+32x1o, two layers, products of three factors, cutoff 5 Å. Rate, AMSGrad and the
average of weights are what its authors train small molecules with; the rate falls to a fiftieth
over the epochs there are, where their thousands of epochs wait for plateaus.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms

from atomeq.data.ase_files import resolve_data_path
from atomeq.data.splits import Split, split_indices
from benchmarks.record import children_cpu_seconds

FINAL_RATE = 0.02  # of the first
NAME = "mace_torch"
SEED = 0


def version(python: str) -> str:
    """Return that of an interpreter's mace-torch."""
    code = "from importlib.metadata import version; print('mace-torch', version('mace-torch'))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def cost_of_fit(python: str, data: dict[str, Any], run: Path, n_epochs: int) -> float:
    """Train, and return the CPU seconds of it, the start of the process included.

    Args:
        python: An interpreter with mace-torch.
        data: Arguments of the data module of an experiment: its file, its split, its batches.
        run: Folder; ``mace_torch.model`` comes to lie in it.
        n_epochs: Of these.
    """
    run.mkdir(parents=True, exist_ok=True)
    train, val = _written(data, run)
    references = ase.io.read(resolve_data_path("${ATOMEQ_DATA}/acac/isolated_atoms.extxyz"), ":")
    energies = {int(one.numbers[0]): float(one.get_potential_energy()) for one in references}
    words = {
        "name": NAME, "work_dir": run, "model_dir": run, "seed": SEED, "plot": False,
        "train_file": train, "valid_file": val, "E0s": energies, "model": "MACE",
        "hidden_irreps": "32x0e + 32x1o", "r_max": 5.0, "num_interactions": 2, "correlation": 3,
        "max_ell": 3, "batch_size": data["max_structures"], "valid_batch_size": 10, "lr": 0.01,
        "ema_decay": 0.99, "energy_weight": 1.0, "forces_weight": 10.0, "scaling":
        "rms_forces_scaling", "max_num_epochs": n_epochs, "eval_interval": max(1, n_epochs // 40),
        "scheduler": "ExponentialLR", "lr_scheduler_gamma": FINAL_RATE ** (1 / n_epochs),
        "default_dtype": "float32", "device": "cpu", "error_table": "TotalRMSE",
    }  # fmt: skip
    command = [python, "-m", "mace.cli.run_train", "--ema", "--amsgrad", "--save_cpu"]
    command += [f"--{key}={value}" for key, value in words.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    before = children_cpu_seconds()
    subprocess.run(command, env=environment, check=True, cwd=run)
    return children_cpu_seconds() - before


def _written(data: dict[str, Any], run: Path) -> list[Path]:
    """Write what to train on and what chooses the epoch, with labels as mace-torch calls them."""
    structures = ase.io.read(resolve_data_path(data["train"]), ":")
    parts = split_indices(len(structures), Split(**data["split"]))
    files = []
    for part in ("train", "val"):
        files.append(run / f"{part}.xyz")
        ase.io.write(files[-1], [_relabelled(structures[i]) for i in parts[part]], format="extxyz")
    return files


def _relabelled(atoms: Atoms) -> Atoms:
    own = Atoms(atoms.numbers, atoms.positions)
    own.info["REF_energy"] = atoms.get_potential_energy()
    own.arrays["REF_forces"] = atoms.get_forces()
    return own
