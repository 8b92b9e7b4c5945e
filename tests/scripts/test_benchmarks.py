"""The benchmarks run, add up and write what they print; the example data train an experiment."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from golden_cases import SLAB, case_graph, case_model
from oc20_example import main as oc20_example

from atomeq.cli import main as command
from atomeq.data.oc20 import open_frames
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.units import DEBYE
from benchmarks import bars, dipole, large, potentials, record, rollout, training
from benchmarks.judged import Judged, summary
from benchmarks.models import slab
from benchmarks.operation_bars import bars as operation_bars
from benchmarks.peers.process import PeerProcess
from benchmarks.stages import stage_shares

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
    assert benchmark.main(["models", "--models", "egnn,segno", "--quick", "--out", str(out)]) == 0
    torch.set_num_threads(n_threads)
    document = json.loads(out.read_text())
    assert set(document) == {"egnn", "segno"}
    assert document["egnn"]["cpu_s"] > 0
    assert document["segno"]["machine"]["torch"] == torch.__version__
    assert f"{document['egnn']['parameters']:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no model 'egn'"):
        benchmark.main(["models", "--models", "egn", "--out", str(out)])


def test_the_loader_is_timed_over_the_run(tmp_path: Path):
    out = tmp_path / "loader.json"
    n_threads = torch.get_num_threads()
    benchmark.main(["loader", "--frames=3", "--structures=20", "--batch=2", "--out", str(out)])
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
    true = rollout.simulated(5)
    monkeypatch.setattr(rollout, "NUDGE", 0.0)
    exact = rollout.errors(rollout.nudged(true), true)
    assert all(row == {"mean": 0.0, "median": 0.0, "lost": 0} for row in exact.values())
    fine, coarse = (
        rollout.errors(rollout.leapfrog(n)(true), true)["1"]["median"] for n in (200, 4)
    )
    assert fine < 1e-4
    assert fine < 1e-2 * coarse
    straight = rollout.straight(true)
    straight[2, 4:] = torch.nan
    lost = rollout.errors(straight, true)
    assert [row["lost"] for row in lost.values()] == [0, 0, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rollouts_of_trained_propagators(tmp_path: Path):
    words = ["--epochs", "5", "--systems", "4", "--runs", str(tmp_path), "--"]
    words += [f"--data.recipe.num_{part}=8" for part in ("train", "val", "test")]
    out = tmp_path / "rollout.json"
    assert benchmark.main(["rollout", "--out", str(out), *words]) == 0
    document = json.loads(out.read_text())
    assert set(document["training"]) == set(rollout.TRAINED)
    assert set(document["errors"]) == {*rollout.TRAINED, *rollout.UNTRAINED}


def test_bars_are_judged_by_the_rows_and_said_in_the_last_line():
    shared = {"op": "edge_wigner", "channels": 1, "n_edges": 10}
    rows = [
        {**shared, "lmax": lmax, "implementation": "e3nn", "ratio": {"forward": ratio}}
        for lmax, ratio in ((3, 28.0), (4, 19.0))
    ]
    lines = [bar.judged(rows) for bar in operation_bars("cpu")]
    assert [line.met for line in lines if line.measured != "-"] == [True, False]
    text = summary(lines)
    assert text.startswith("bars: 1 met, 1 missed (edge_wigner L=4 C=1 forward >= 20x e3nn: 19)")
    assert f"{len(lines) - 2} not measured" in text


def test_bars_are_measured_once_for_a_state_of_the_code(tmp_path, monkeypatch, capsys):
    calls = []

    def row(quick: bool) -> list[Judged]:
        calls.append(quick)
        return [Judged.at_least("speed", 3.0, 2.0, "x"), Judged.at_most("error", 2.0, 1.0)]

    monkeypatch.setattr(bars, "ROWS", {"a row": row, "another": row})
    monkeypatch.setattr(bars, "code_digest", lambda: "this code")
    words = ["bars", "--quick", "--only", "a row", "--out", str(tmp_path / "bars.json")]
    n_threads = torch.get_num_threads()
    assert benchmark.main(words) == benchmark.main(words) == 1  # one is missed
    assert calls == [True]
    assert "bars: 1 met, 1 missed (error <= 1: 2)" in capsys.readouterr().out
    benchmark.main([*words, "--again"])
    benchmark.main([word for word in words if word != "--quick"])  # more carefully
    assert calls == [True, True, False]
    monkeypatch.setattr(bars, "code_digest", lambda: "other code")
    benchmark.main(words)
    torch.set_num_threads(n_threads)
    assert calls == [True, True, False, True]


def test_an_interrupted_fit_goes_on_and_a_finished_one_is_left(tmp_path, monkeypatch):
    """A second call is refused neither before nor after the first checkpoint."""
    words, run = ["-c", "experiment.yaml"], tmp_path / "run"
    asked: list[tuple[str, ...]] = []

    def atomeq(*given: str) -> None:
        asked.append(given)
        if len(asked) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, "atomeq", atomeq)
    for n_calls in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            record.fit(run, words)
        if n_calls == 1:
            (run / "checkpoints").mkdir()
            (run / "checkpoints" / "last.ckpt").touch()
    record.fit(run, words)
    record.fit(run, words)
    folder = f"--trainer.default_root_dir={run}"
    on = ("fit", *words, folder, "--ckpt_path=last")
    assert asked == [("fit", *words, folder, "--overwrite"), on, on]
    assert len(json.loads((run / "cpu_seconds.json").read_text())) == 3


def test_a_run_has_the_commit_that_it_began_at_and_what_differed(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        known = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *known, *words], cwd=tmp_path, capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    def committed() -> str:
        git("add", ".")
        git("commit", "-qm", "all")
        return git("rev-parse", "--short", "HEAD")

    config, results = tmp_path / "configs" / "one.yaml", tmp_path / "results"
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", results)
    for folder in (config.parent, results):
        folder.mkdir()
    assert record.commit() == "unknown"
    git("init", "-q")
    config.touch()
    (results / "old.json").touch()
    first = committed()
    (results / "old.json").write_text("{}")  # as a benchmark that has written a row
    assert record.commit() == first
    config.write_text("a: 1")
    assert record.commit() == record.commit("configs") == f"{first} + configs/one.yaml"
    assert record.commit("atomeq") == first

    monkeypatch.setattr(record, "atomeq", lambda *words: committed())  # changes under the fit
    record.fit(tmp_path.parent / "run", [])
    found = (tmp_path.parent / "run" / "commit").read_text()
    assert found == f"{first} + configs/one.yaml"


def test_responses_are_judged_by_lengths():
    """Of two molecules one responds a tenth too much; the other's dipole is a debye too long."""
    eye = torch.eye(3).expand(2, 3, 3)
    graph = SimpleNamespace(dipole=torch.eye(3)[:2], polarizability=eye)
    found = {
        "dipole": torch.eye(3)[:2] * torch.tensor([[1.0], [1.0 + DEBYE]]),
        "polarizability": eye * torch.tensor([1.1, 1.0])[:, None, None],
    }
    errors = dipole.errors_of(lambda graph, keys: found, [graph])
    assert errors == pytest.approx((0.05, 0.5), rel=1e-5)


def test_the_door_lists_every_benchmark_and_each_can_be_imported(capsys):
    assert benchmark.main([]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]}
    issued = "tensor-product models dynamics training screening loader export startup bars"
    assert set(issued.split()) <= listed
    for name in listed - {"triton-compile", "count-traffic"}:  # those want Triton their own way
        with pytest.raises(SystemExit, match="0"):
            benchmark.main([name, "--help"])
    assert benchmark.main(["screning"]) == 2
    assert "did you mean screening?" in capsys.readouterr().err


def test_a_step_of_training_is_timed():
    row = training.steps("egnn", 2)
    assert row["step"] > max(row["forward"], row["backward"], row["optimizer"]) > 0
    assert 0 < row["loss"] < 100


def test_traffic_of_a_layer_is_counted():
    """In a process of its own: the kernels are replaced."""
    lines = record.in_own_process("count-traffic", "1", "--channels", "16").splitlines()
    kilobytes = [float(line.partition(" kB")[0].split()[-1]) for line in lines]
    assert len(kilobytes) == 5  # forward, forces; both and a step of training on them
    assert all(amount > 0.1 for amount in kilobytes)


def test_a_peer_that_is_missing_is_said():
    missing = pytest.raises(SystemExit, match=r"sevennet failed(.|\n)*ModuleNotFoundError")
    with missing, PeerProcess(sys.executable, "sevennet") as peer:
        peer.ask("take", checkpoint="7net-0", structure="none")


def test_potentials_are_held_to_their_bars():
    row = {"potential": "sevennet-0", "atoms": 32, "cpu_s": 1.0, "ratio": 5.9}
    document = {"pairs": [row], "labels": {"an_hour": 3e5}}
    assert potentials.missed(document) == ["sevennet-0 at 32 atoms: 5.90x, not 6x"]
    row |= {"ratio": 6.1, "force_difference": 1.0}
    assert potentials.missed(document) == ["sevennet-0 at 32 atoms: forces differ by 1.0e+00 eV/Å"]


def test_bars_that_lacked_something_are_measured_when_it_is_there(tmp_path, monkeypatch, capsys):
    lacks = [Judged("relax", "needs torch-sim", ">= 1.2 x")]
    found = [Judged.at_least("relax", 1.3, 1.2, "x")]
    answers = [lacks, found]
    monkeypatch.setattr(bars, "ROWS", {"large torchsim": lambda quick: answers.pop(0)})
    monkeypatch.setattr(bars, "code_digest", lambda: "this code")
    words = ["bars", "--quick", "--out", str(tmp_path / "bars.json")]
    n_threads = torch.get_num_threads()
    for last in ("bars: 0 met, 0 missed, 1 not measured (relax >= 1.2 x)", "bars: 1 met, 0 missed"):
        assert benchmark.main(words) == 0
        assert capsys.readouterr().out.splitlines()[-1] == last
    assert benchmark.main(words) == 0  # and then no more
    torch.set_num_threads(n_threads)


def test_bars_keep_what_was_measured_where_nothing_was_lacking(tmp_path, monkeypatch):
    answers = [[Judged("relax", "1.18 x", ">= 1.2 x", False)], [Judged("relax", "-", ">= 1.2 x")]]
    monkeypatch.setattr(bars, "ROWS", {"large torchsim": lambda quick: answers.pop(0)})
    monkeypatch.setattr(bars, "code_digest", lambda: "this code")
    file, n_threads = tmp_path / "bars.json", torch.get_num_threads()
    for _ in range(2):
        benchmark.main(["bars", "--quick", "--again", "--out", str(file)])
    torch.set_num_threads(n_threads)
    assert json.loads(file.read_text())["large torchsim"]["lines"][0]["measured"] == "1.18 x"


def test_large_structures_are_judged_by_the_worst_of_them():
    sizes = {500: 40e6, 4000: 144e6, 20_000: 280e6}
    rows = [{"atoms": n, "bytes": size} for n, size in sizes.items()]
    results = {
        "graph": {"atoms": 4000, "ratio": 1.4},
        "memory": {"rows": rows, "exponent": 0.5},
        "threads": {"500": {"speedup": 1.5, "cpu_of_two_over_one": 1.1}},
        "torchsim": {"lacks": "torch-sim"},
    }
    lines = list(large.bars(results))
    assert [line.met for line in lines] == [True, False, True, True, True, False, True, None]
    assert lines[1].measured == "80 kB"
    assert set(results) == set(large.MEASUREMENTS)
