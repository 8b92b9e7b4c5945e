"""The benchmarks run, add up and write what they print; the example data train an experiment."""

import json
from pathlib import Path

import measure_rollout
import pytest
import torch
from benchmark_bars import bars, verdict
from benchmark_loader import main as benchmark_loader
from benchmark_models import main as benchmark_models
from benchmark_models import slab
from benchmark_stages import stage_shares
from golden_cases import SLAB, case_graph, case_model
from oc20_example import main as oc20_example

from atomeq.cli import main as command
from atomeq.data.oc20 import open_frames
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_slab_is_that_of_the_published_times():
    atoms = slab()
    assert len(atoms) == 86
    assert atoms.get_chemical_formula() == "CH4OPt80"


@pytest.mark.golden
def test_stages_add_up_and_leave_the_model_alone():
    references = AtomicReferences(dict.fromkeys(range(1, 90), 0.0))
    potential = Potential(case_model(SLAB), references)
    graph = case_graph(SLAB)
    before = potential(graph)["energy"]
    shares = stage_shares(potential, graph)
    assert sum(shares.values()) == pytest.approx(1.0)
    expected = {"graph", "edge frames", "rotations", "SO(2) maps", "edge activation", "norms"}
    assert expected | {"attention", "radial networks", "atom update"} <= set(shares)
    assert torch.equal(potential(graph)["energy"], before)
    assert not any(module._forward_hooks for module in potential.modules())


def test_models_are_timed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "models.json"
    n_threads = torch.get_num_threads()
    assert benchmark_models(["--models", "egnn,segno", "--quick", "--out", str(out)]) == 0
    torch.set_num_threads(n_threads)
    document = json.loads(out.read_text())
    assert set(document) == {"egnn", "segno"}
    assert document["egnn"]["cpu_s"] > 0
    assert document["segno"]["machine"]["torch"] == torch.__version__
    assert f"{document['egnn']['parameters']:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no model 'egn'"):
        benchmark_models(["--models", "egn", "--out", str(out)])


def test_the_loader_is_timed_over_the_run(tmp_path: Path):
    out = tmp_path / "loader.json"
    n_threads = torch.get_num_threads()
    benchmark_loader(["--frames=3", "--structures=20", "--batch=2", "--out", str(out)])
    torch.set_num_threads(n_threads)
    document = json.loads(out.read_text())
    assert sum(row["structures"] for row in document["tenths"]) == 20
    assert {row["edges_per_structure"] for row in document["tenths"]} == {80 * 20}
    assert document["structures_per_cpu_s"] > 0


def test_example_data_train_an_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    oc20_example([str(tmp_path / "example"), "--frames=6"])
    raw, lmdb = (open_frames(tmp_path / "example" / n) for n in ("s2ef_raw", "s2ef_lmdb_train_ref"))
    for with_both, stored in zip(raw, lmdb, strict=True):
        assert stored.target() == pytest.approx(with_both.target("referenced"))
        assert with_both.fixed.any()
    monkeypatch.setenv("ATOMEQ_FORMATS", str(tmp_path / "example"))
    experiment = str(CONFIGS / "experiment" / "oc20_s2ef_equiformer_v2.yaml")
    words = ["-c", experiment, f"--trainer.default_root_dir={tmp_path}"]
    command(["fit", *words, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"])
    best = f"--ckpt_path={tmp_path / 'checkpoints' / 'best.ckpt'}"
    command(["test", *words, best, "--trainer.accelerator=cpu"])
    assert "EFwT" in capsys.readouterr().out


def test_rollouts_are_measured_against_the_simulator(monkeypatch: pytest.MonkeyPatch):
    """From the true start the simulator errs by nothing, small steps of its forces by little."""
    true = measure_rollout.simulated(5)
    monkeypatch.setattr(measure_rollout, "NUDGE", 0.0)
    exact = measure_rollout.errors(measure_rollout.nudged(true), true)
    assert all(row == {"mean": 0.0, "median": 0.0, "lost": 0} for row in exact.values())
    fine, coarse = (
        measure_rollout.errors(measure_rollout.leapfrog(n)(true), true)["1"]["median"]
        for n in (200, 4)
    )
    assert fine < 1e-4
    assert fine < 1e-2 * coarse
    straight = measure_rollout.straight(true)
    straight[2, 4:] = torch.nan
    lost = measure_rollout.errors(straight, true)
    assert [row["lost"] for row in lost.values()] == [0, 0, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rollouts_of_trained_propagators(tmp_path: Path):
    words = ["--epochs", "5", "--systems", "4", "--runs", str(tmp_path), "--"]
    words += [f"--data.recipe.num_{part}=8" for part in ("train", "val", "test")]
    out = tmp_path / "rollout.json"
    assert measure_rollout.main(["--out", str(out), *words]) == 0
    document = json.loads(out.read_text())
    assert set(document["training"]) == set(measure_rollout.TRAINED)
    assert set(document["errors"]) == {*measure_rollout.TRAINED, *measure_rollout.UNTRAINED}


def test_bars_are_judged_by_the_rows_and_said_in_the_last_line():
    shared = {"op": "edge_wigner", "channels": 1, "n_edges": 10}
    rows = [
        {**shared, "lmax": lmax, "implementation": "e3nn", "ratio": {"forward": ratio}}
        for lmax, ratio in ((3, 28.0), (4, 19.0))
    ]
    judged, line = verdict("cpu", rows)
    assert len(judged) == len(bars("cpu"))
    assert [entry["met"] for entry in judged if entry["figure"] is not None] == [True, False]
    assert line.startswith("bars: 1 met, 1 missed (edge_wigner L=4 C=1 forward >= 20x e3nn: 19)")
    assert f"{len(judged) - 2} not measured" in line
