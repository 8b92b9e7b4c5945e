"""A small copper set with EMT labels, and a configuration that trains on it in seconds."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

N_STRUCTURES = 24


def labelled_copper(n_structures: int = N_STRUCTURES, seed: int = 0) -> list[Atoms]:
    """Rattled cells of 4 and 8 atoms, so that batches by a budget of atoms differ in size."""
    rng = np.random.RandomState(seed)
    structures = []
    for k in range(n_structures):
        atoms = bulk("Cu", cubic=True).repeat((1 + k % 2, 1, 1))
        atoms.set_cell(atoms.cell.array * (1 + rng.uniform(-0.03, 0.03)), scale_atoms=True)
        atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
        atoms.calc = EMT()
        results = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        atoms.calc = SinglePointCalculator(atoms, **results)
        structures.append(atoms)
    return structures


@pytest.fixture(scope="session")
def copper_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "cu.extxyz"
    ase.io.write(path, labelled_copper())
    return path


@pytest.fixture
def experiment(tmp_path: Path, copper_file: Path) -> Path:
    """An experiment's YAML: a small EGNN on 20 structures, 2 to validate and 2 to test."""
    document = {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path / "run"),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        },
        "model": {
            "model": {
                "class_path": "atomeq.models.egnn.EGNN",
                "init_args": {"cutoff": 3.5, "num_layers": 1, "hidden_channels": 8},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "scheduler": {"class_path": "atomeq.training.schedules.WarmupCosine"},
            "loss": {"energy": 1.0, "forces": 1.0, "stress": 1.0},
        },
        "data": {
            "class_path": "atomeq.data.datamodule.AtomisticDataModule",
            "init_args": {
                "train": str(copper_file),
                "split": {"val": 0.1, "test": 0.1},
                "max_atoms": 24,
            },
        },
        "ema": {"decay": 0.9},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(document))
    return path
