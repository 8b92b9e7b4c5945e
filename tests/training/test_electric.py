"""Dipoles and polarizabilities are read, learned, reported and saved."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import molecule
from ase.stress import full_3x3_to_voigt_6_stress

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.training import main
from atomeq.data.ase_files import DataError, LabelKeys, other_labels, read_structures
from atomeq.data.stored_files import read_stored, write_stored
from atomeq.potential.checkpoint import load_potential

CHARGES = {"H": 0.1, "C": 0.0, "N": -0.2, "O": -0.3}  # e
VOLUMES = {"H": 0.03, "C": 0.1, "N": 0.08, "O": 0.05}  # e²·Å²/eV
NAMES = ["NH3", "H2O", "CH3OH", "HCN", "H2CO", "CH3CH2OH", "CH4", "CH3NO2"]
LABELS = LabelKeys(dipole="dipole", polarizability="alpha", born_effective_charges="bec")


def labelled(n_structures: int = 40) -> list[Atoms]:
    """Molecules with charges of their elements, shared out, and additive polarizabilities."""
    rng = np.random.RandomState(0)
    structures = []
    for k in range(n_structures):
        atoms = molecule(NAMES[k % len(NAMES)])
        atoms.rattle(0.05, rng=rng)
        charges = np.array([CHARGES[s] for s in atoms.symbols])
        charges -= charges.mean()
        atoms.info["dipole"] = charges @ atoms.positions
        alpha = sum(VOLUMES[s] for s in atoms.symbols) * np.eye(3)
        atoms.info["alpha"] = alpha if k % 2 else full_3x3_to_voigt_6_stress(alpha)
        atoms.arrays["bec"] = (charges[:, None, None] * np.eye(3)).reshape(-1, 9)
        structures.append(atoms)
    return structures


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dipoles.extxyz"
    ase.io.write(path, labelled(), format="extxyz")
    return path


@pytest.fixture
def experiment(tmp_path: Path, file: Path) -> Path:
    model = {
        "class_path": "atomeq.models.electric.Electric",
        "init_args": {
            "energies": False,
            "model": {
                "class_path": "atomeq.models.egnn.EGNN",
                "init_args": {"cutoff": 3.0, "num_layers": 1, "hidden_channels": 16},
            },
        },
    }
    document = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 25, "default_root_dir": str(tmp_path / "run"), "devices": 1,
                    "accelerator": "cpu", "inference_mode": False, "num_sanity_val_steps": 0},
        "model": {
            "model": model,
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            "loss": {"energy": 0, "forces": 0, "dipole": 1, "polarizability": 10},
        },
        "data": {"class_path": "atomeq.data.datamodule.AtomisticDataModule",
                 "init_args": {"train": str(file), "labels": {"polarizability": "alpha"},
                               "split": {"val": 8, "test": 8}, "max_structures": 8}},
    }  # fmt: skip
    path = tmp_path / "dipoles.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_fit_learns_and_reports_them_in_the_units_of_the_field(experiment: Path, tmp_path: Path):
    main(["fit", "-c", str(experiment)])
    run = tmp_path / "run"
    main(["test", "-c", str(experiment), "--ckpt_path", str(run / "checkpoints" / "best.ckpt")])
    (errors,) = json.loads((run / "test_errors.json").read_text()).values()
    assert errors["dipole_mae"] < 0.25  # D; the labels' own size is 0.6
    assert errors["polarizability_mae"] < 5  # bohr³, of 45
    calculator = AtomeqCalculator(run / "potential")
    with pytest.raises(NotImplementedError):
        calculator.get_potential_energy(molecule("H2O"))
    water = calculator.get_property("dipole", molecule("H2O"))
    charge = (CHARGES["H"] - CHARGES["O"]) * 2 / 3
    expected = charge * (molecule("H2O").positions[1:].mean(axis=0) - molecule("H2O").positions[0])
    assert np.linalg.norm(water - expected) < 0.3 * np.linalg.norm(expected)
    card = (run / "potential" / "README.md").read_text()
    assert "| predicts | dipole, polarizability, born effective charges |" in card


def test_predictions_hold_them(experiment: Path, file: Path, tmp_path: Path):
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=1"])
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    main(["predict", "-c", str(experiment), f"--data.predict={file}", f"--ckpt_path={best}"])
    predicted = ase.io.read(tmp_path / "run" / "predictions.extxyz", index=":")
    potential = load_potential(tmp_path / "run" / "potential")
    found = potential(potential.build_graph(predicted[3]), ("dipole", "polarizability"))
    np.testing.assert_allclose(predicted[3].get_dipole_moment(), found["dipole"][0], atol=1e-6)
    np.testing.assert_allclose(
        predicted[3].info["polarizability"], found["polarizability"][0], atol=1e-6
    )


def test_energies_that_no_loss_trains_are_refused(experiment: Path):
    with pytest.raises(DataError, match="energies that were never trained; say energies: false"):
        main(["fit", "-c", str(experiment), "--model.model.init_args.energies=true"])


def test_a_loss_of_what_the_model_does_not_give_is_refused(experiment: Path):
    with pytest.raises(
        ValueError, match="made for polarizability alone: it has no energy and so no dipole"
    ):
        main(["fit", "-c", str(experiment),
              "--model.model.init_args.properties=[polarizability]"])  # fmt: skip


def test_born_charges_are_labels_too(experiment: Path, tmp_path: Path):
    words = ["--data.labels.born_effective_charges=bec", "--model.loss.born_effective_charges=1"]
    main(["fit", "-c", str(experiment), *words])
    main(["validate", "-c", str(experiment), *words,
          "--ckpt_path", str(tmp_path / "run" / "checkpoints" / "best.ckpt")])  # fmt: skip
    potential = load_potential(tmp_path / "run" / "potential")
    (atoms,) = labelled(1)
    found = potential(potential.build_graph(atoms), ("born_effective_charges",))
    error = found["born_effective_charges"].numpy().reshape(-1, 9) - atoms.arrays["bec"]
    assert np.abs(error).mean() < 0.06  # e; of the labels' 0.1 on the diagonal


def test_labels_are_read_in_each_form_and_kept_by_hdf5(file: Path, tmp_path: Path):
    read = list(read_structures(file, labels=LABELS))
    for atoms, made in zip(read, labelled(), strict=True):
        given = other_labels(atoms)
        np.testing.assert_allclose(given["dipole"][0], made.info["dipole"], atol=1e-7)
        assert given["polarizability"].shape == (1, 3, 3)
        assert np.trace(given["polarizability"][0]) == pytest.approx(
            3 * sum(VOLUMES[s] for s in atoms.symbols)
        )
        assert given["born_effective_charges"].shape == (len(atoms), 3, 3)
    write_stored(tmp_path / "d.h5", iter(read))
    for before, after in zip(read, read_stored(tmp_path / "d.h5"), strict=True):
        for key, value in other_labels(before).items():
            np.testing.assert_allclose(other_labels(after)[key], value, atol=1e-9)


def test_a_file_of_other_things_by_these_names_stays_readable(tmp_path: Path):
    """They are labels where something asks for them: a dipole may be a length elsewhere."""
    atoms = molecule("H2O")
    atoms.info |= {"dipole": 1.85, "polarizability": 9.9, "quadrupole": "unknown"}
    ase.io.write(tmp_path / "one.extxyz", atoms, format="extxyz")
    (read,) = read_structures(tmp_path / "one.extxyz")
    assert len(read) == 3
    assert other_labels(read) == {}
    with pytest.raises(DataError, match=r"frame 0: label 'dipole' has shape \(\)"):
        list(read_structures(tmp_path / "one.extxyz", labels=LABELS))
