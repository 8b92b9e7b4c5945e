"""Every experiment parses and fits one batch; with the public data at hand, on that data.

Published divisions are of more structures than here are: what says so is overridden.
"""

import gzip
import importlib
import inspect
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
from oc20 import slab_frames
from qm9 import write_archive

from atomeq.cli.training import main
from atomeq.data.oc20_write import write_lmdb
from atomeq.data.qm9 import TARGET_NAMES
from atomeq.models.nequip import NequIP
from atomeq.potential.checkpoint import build_model, load_predictor, save_potential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.scalar import ScalarPredictor

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
#: OC20 is a download of gigabytes: here each takes a step on frames in its formats, with a network
#: of the same class and options made narrow; further fits are in tests/training/test_oc20_fit.py.
OC20 = [path for path in EXPERIMENTS if path.stem.startswith("oc20_")]
#: What makes the networks of OC20 small, by the key that each class has.
NARROW = {
    "num_layers": 1, "sphere_channels": 4, "hidden_channels": 40, "edge_channels": 4,
    "num_heads": 2, "attn_hidden_channels": 4, "attn_alpha_channels": 4, "attn_value_channels": 2,
    "num_radial": 8, "ffn_hidden_channels": 4, "num_filters": 8, "num_interactions": 1,
    "num_gaussians": 8,
    "decoder_channels": 8, "tag_channels": 4, "pg_channels": 4, "num_sphere_samples": 8,
}  # fmt: skip
FAST = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.devices=1"]
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

#: The published divisions are of a hundred thousand frames; here are eighty.
FEW_FRAMES = {
    "md22_mace": ["--data.split={train: 8, val: 2, test: 2}"],
    "rmd17_mace": ["--data.split.val=4"],
    "nbmotaw_pbe": ["--data.split={file: null, val: 2, test: 2}"],
    "finetune_high_pressure": ["--data.replay.val=4"],
}


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
    names = ("acac", "ethanol_rmd17_pbe", "mvl_snap", "mlearn", "mattersim_benchmarks", "3bpa")
    for name in (*names, "qm7", "qm9", "pcqm4mv2", "md22", "rmd17/npz_data", "rmd17/splits"):
        (folder / name).mkdir(parents=True)
    acid = labelled(molecule("CH3COOH"), 20)
    acac = [f"acac/{name}.extxyz.gz" for name in ("train_300K", "test_MD_300K", "test_MD_600K")]
    files = ("train.extxyz.gz", "test_MD.extxyz.gz", "test_H_removal.extxyz")
    modes = (f"test_norm_mode_{mode}.extxyz" for mode in (874, 3005))
    ethanol = [f"ethanol_rmd17_pbe/{name}" for name in (*files, *modes)]
    for name in (*acac, *ethanol, "3bpa/train_300K.extxyz.gz", "3bpa/train_mixedT.extxyz.gz"):
        ase.io.write(folder / name, acid)
    for atoms in (moments := labelled(molecule("CH3COOH"), 20)):
        atoms.info |= {"dipole": atoms.positions[0], "polarizability": np.eye(3)}
    ase.io.write(folder / "gfn2_qm7.extxyz", moments)
    for name in ("acac", "ethanol"):
        ase.io.write(folder / f"gfn2_{name}.extxyz", acid)
    write_md_archives(folder, acid)
    isolated = [Atoms(symbol, info={"energy": -1.0}) for symbol in "HCO"]
    ase.io.write(folder / "3bpa" / "iso_atoms.extxyz", isolated)
    for name in ("acac", "ethanol_rmd17_pbe"):
        ase.io.write(folder / name / "isolated_atoms.extxyz", isolated)
    # As many as cu_split.json divides.
    ase.io.write(folder / "mvl_snap" / "Cu.extxyz.gz", labelled(bulk("Cu"), 294))
    monkeypatch.setenv("ELEMENT", "Si")
    for name, n in (("Si_train", 214), ("Si_test", 2), ("Mo_train", 194), ("Mo_test", 2)):
        ase.io.write(folder / "mlearn" / f"{name}.extxyz.gz", labelled(bulk(name[:2]), n))
    ase.io.write(folder / "mvl_snap" / "NbMoTaW.extxyz.gz", labelled(bulk("Ta", cubic=True), 12))
    salt = labelled(bulk("NaCl", "rocksalt", a=5.6), 12)
    for atoms in (energies_only := labelled(molecule("CH3COOH"), 30)):
        del atoms.calc.results["forces"]  # QM7 has none
    ase.io.write(folder / "qm7" / "qm7.extxyz.gz", energies_only)
    old = labelled(bulk("Cu", cubic=True), 30)
    for name, frames in {"mpf-alkali-TP": salt, "mptrj-random-1k": old}.items():
        ase.io.write(folder / "mattersim_benchmarks" / f"{name}.extxyz.gz", frames)
    (folder / "high_pressure").mkdir()  # as scripts/high_pressure_frames.py divides them
    pressed = {"replay": old} | dict.fromkeys(("test_mptrj", "test_mptrj_large"), old[:2])
    pressed |= dict.fromkeys(("train", "val", "test", "test_highest_stress"), salt)
    for name, frames in pressed.items():
        ase.io.write(folder / "high_pressure" / f"{name}.extxyz", frames)
    write_archive(folder / "qm9", repeats=5)
    with gzip.open(folder / "pcqm4mv2" / "data.csv.gz", "wt") as table:
        table.write("idx,smiles,homolumogap\n" + "".join(f"{k},CC=O,{k}\n" for k in range(20)))
    parts = {"train": np.arange(16), "valid": np.arange(16, 18), "test-dev": np.arange(18, 20)}
    torch.save(parts, folder / "pcqm4mv2" / "split_dict.pt")
    monkeypatch.setenv("ATOMEQ_DATA", str(folder))
    monkeypatch.setenv("ATOMEQ_POTENTIALS", str(tmp_path / "potentials"))
    save_installed(tmp_path / "potentials")
    return folder


def save_installed(folder: Path) -> None:
    """What `atomeq potentials install` leaves, but small, and what first stages do."""
    irreps = ["8x0e", "8x0e+4x1e", "8x0e"]
    model = NequIP(4.0, irreps=irreps, parity=False, elements=[8, 11, 17, 29], sevennet={})
    for name in ("sevennet-0", "sevennet-l3i5"):
        references = AtomicReferences({8: -1.0, 11: -1.0, 17: -2.0, 29: -3.0})
        save_potential(Potential(model, references), folder / name)
    firsts = dict.fromkeys(("adaptation_1", "acac_gfn2_1", "ethanol_gfn2_1"), (1, 6, 8))
    for name, elements in (firsts | {"direct_to_conservative_1": (11, 17)}).items():
        first = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())
        references = AtomicReferences(dict.fromkeys(elements, -1.0))
        model = build_model(first["model"]["model"])
        save_potential(Potential(model, references), folder / name)


def write_md_archives(folder: Path, frames: list[Atoms]) -> None:
    """MD22 and rMD17 as they are published, and an index file of the latter."""
    pos = np.array([atoms.positions for atoms in frames]).repeat(8, axis=0)
    energies = np.array([atoms.get_potential_energy() for atoms in frames]).repeat(8)
    forces = np.array([atoms.get_forces() for atoms in frames]).repeat(8, axis=0)
    numbers = frames[0].numbers.astype(np.uint8)
    told = {"name": "acid", "theory": "PBE", "e_unit": "kcal/mol", "r_unit": "Ang", "type": "d"}
    np.savez_compressed(
        folder / "md22" / "md22_Ac-Ala3-NHMe.npz",
        z=numbers, R=pos, E=energies[:, None], F=forces, **told,
    )  # fmt: skip
    np.savez_compressed(
        folder / "rmd17" / "npz_data" / "rmd17_aspirin.npz",
        nuclear_charges=numbers, coords=pos, energies=energies, forces=forces,
        old_indices=np.arange(len(pos)), old_energies=energies, old_forces=forces,
    )  # fmt: skip
    for name, indices in (("train", range(0, 80, 2)), ("test", range(1, 80, 2))):
        text = "".join(f"{k}\n" for k in indices)
        (folder / "rmd17" / "splits" / f"index_{name}_01.csv").write_text(text)


@pytest.fixture(scope="module")
def oc20_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that a download and a conversion of OC20 leave, with a few frames in each."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("s2ef_2m", "s2ef_all", "s2ef_md", "s2ef_val_id"):
        (folder / "oc20" / name).mkdir(parents=True)
        write_lmdb(folder / "oc20" / name / "data.0000.lmdb", slab_frames(3), "referenced")
    is2re = folder / "oc20/oc20-is2re/is2res_train_val_test_lmdbs/data/is2re/all"
    for name in ("train", "val_id"):
        (is2re / name).mkdir(parents=True)
        write_lmdb(is2re / name / "data.lmdb", slab_frames(3, is2re=True), "stored")
    sample = folder / "formats" / "s2ef_lmdb_train_ref"
    sample.mkdir(parents=True)
    write_lmdb(sample / "data.0000.lmdb", slab_frames(3), "stored")
    return folder


def narrowed(node: dict) -> dict:
    """The node of a model with all its options, but those of its size."""
    module, _, name = node["class_path"].rpartition(".")
    takes = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    arguments = node["init_args"] | {k: value for k, value in NARROW.items() if k in takes}
    if "lmax" in arguments:
        several = isinstance(arguments["lmax"], list)
        arguments |= {"lmax": [2], "mmax": [2]} if several else {"lmax": 2, "mmax": 2}
    if arguments.get("grid_resolution"):
        arguments["grid_resolution"] = 6
    if "model" in arguments:
        arguments["model"] = narrowed(arguments["model"])
    return {**node, "init_args": arguments}


def whole_node(experiment: Path) -> dict:
    """The model of an experiment, that of another file included."""
    node = yaml.safe_load(experiment.read_text())["model"]["model"]
    if isinstance(node, str):
        node = yaml.safe_load((experiment.parent / node).read_text())
    return node


@pytest.mark.parametrize("experiment", OC20, ids=lambda path: path.stem)
def test_oc20_experiments_take_a_step(experiment: Path, oc20_data: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOMEQ_DATA", str(oc20_data))
    monkeypatch.setenv("ATOMEQ_FORMATS", str(oc20_data / "formats"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump(narrowed(whole_node(experiment))))
    words = [f"--model.model={model}", "--data.num_workers=0", "--data.max_structures=2"]
    if "finetune" in experiment.stem:
        frames = str(oc20_data / "oc20" / "s2ef_2m")
        words += [f"--data.train={frames}", f"--data.val={frames}", "--model.start_from=start"]
        start = build_model(yaml.safe_load(model.read_text()))
        save_potential(Potential(start), tmp_path / "start")
    main(["fit", "-c", str(experiment), *FAST, *words])
    assert (tmp_path / "runs" / experiment.stem / "potential" / "model.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", OC20, ids=lambda path: path.stem)
def test_oc20_experiments_build_their_networks(experiment: Path):
    """The published sizes, 31 to 200 million weights each: minutes and gigabytes."""
    assert build_model(whole_node(experiment)).config()["class_path"]


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_every_target_of_qm9_takes_a_step(target: str, generated_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"--model.target={target}", "--data.split={val: 2, test: 2}"]
    words += ["--model.model.num_layers=1", "--model.model.hidden_channels=8"]
    main(["fit", "-c", str(CONFIGS / "experiment" / "qm9_egnn.yaml"), *FAST, *words])
    predictor = load_predictor(tmp_path / "runs" / "qm9_egnn" / "potential")
    assert isinstance(predictor, ScalarPredictor)
    assert predictor.target.name == target


def test_the_published_run_on_md22_takes_a_step(generated_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["-c", str(CONFIGS / "experiment" / "md22_segno.yaml"), *FAST]
    main(["fit", *words])
    assert (tmp_path / "runs" / "md22_segno" / "propagator" / "model.yaml").is_file()


@pytest.mark.parametrize("experiment", POTENTIALS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("generated_data")
def test_every_experiment_fits_a_batch(tmp_path: Path, monkeypatch, experiment: Path):
    if "hgnn" in experiment.stem or "hypergraph" in experiment.stem:
        pytest.importorskip("rdkit.Chem", reason="RDKit is of the extra chemistry")
    monkeypatch.chdir(tmp_path)
    few = FEW_MOLECULES if experiment.stem.startswith(("qm9_", "finetune_")) else []
    few = few + FEW_FRAMES.get(experiment.stem, [])
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
