"""From generated motion to a trained propagator and its rollouts, restarts and refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.models.segno import SEGNOPropagator
from atomeq.potential.folders import CheckpointError
from atomeq.propagation.checkpoint import load_propagator, save_propagator
from atomeq.propagation.long_step import LongStep
from atomeq.propagation.particles import ParticleView

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "experiment"
SMALL = " ".join(f"--data.recipe.num_{part} 8" for part in ("train", "val", "test"))
ROUNDED = 1e-6  # extxyz holds eight decimals, from which a rollout starts again
Run = Callable[..., int]


def cluster_motion(path: Path, n_frames: int = 60) -> Path:
    """Frames 2 fs apart of a hot copper-aluminium cluster in its own motion."""
    corners = [[0, 0, 0], [2.5, 0, 0], [1.2, 2.2, 0], [1.2, 0.8, 2.1]]
    atoms = Atoms("Cu3Al", corners, calculator=EMT())
    velocities = 0.02 * np.random.default_rng(0).normal(size=(4, 3))
    atoms.set_velocities(velocities - velocities.mean(axis=0))
    dynamics = VelocityVerlet(atoms, timestep=2 * units.fs)
    frames = []
    for k in range(n_frames):
        frame = atoms.copy()
        frame.info["time_fs"] = 2.0 * k
        frames.append(frame)
        dynamics.run(1)
    ase.io.write(path, frames)
    return path


@pytest.fixture
def propagators(tmp_path: Path) -> Path:
    """A folder with untrained propagators of every kind: what a fit leaves, without the fit."""
    torch.manual_seed(0)
    kinds = {"charged": (1, 2), "gravity": (1, 1)}
    for kind, (n_inputs, n_edge_features) in kinds.items():
        model = SEGNOPropagator(n_inputs, n_edge_features, hidden_channels=8)
        save_propagator(LongStep(model, ParticleView(kind)), tmp_path / kind)
    view = ParticleView("molecule", 10.0, (29, 29, 29, 13), ((0, 1), (0, 2), (1, 2), (2, 3)))
    save_propagator(LongStep(SEGNOPropagator(2, 5, hidden_channels=8), view), tmp_path / "molecule")
    return tmp_path


@pytest.mark.parametrize("model", ["egnn", "segno"])
def test_nbody_from_training_to_a_continued_rollout(run: Run, workdir: Path, model: str) -> None:
    fit = f"-c {CONFIGS}/nbody_{model}.yaml {SMALL} --trainer.default_root_dir fit"
    assert run(f"fit {fit} --trainer.max_epochs 5") == 0
    assert run("data nbody true.npz --num 6 --frames 30,40,50 --seed 4") == 0
    rollout = "rollout {} --propagator fit/propagator --steps {} --out {}"
    assert run(rollout.format("true.npz", 2, "all.npz") + " --frame 0 --reference true.npz") == 0
    assert run(rollout.format("true.npz", 1, "first.npz") + " --frame 0") == 0
    assert run(rollout.format("first.npz", 1, "second.npz")) == 0
    whole, first, second = (np.load(f"{name}.npz") for name in ("all", "first", "second"))
    assert whole["pos"].shape == (6, 3, 5, 3)
    for field in ("pos", "velocities"):
        np.testing.assert_array_equal(whole[field][:, :2], first[field])
        np.testing.assert_array_equal(whole[field][:, 1:], second[field])
    np.testing.assert_allclose(whole["times"], [3, 4, 5])
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(Path("all.summary.json").read_text())
    true = np.load("true.npz")
    error = np.mean((whole["pos"][:, 1] - true["pos"][:, 1]) ** 2)
    assert summary["errors"][0]["position_mse"] == pytest.approx(error)
    assert [row["step"] for row in summary["errors"]] == [1, 2]
    assert summary["velocities"] == ("network" if model == "segno" else "trapezoidal rule")


def test_one_long_step_of_the_test_set_is_what_the_test_measures(run: Run, workdir: Path) -> None:
    """One way to features and units in training and in use."""
    words = f"-c {CONFIGS}/nbody_segno.yaml {SMALL} --trainer.default_root_dir fit"
    assert run(f"fit {words} --trainer.max_epochs 5") == 0
    assert run(f"test {words} --ckpt_path fit/checkpoints/best.ckpt") == 0
    tested = json.loads(Path("fit/test_errors.json").read_text())["test"]["mse"]
    # The third part of the stream: 8 to train, 8 to validate, 8 to test.
    assert run("data nbody all.npz --num 24 --frames 30,40 --seed 43") == 0
    arrays = {k: v[16:] if k != "times" else v for k, v in np.load("all.npz").items()}
    np.savez("true.npz", **arrays)
    line = "rollout true.npz --frame 0 --reference true.npz --propagator fit/propagator --out o.npz"
    assert run(line) == 0
    (row,) = json.loads(Path("o.summary.json").read_text())["errors"]
    assert row["position_mse"] == pytest.approx(tested, rel=1e-5)


def test_molecule_from_training_to_a_continued_rollout(run: Run, workdir: Path) -> None:
    cluster_motion(workdir / "md.extxyz")
    fit = f"fit -c {CONFIGS}/molecule_segno.yaml --data.path md.extxyz --data.bond_length 3"
    assert run(f"{fit} --trainer.default_root_dir fit --trainer.max_epochs 40") == 0
    view = load_propagator("fit/propagator").view
    assert view.atomic_numbers == (29, 29, 29, 13)
    assert view.time == 10.0
    rollout = "rollout {} --propagator fit/propagator --steps {} --out {}"
    whole = rollout.format("md.extxyz", 4, "all.extxyz") + " --frame 20 --reference md.extxyz"
    assert run(whole) == 0
    assert run(rollout.format("md.extxyz", 2, "first.extxyz") + " --frame 20") == 0
    assert run(rollout.format("first.extxyz", 2, "second.extxyz")) == 0
    frames, rest = (ase.io.read(f"{name}.extxyz", index=":") for name in ("all", "second"))
    assert [atoms.info["time_fs"] for atoms in frames] == [40, 50, 60, 70, 80]
    for a, b in zip(frames[2:], rest, strict=True):
        np.testing.assert_allclose(a.positions, b.positions, rtol=0, atol=ROUNDED)
        np.testing.assert_allclose(a.get_velocities(), b.get_velocities(), rtol=0, atol=ROUNDED)
    errors = json.loads(Path("all.summary.json").read_text())["errors"]
    assert errors[0]["position_mse"] < 0.5 * errors[0]["static_position_mse"]  # something learnt


def test_potentials_and_propagators_are_not_mistaken_for_each_other(
    propagators: Path, run: Run, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match="holds a propagator"):
        AtomeqCalculator(propagators / "charged")
    with pytest.raises(ValueError, match="a LongStep is no potential"):
        AtomeqCalculator(load_propagator(propagators / "charged"))  # pyright: ignore
    with pytest.raises(CheckpointError, match="holds a potential"):
        load_propagator(workdir / "small")
    document = (propagators / "charged" / "model.yaml").read_text()
    wrong = document.replace("atomeq.models.segno.SEGNOPropagator", "os.system")
    (propagators / "charged" / "model.yaml").write_text(wrong)
    with pytest.raises(CheckpointError, match=r"the propagator 'os.system' is not registered"):
        load_propagator(propagators / "charged")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("absent.npz --propagator charged --out o.npz", "no file absent.npz"),
        ("text.npz --propagator charged --out o.npz", "damaged"),
        ("shape.npz --propagator charged --out o.npz", "(n_systems, n_frames, n_bodies, 3)"),
        ("nan.npz --propagator charged --out o.npz", "finite"),
        ("still.npz --propagator charged --out o.npz", "pos, velocities, charges or masses"),
        ("true.npz --propagator absent --out o.npz", "no propagator at 'absent'"),
        ("true.npz --propagator small --out o.npz", "holds a potential"),
        ("true.npz --propagator gravity --out o.npz", "holds systems of charges"),
        ("true.npz --propagator charged --out o.extxyz", "written as OUT.npz"),
        ("true.npz --propagator charged --out o.npz --frame 9", "no frame 9"),
        ("true.npz --propagator charged --out o.npz --steps 0", "steps"),
        ("true.npz --propagator charged --out o.npz --reference true.npz", "after 1"),
        ("true.npz --propagator charged --out o.npz --reference other.npz", "other particles"),
        ("heavy.npz --propagator gravity --out o.npz", "masses of 1"),
        ("md.extxyz --propagator molecule --out o.npz", "OUT.extxyz"),
        ("cold.extxyz --propagator molecule --out o.extxyz", "no velocities"),
        ("cu.extxyz --propagator molecule --out o.extxyz", "periodic"),
        ("water.extxyz --propagator molecule --out o.extxyz", "trained on Cu3Al"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    propagators: Path, run: Run, workdir: Path, capsys: pytest.CaptureFixture[str], line, message
) -> None:
    assert run("data nbody true.npz --num 2 --frames 0,10") == 0
    assert run("data nbody other.npz --num 2 --frames 0,10 --seed 9") == 0
    true = dict(np.load("true.npz"))
    masses = {k: v for k, v in true.items() if k != "charges"}
    np.savez("heavy.npz", **masses, masses=2 * np.ones((2, 5)))
    np.savez("shape.npz", **{**true, "pos": true["pos"][..., :2]})
    np.savez("nan.npz", **{**true, "pos": true["pos"] * np.nan})
    np.savez("still.npz", pos=true["pos"], charges=true["charges"])
    Path("text.npz").write_text("no archive")
    (moving,) = ase.io.read(cluster_motion(workdir / "md.extxyz", 1), index=":")
    ase.io.write("cold.extxyz", Atoms(moving.numbers, moving.positions))
    water = Atoms("OH2", [[0, 0, 0], [1, 0, 0], [0, 1, 0]], momenta=np.ones((3, 3)))
    ase.io.write("water.extxyz", water)
    before = sorted(workdir.iterdir())
    capsys.readouterr()
    assert run(f"rollout {line}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([text for text in error.splitlines() if "error" in text]) == 1
    assert sorted(workdir.iterdir()) == before
