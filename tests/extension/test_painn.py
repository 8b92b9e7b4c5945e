"""A model of another distribution does all that a model of the package does, by its entry point.

PaiNN stands in painn/, a project of its own. Installing it here is what pip would do, without the
network and without touching the environment: the module and its metadata in a folder on the path.
"""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from installed import install

from atomeq import AtomeqCalculator, load_potential, relax, screen, validate_model
from atomeq.check.calculator import check_calculator
from atomeq.cli import main
from atomeq.models.registry import MODELS
from atomeq.potential.potential import Potential
from atomeq.screening.results import read_rows

PROJECT = Path(__file__).parent / "painn"
SIZE = {"cutoff": 4.0, "num_layers": 2, "hidden_channels": 8, "num_basis": 6}


@pytest.fixture(scope="module")
def painn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Install the distribution; return the path of the class."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    modules = {"atomeq_painn": (PROJECT / "atomeq_painn.py").read_text()}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("installed") / "site"
        offers = project["entry-points"]
        install(patch, folder, name=project["name"], entry_points=offers, modules=modules)
        yield "atomeq_painn.PaiNN"


def copper(seed: int, repeats: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat(repeats)
    atoms.rattle(0.08, seed=seed)
    return atoms


@pytest.fixture(scope="module")
def experiment(painn: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains the model on twelve cells of copper."""
    folder = tmp_path_factory.mktemp("experiment")
    structures = [copper(seed) for seed in range(12)]
    for atoms in structures:
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
    ase.io.write(folder / "cu.extxyz", structures)
    document = {
        "trainer": {
            **{"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0},
            "default_root_dir": str(folder / "run"),
        },
        "model": {"model": {"class_path": "PaiNN", "init_args": SIZE}},
        "data": {
            "class_path": "atomeq.data.datamodule.AtomisticDataModule",
            "init_args": {"train": str(folder / "cu.extxyz"), "split": {"val": 0.2}},
        },
    }
    path = folder / "painn.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def trained(experiment: Path) -> Path:
    """The potential that ``atomeq fit`` leaves."""
    main(["fit", "-c", str(experiment)])
    return experiment.parent / "run" / "potential"


def test_it_is_about_a_hundred_lines_that_atomeq_knows_nothing_of(painn: str) -> None:
    source = (PROJECT / "atomeq_painn.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 110
    package = Path(sys.modules["atomeq"].__file__ or "").parent
    assert not [path for path in package.rglob("*.py") if "atomeq_painn" in path.read_text()]
    assert MODELS.find("PaiNN") is MODELS.find(painn)


def test_it_keeps_the_laws_of_physics(painn: str) -> None:
    torch.manual_seed(0)
    results = validate_model(MODELS.find(painn)(**SIZE))  # pyright: ignore[reportCallIssue]
    assert all(result.passed for result in results)


def test_it_is_trained_and_saved_by_its_registered_name(trained: Path, painn: str) -> None:
    document = yaml.safe_load((trained / "model.yaml").read_text())
    assert document["model"] == {"class_path": painn, "init_args": SIZE}
    assert document["metadata"]["steps"] > 0


def test_another_process_loads_it(trained: Path) -> None:
    atoms = copper(3)
    expected = AtomeqCalculator(trained).get_potential_energy(atoms)
    ase.io.write(trained.parent / "one.extxyz", atoms)
    command = (
        f"import ase.io; from atomeq import AtomeqCalculator\n"
        f"atoms = ase.io.read({str(trained.parent / 'one.extxyz')!r})\n"
        f"print(AtomeqCalculator({str(trained)!r}).get_potential_energy(atoms))"
    )
    found = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) == pytest.approx(expected, abs=1e-4)


def test_it_is_relaxed_and_checked(trained: Path) -> None:
    outcomes = list(relax([copper(1), copper(2)], trained, fmax=0.5, max_steps=20))
    assert len(outcomes) == 2
    assert all(np.isfinite(outcome.graph.pos.numpy()).all() for outcome in outcomes)
    laws = ["forces are -dE/dx", "smooth at the cutoff", "pickling", "one per thread"]
    verdicts = check_calculator(lambda: AtomeqCalculator(trained), only=laws, single_precision=True)
    assert all(verdict.passed for verdict in verdicts)


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_it_is_screened(trained: Path, tmp_path: Path, engine) -> None:
    ase.io.write(tmp_path / "cu.traj", [copper(seed) for seed in range(4)])
    steps = ["validate", {"relax": {"fmax": 1.0, "max_steps": 3}}]
    summary = screen(
        tmp_path / "cu.traj", trained, out=tmp_path / "out", steps=steps, engine=engine, workers=1
    )
    assert sum(summary.counts.values()) == 4
    energies = {row["locator"]: row["energy"] for row in read_rows(tmp_path / "out")}
    assert len(energies) == 4
    assert np.isfinite(list(energies.values())).all()


def test_a_model_without_an_entry_point_is_refused_before_the_first_epoch(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = "from atomeq_painn import PaiNN\nclass Homeless(PaiNN): ...\n"
    (tmp_path / "homeless.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--model.model.class_path", "homeless.Homeless"]
    words += ["--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(experiment), *words])
    assert "'homeless.Homeless' is not registered" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unregistered_class_inside_is_seen_too(painn: str, tmp_path: Path) -> None:
    from atomeq.models.frame_averaged import FrameAveraged
    from atomeq.potential.checkpoint import save_potential

    inside = MODELS.find(painn)(**SIZE)  # pyright: ignore[reportCallIssue]
    potential = Potential(FrameAveraged(inside))
    save_potential(potential, tmp_path / "averaged")
    assert load_potential(tmp_path / "averaged").fingerprint() == potential.fingerprint()
