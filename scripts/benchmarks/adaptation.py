"""A network that knows molecules only as they lie, made invariant by a learned orientation.

Ethanol (rMD17, PBE), every molecule turned so that its carbons and its oxygen lie alike: FAENet
without frames learns that (configs/experiment/adaptation_1.yaml), then behind a canonicalizer
(adaptation_2.yaml, arXiv:2310.01647). Both are tested on molecules as they lie and turned anyhow.
Called again it goes on where it was stopped; some three CPU minutes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from ase.io import write as write_structures
from scipy.spatial.transform import Rotation

from atomeq.cli.structures import versions
from atomeq.data.ase_files import expand_data_path
from benchmarks.record import RESULTS, ROOT, atomeq, fit, write

FILE = RESULTS / "adaptation.json"
SOURCE = "${ATOMEQ_DATA}/ethanol_rmd17_pbe"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    options = parser.parse_args(argv)
    runs = options.runs.resolve()
    data = ["train", *write_data(runs / "adaptation-data")]
    tests = {name: f"{runs}/adaptation-data/{name}.extxyz" for name in data[1:]}
    words = [
        f"--data.train={runs}/adaptation-data/train.extxyz",
        f"--data.test={json.dumps(tests)}",
    ]
    rows = {}
    for stage, more in (("1", []), ("2", [f"--model.start_from={runs}/adaptation_1/potential"])):
        name, run = f"adaptation_{stage}", runs / f"adaptation_{stage}"
        given = ["-c", str(ROOT / "configs" / "experiment" / f"{name}.yaml"), *words, *more]
        fit(run, given)
        if not (run / "test_errors.json").exists():
            best = f"--ckpt_path={run}/checkpoints/best.ckpt"
            atomeq("test", *given, f"--trainer.default_root_dir={run}", best)
        rows[name] = row_of(run)
    document = {
        "command": "python scripts/benchmark.py adaptation",
        "what": "ethanol: 950 molecules laid alike to learn from, 50 choose the epoch, tested on "
        "MD as it lies and turned; before: the canonicalizer untrained, on the 50",
        "unit": "energy meV/atom, forces meV/Å, turn degrees; mean absolute",
        "versions": versions(),
        "stages": rows,
    }
    write(FILE, document)
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    return 0


def write_data(folder: Path) -> dict[str, str]:
    """Write molecules laid alike to train and to test on, and turned ones; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    source = expand_data_path(SOURCE)
    train, test = (read(f"{source}/{n}.extxyz.gz", ":") for n in ("train", "test_MD"))
    heavy = train[0].numbers > 1
    like = train[0].positions[heavy] - train[0].positions[heavy].mean(axis=0)
    lying = [turned(atoms, laid(atoms.positions[heavy], like)) for atoms in test]
    anyhow = Rotation.random(len(test), random_state=0)
    sets = {
        "train": [turned(atoms, laid(atoms.positions[heavy], like)) for atoms in train],
        "lying": lying,
        "turned": [turned(atoms, turn) for atoms, turn in zip(lying, anyhow, strict=True)],
    }
    files = {name: str(folder / f"{name}.extxyz") for name in sets}
    for name, structures in sets.items():
        write_structures(files[name], structures)
    return files


def laid(pos: np.ndarray, like: np.ndarray) -> Rotation:
    """Return the rotation that lays positions about their mean upon others."""
    return Rotation.align_vectors(like, pos - pos.mean(axis=0))[0]


def turned(atoms: Atoms, turn: Rotation) -> Atoms:
    """Return a molecule and the forces on it, turned."""
    pos = turn.apply(atoms.positions - atoms.positions.mean(axis=0))
    other = Atoms(atoms.numbers, pos)
    forces = turn.apply(atoms.get_forces())
    other.calc = SinglePointCalculator(other, energy=atoms.get_potential_energy(), forces=forces)
    return other


def row_of(run: Path) -> dict[str, Any]:
    """Return the errors of a finished run, and what it took."""
    found = json.loads((run / "test_errors.json").read_text())
    told = yaml.safe_load((run / "potential" / "model.yaml").read_text())["metadata"]
    return {
        **{name: shown(errors) for name, errors in found.items()},
        "before": shown(told["validation_before"]),
        "cpu_seconds": sum(json.loads((run / "cpu_seconds.json").read_text())),
        "commit": (run / "commit").read_text(),
    }


def shown(errors: dict[str, float]) -> dict[str, float]:
    """Return mean absolute errors of energy and forces, and by how much structures are turned."""
    keys = {"energy": "energy_per_atom_mae", "forces": "forces_mae", "turn": "turn_mae"}
    return {name: round(errors[key], 2) for name, key in keys.items() if key in errors}
