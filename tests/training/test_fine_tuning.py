"""Fine-tuning starts from a potential by its name: its model, elements, references and scale."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.convert import convert_checkpoint

FAKE = Path(__file__).parents[1] / "golden" / "sevennet" / "checkpoint_fake"
ZEROS = {"H": -0.7, "C": 2.5, "O": 1.1}  # eV, by which the energies of the data lie elsewhere
SMALL = {"class_path": "atomeq.models.egnn.EGNN", "init_args": {"hidden_channels": 4}}
NAMES = ("CH4", "C2H6", "H2O", "CH3OH", "CO2", "H2CO")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small SevenNet with a repulsion, installed as ``small``."""
    monkeypatch.setenv("ATOMEQ_POTENTIALS", str(tmp_path / "potentials"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "potentials" / "small"
    return convert_checkpoint(FAKE / "fake_new_0_13_0.pth", folder, zbl=True)


def write_data(path: Path, calculator: AtomeqCalculator, symbols: dict[str, float]) -> None:
    rng = np.random.RandomState(0)
    structures = []
    for k in range(24):
        atoms = molecule(NAMES[k % len(NAMES)])
        atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
        results = calculator.evaluate([atoms])[0]
        energy = results["energy"] + sum(symbols[s] for s in atoms.symbols)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=results["forces"])
        structures.append(atoms)
    ase.io.write(path, structures)


def experiment(tmp_path: Path, *, lr: float = 0.0, **model) -> list[str]:
    document = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "num_sanity_val_steps": 0},
        "model": {
            "start_from": "small",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}},
            "loss": {"energy": 1.0, "forces": 1.0},
            **model,
        },
        "data": {
            "class_path": "atomeq.data.datamodule.AtomisticDataModule",
            "init_args": {
                "train": str(tmp_path / "data.extxyz"),
                "split": {"val": 6},
                "max_structures": 4,
            },
        },
    }
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(document))
    return ["fit", "-c", str(path)]


def test_everything_is_kept_and_energies_are_moved_to_those_of_the_data(start, tmp_path, caplog):
    write_data(tmp_path / "data.extxyz", AtomeqCalculator("small"), ZEROS)
    with caplog.at_level("INFO"):
        main(experiment(tmp_path))
    before = load_potential(start)
    after = load_potential(tmp_path / "runs/tune/potential")
    assert after.model.config() == before.model.config()
    assert after.term_configs() == before.term_configs() != []
    assert after.elements == before.elements
    assert after.references.scale == before.references.scale
    for name, weight in before.model.state_dict().items():
        assert torch.equal(weight, after.model.state_dict()[name]), name  # the rate is zero
    moved = after.references.shift - before.references.shift
    numbers = torch.tensor([1, 6, 8, 7])
    expected = torch.tensor([*ZEROS.values(), 0.0], dtype=torch.float64)  # nitrogen is not in it
    torch.testing.assert_close(moved[numbers], expected, atol=1e-4, rtol=0)
    assert "H -0.7000, C +2.5000, O +1.1000" in caplog.text
    # Only distances that the data have are known anew.
    assert set(after.distances.shortest) >= {"H-C", "H-O"}
    assert after.distances.limit("H-C") <= before.distances.limit("H-C")


def test_errors_before_and_after_are_told_and_written(start, tmp_path, caplog):
    """The data are of a potential with other weights: training has something to learn."""
    other = load_potential("small").double()
    generator = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    write_data(tmp_path / "data.extxyz", AtomeqCalculator(other), ZEROS)
    with caplog.at_level("INFO"):
        main([*experiment(tmp_path, lr=3e-3), "--trainer.max_epochs=8"])
    folder = tmp_path / "runs/tune/potential"
    metadata = yaml.safe_load((folder / "model.yaml").read_text())["metadata"]
    before, after = metadata["validation_before"], metadata["validation"]
    assert before["forces_mae"] > 1.2 * after["forces_mae"] > 0
    assert f"forces MAE {before['forces_mae']:.4g} to {after['forces_mae']:.4g} meV/Å" in (
        caplog.text
    )
    card = (folder / "README.md").read_text()
    assert "| before | after |" in card
    assert f"| {before['forces_mae']:.4g} | {after['forces_mae']:.4g} |" in card
    # A run that goes on has begun where it began.
    main([*experiment(tmp_path, lr=3e-3), "--trainer.max_epochs=9", "--ckpt_path=last"])
    again = yaml.safe_load((folder / "model.yaml").read_text())["metadata"]
    assert again["validation_before"] == before


def test_references_may_be_kept(start, tmp_path):
    write_data(tmp_path / "data.extxyz", AtomeqCalculator("small"), ZEROS)
    main(experiment(tmp_path, references="none"))
    after = load_potential(tmp_path / "runs/tune/potential").references.shift
    assert torch.equal(after, load_potential(start).references.shift)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"references": {"H": -1.0, "C": -2.0, "O": -3.0}}, "with start_from"),
        ({"start_from": None}, "neither a model nor a potential"),
        ({"start_from": "sevenet"}, "sevenet"),
        ({"model": {"class_path": "atomeq.models.nequip.NequIP"}}, "do not fit the NequIP"),
        ({"lora": {"parts": ["layer"]}}, "no linear map of the NequIP"),
        ({"rates": {"embeddings": 0.0}}, "no part 'embeddings'"),
        ({"terms": ["zbl"]}, "has a ZBL already"),
        ({"avg_num_neighbors": "auto"}, "avg_num_neighbors is that of the potential"),
    ],
    ids=["references", "nothing", "misspelt", "another", "lora", "rates", "terms", "neighbors"],
)
def test_what_does_not_fit_is_refused(start, tmp_path, capsys, model, said):
    write_data(tmp_path / "data.extxyz", AtomeqCalculator("small"), ZEROS)
    with pytest.raises(SystemExit) as exit_:
        main(experiment(tmp_path, **model))
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_an_element_that_the_potential_lacks_is_refused(start, tmp_path, capsys):
    write_data(tmp_path / "data.extxyz", AtomeqCalculator("small"), ZEROS)
    copper = Atoms("CuO", [[0, 0, 0], [0, 0, 1.8]])
    copper.calc = SinglePointCalculator(copper, energy=-1.0, forces=np.zeros((2, 3)))
    ase.io.write(tmp_path / "data.extxyz", [copper] * 8, append=True)
    for decision in ({}, {"references": "none"}):
        with pytest.raises(SystemExit) as exit_:
            main([*experiment(tmp_path, **decision), "--overwrite"])
        assert exit_.value.code == 2
        assert "Z=29, which small does not know" in capsys.readouterr().err


def test_low_rank_updates_are_merged_into_an_ordinary_potential(start, tmp_path):
    write_data(tmp_path / "data.extxyz", AtomeqCalculator("small"), ZEROS)
    run = experiment(tmp_path, lr=0.05, lora={"rank": 2, "parts": ["layers"]})
    main(run)
    folder = tmp_path / "runs/tune/potential"
    before, after = load_potential(start), load_potential(folder)
    assert set(after.model.state_dict()) == set(before.model.state_dict())
    changed = {
        name.split(".")[0]
        for name, weight in before.model.named_parameters()
        if not torch.equal(weight, after.model.get_parameter(name))
    }
    assert changed == {"layers"}
    # The errors of the run are those of what it saved.
    main(
        [
            "test",
            *run[1:],
            "--data.test={own: data.extxyz}",
            "--ckpt_path=runs/tune/checkpoints/best.ckpt",
        ]
    )
    tested = json.loads((tmp_path / "runs/tune/test_errors.json").read_text())["own"]
    frames = ase.io.read(tmp_path / "data.extxyz", index=":")
    found = AtomeqCalculator(folder).evaluate([atoms.copy() for atoms in frames])
    missed = [f["forces"] - a.get_forces() for f, a in zip(found, frames, strict=True)]
    assert tested["forces_mae"] == pytest.approx(1e3 * np.abs(np.concatenate(missed)).mean(), 1e-3)


def write_old_data(path: Path, calculator: AtomeqCalculator, shift: float = 0.0) -> None:
    structures = [molecule(name) for name in ("NH3", "N2", "C2H6", "H2O", "CH3OH") for _ in "ab"]
    for k, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=k)
        results = calculator.evaluate([atoms])[0]
        energy = results["energy"] + shift * len(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=results["forces"])
    ase.io.write(path, structures)


def replayed(tmp_path: Path, *words: str, **replay) -> dict:
    """Fit to a strained potential's data, and return the metadata of what was saved."""
    other = load_potential("small").double()
    generator = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise
    write_data(tmp_path / "data.extxyz", AtomeqCalculator(other), ZEROS)
    run = [*experiment(tmp_path, lr=1e-3), "--trainer.max_epochs=6"]
    given = json.dumps({"files": str(tmp_path / "old.extxyz"), "val": 4, **replay})
    main([*run, f"--data.replay={given}", "--overwrite", *words])
    folder = tmp_path / "runs/tune/potential"
    return yaml.safe_load((folder / "model.yaml").read_text())["metadata"]


@pytest.mark.parametrize("labels", ["potential", "files"])
def test_replayed_data_are_forgotten_less_and_it_is_told(start, tmp_path, caplog, labels):
    write_old_data(tmp_path / "old.extxyz", AtomeqCalculator("small"))
    with caplog.at_level("INFO"):
        with_replay = replayed(tmp_path, labels=labels, weight=10.0)
    assert "old data: 6 structures replayed, 4 held out" in caplog.text
    assert "training changed the errors on old data" in caplog.text
    card = (tmp_path / "runs/tune/potential/README.md").read_text()
    assert "errors on 4 held-out structures of the old data" in card
    before, after = (with_replay[key] for key in ("old_data_before", "old_data"))
    # The old potential has none of the errors, whatever the zeros of the new energies.
    assert before["energy_per_atom_mae"] < 1e-2 > before["forces_mae"]
    assert f"| {after['forces_mae']:.4g} | meV/Å |" in card
    alone = replayed(tmp_path, labels=labels, weight=1e-6)
    assert after["forces_mae"] < 0.6 * alone["old_data"]["forces_mae"]


def test_old_data_may_be_measured_alone(start, tmp_path, caplog):
    write_old_data(tmp_path / "old.extxyz", AtomeqCalculator("small"))
    old = ase.io.read(tmp_path / "old.extxyz", index=":")
    old[0].calc.results["energy"] += 8.0  # one that is far off is no other level of theory
    ase.io.write(tmp_path / "old.extxyz", old)
    with caplog.at_level("INFO"):
        words = {"labels": "files", "weight": 0.0, "number": 7}
        measured = replayed(tmp_path, "--trainer.max_epochs=1", **words)
    assert "old data: 0 structures replayed, 7 held out" in caplog.text
    assert measured["old_data"]["forces_mae"] > measured["old_data_before"]["forces_mae"]


def test_old_data_that_do_not_fit_are_refused(start, tmp_path, capsys):
    calculator = AtomeqCalculator("small")
    for shift, labels, said in (
        (0.2, "files", "+0.200 eV/atom (median) from those of small"),
        (None, "potential", "atomic number 29"),
    ):
        write_old_data(tmp_path / "old.extxyz", calculator, shift or 0.0)
        if shift is None:
            ase.io.write(tmp_path / "old.extxyz", [Atoms("Cu2", [[0, 0, 0], [0, 0, 2]])] * 5)
        with pytest.raises(SystemExit) as exit_:
            replayed(tmp_path, labels=labels)
        assert exit_.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        replayed(tmp_path, "--model.start_from=null", f"--model.model={json.dumps(SMALL)}")
    assert "name it in model.start_from" in capsys.readouterr().err
