"""Every experiment parses and fits one batch; with the public data at hand, on that data.

Those of other tasks than potentials are fitted in tests/training.
"""

import gzip
import shutil
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from qm9 import write_archive

from atomeq.cli.training import main
from atomeq.models.nequip import NequIP
from atomeq.potential.checkpoint import build_model, load_predictor, save_potential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
#: OC20 is a download of gigabytes: here these are read to the last key, and fits on its formats are
#: in tests/training/test_oc20_fit.py.
OC20 = [path for path in EXPERIMENTS if path.stem.startswith("oc20_")]
POTENTIALS = [
    path
    for path in EXPERIMENTS
    if path not in OC20 and "task" not in yaml.safe_load(path.read_text())
]
ONE_BATCH = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
]

#: Published sizes are for 110,000 molecules; here are twenty, and two make a step.
FEW_MOLECULES = ["--data.split.val=2", "--data.split.test=2", "--data.max_structures=2"]


def labelled(atoms: Atoms, n_structures: int) -> list[Atoms]:
    """Copies with arbitrary labels: configurations are tested here, not learning."""
    rng = np.random.RandomState(0)
    copies = []
    for _ in range(n_structures):
        copy = atoms.copy()
        copy.rattle(0.05, rng=rng)
        results = {"energy": rng.normal(), "forces": rng.normal(size=(len(atoms), 3))}
        if atoms.pbc.all():
            results["stress"] = rng.normal(size=6) * 1e-2
        copy.calc = SinglePointCalculator(copy, **results)
        copies.append(copy)
    return copies


@pytest.fixture
def generated_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the names of the public sets and small structures of the same elements."""
    folder = tmp_path / "data"
    names = ("acac", "ethanol_rmd17_pbe", "mvl_snap", "mattersim_benchmarks")
    for name in (*names, "qm7", "qm9", "pcqm4mv2"):
        (folder / name).mkdir(parents=True)
    acid = labelled(molecule("CH3COOH"), 20)
    for name in ("train_300K", "test_MD_300K", "test_MD_600K"):
        ase.io.write(folder / "acac" / f"{name}.extxyz.gz", acid)
    isolated = [Atoms(symbol, info={"energy": -1.0}) for symbol in "HCO"]
    for name in ("acac", "ethanol_rmd17_pbe"):
        ase.io.write(folder / name / "isolated_atoms.extxyz", isolated)
    for name in ("train.extxyz.gz", "test_MD.extxyz.gz", "test_H_removal.extxyz"):
        ase.io.write(folder / "ethanol_rmd17_pbe" / name, acid)
    for mode in (874, 3005):
        ase.io.write(folder / "ethanol_rmd17_pbe" / f"test_norm_mode_{mode}.extxyz", acid)
    ase.io.write(folder / "mvl_snap" / "Cu.extxyz.gz", labelled(bulk("Cu", cubic=True), 30))
    salt = labelled(bulk("NaCl", "rocksalt", a=5.6), 12)
    ase.io.write(folder / "mattersim_benchmarks" / "mpf-alkali-TP.extxyz.gz", salt)
    for atoms in (energies_only := labelled(molecule("CH3COOH"), 30)):
        del atoms.calc.results["forces"]  # QM7 has none
    ase.io.write(folder / "qm7" / "qm7.extxyz.gz", energies_only)
    old = folder / "mattersim_benchmarks" / "mptrj-random-1k.extxyz.gz"
    ase.io.write(old, labelled(bulk("Cu", cubic=True), 30))
    write_archive(folder / "qm9", repeats=5)
    with gzip.open(folder / "pcqm4mv2" / "data.csv.gz", "wt") as table:
        table.write("idx,smiles,homolumogap\n" + "".join(f"{k},CC=O,{k}\n" for k in range(20)))
    parts = {"train": np.arange(16), "valid": np.arange(16, 18), "test-dev": np.arange(18, 20)}
    torch.save(parts, folder / "pcqm4mv2" / "split_dict.pt")
    monkeypatch.setenv("ATOMEQ_DATA", str(folder))
    # As `atomeq potentials install sevennet-0` leaves it, but small.
    monkeypatch.setenv("ATOMEQ_POTENTIALS", str(tmp_path / "potentials"))
    irreps = ["8x0e", "8x0e+4x1e", "8x0e"]
    model = NequIP(4.0, irreps=irreps, parity=False, elements=[8, 29], sevennet={})
    references = AtomicReferences({8: -1.0, 29: -3.0})
    save_potential(Potential(model, references), tmp_path / "potentials" / "sevennet-0")
    # As the first stage of direct_to_conservative leaves it.
    first = yaml.safe_load((CONFIGS / "experiment" / "direct_to_conservative_1.yaml").read_text())
    direct = Potential(build_model(first["model"]["model"]), AtomicReferences({11: -1.0, 17: -2.0}))
    save_potential(direct, tmp_path / "potentials" / "direct_to_conservative_1")
    return folder


@pytest.mark.parametrize("experiment", OC20, ids=lambda path: path.stem)
def test_oc20_experiments_are_read(experiment: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(experiment), "--print_config"])
    assert not stop.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["metrics"]["class_path"].endswith("OC20Errors")


@pytest.mark.parametrize("experiment", POTENTIALS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("generated_data")
def test_every_experiment_fits_a_batch(tmp_path: Path, monkeypatch, experiment: Path):
    monkeypatch.chdir(tmp_path)
    few = FEW_MOLECULES if experiment.stem.startswith(("qm9_", "finetune_")) else []
    main(["fit", "-c", str(experiment), *ONE_BATCH, *few])
    run = tmp_path / "runs" / experiment.stem
    potential = load_predictor(run / "potential")
    node = yaml.safe_load((run / "config.yaml").read_text())["model"]
    expected = node.get("model") or load_predictor(node["start_from"]).model.config()
    assert potential.model.config()["class_path"] == expected["class_path"]
    # The saved configuration is complete: it runs again without the files it was made of.
    shutil.copy(run / "config.yaml", tmp_path / "again.yaml")
    main(["fit", "-c", str(tmp_path / "again.yaml"), "--trainer.default_root_dir=again"])
    assert (tmp_path / "again" / "potential").is_dir()


def test_every_experiment_is_in_the_table():
    table = (CONFIGS / "README.md").read_text()
    for experiment in EXPERIMENTS:
        assert f"configs/experiment/{experiment.name}" in table


@pytest.mark.parametrize("name", ["acac_egnn", "cu_pbe", "qm9_faenet"])
def test_public_data_fit_a_batch(tmp_path: Path, data_folder: Path, capsys, name: str):
    experiment = str(CONFIGS / "experiment" / f"{name}.yaml")
    words = ["-c", experiment, f"--trainer.default_root_dir={tmp_path}"]
    if name == "qm9_faenet":  # what is public of QM9 here are 100 molecules
        sample = data_folder / "qm9" / "qm9_first100.extxyz.gz"
        words += [f"--data.train={sample}", "--data.split.val=0.1", "--data.split.test=0.1"]
    main(["fit", *words, *ONE_BATCH])
    best = f"--ckpt_path={tmp_path / 'checkpoints' / 'best.ckpt'}"
    main(["test", *words, best, "--trainer.limit_test_batches=1", "--trainer.accelerator=cpu"])
    sets = {"acac_egnn": ("300K", "600K"), "cu_pbe": ("held_out",), "qm9_faenet": ("held_out",)}
    printed = capsys.readouterr().out
    assert all(test_set in printed for test_set in sets[name])
