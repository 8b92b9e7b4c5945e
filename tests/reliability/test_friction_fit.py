"""What a fit says and leaves, and what it refuses: folders of other runs, misspelled words."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from copper_experiment import copper_file, experiment  # noqa: F401

from atomeq.cli import main as command
from atomeq.cli.training import main
from atomeq.potential.checkpoint import load_potential
from atomeq.training.report import LogEpochs


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the command as a user does and return its error, which must be one line."""
    with pytest.raises(SystemExit) as exit_info:
        command(list(words))
    assert exit_info.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error.startswith("atomeq: error: ")
    return error


def test_epochs_are_told_in_units_with_progress(experiment, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr("atomeq.training.report._SECONDS", 0.0)
    monkeypatch.setattr(LogEpochs.__init__, "__kwdefaults__", {"quiet": False, "seconds": 0.0})
    with caplog.at_level(logging.INFO, logger="atomeq"):
        main(["fit", "-c", str(experiment), "--trainer.max_epochs=1"])
    lines = [record.getMessage() for record in caplog.records]
    network = load_potential(experiment.parent / "run" / "potential").model
    total = sum(p.numel() for p in network.parameters())
    assert any(line.startswith(f"EGNN: {total:,} parameters, ") for line in lines)
    assert any(re.fullmatch(r"epoch 0  1/\d+ batches, \d+ s left", line) for line in lines)
    epoch = next(line for line in lines if line.startswith("epoch 0  train/loss"))
    assert re.search(r"val/energy_per_atom_mae [\d.e+]+ meV/atom  ", epoch)
    assert re.search(r"val/forces_mae [\d.e+]+ meV/Å  ", epoch)


def test_a_card_and_figures_lie_beside_the_potential(experiment):  # noqa: F811
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=2"])
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=4", "--ckpt_path=last"])
    folder = experiment.parent / "run" / "potential"
    card = (folder / "README.md").read_text()
    known = yaml.safe_load((folder / "model.yaml").read_text())["metadata"]
    assert f"| {known['validation']['forces_mae']:.4g} | meV/Å |" in card
    for fact in ("20 to train, 2 to validate", "cu.extxyz", "Z = 29", "cutoff 3.5 Å", "AdamW"):
        assert fact in card
    assert "| licence | TO BE FILLED IN" in card
    assert f"{known['epochs']}, {known['steps']} of 4, " in card
    for name in ("learning_curve.png", "parity.png"):
        assert f"({name})" in card
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    state = torch.load(experiment.parent / "run/checkpoints/last.ckpt", weights_only=True)
    assert [row["epoch"] for row in state["callbacks"]["LogEpochs"]["rows"]] == [0, 1, 2, 3]


def test_a_card_of_a_run_without_validation_claims_no_errors(experiment):  # noqa: F811
    words = ["--data.split.val=0", "--trainer.max_epochs=1", "--checkpoint.monitor=null"]
    main(["fit", "-c", str(experiment), *words])
    folder = experiment.parent / "run" / "potential"
    assert "None are known" in (folder / "README.md").read_text()
    assert not (folder / "parity.png").exists()


def test_an_earlier_run_is_not_overwritten_in_silence(experiment, capsys):  # noqa: F811
    fit = ("fit", "-c", str(experiment), "--trainer.max_epochs=1")
    main(list(fit))
    run = experiment.parent / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    error = refusal(capsys, *fit)
    assert "--overwrite" in error
    assert "--ckpt_path last" in error
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    elsewhere = f"--trainer.default_root_dir={run.parent / 'other'}"
    assert "model.yaml is of an earlier run" in refusal(
        capsys, *fit, elsewhere, f"--save_potential.folder={run / 'potential'}"
    )
    # A checkpoint of this run goes on with it; that of another does not make its folder ours.
    best = run / "checkpoints" / "best.ckpt"
    main([*fit[:3], "--trainer.max_epochs=2", f"--ckpt_path={best}"])
    foreign = experiment.parent / "foreign.ckpt"
    foreign.write_bytes(best.read_bytes())
    assert "--overwrite" in refusal(capsys, *fit, f"--ckpt_path={foreign}")

    kept = best.read_bytes()
    unusable = "--model.model.init_args.hidden_channels=-1"
    assert "cannot be built" in refusal(capsys, *fit, "--overwrite", unusable)
    assert best.read_bytes() == kept
    main([*fit, "--overwrite"])
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    # The saved configuration does not say so for good.
    assert "--overwrite" in refusal(capsys, "fit", "-c", str(run / "config.yaml"))


def test_results_of_tests_and_predictions_are_kept(experiment, copper_file, capsys):  # noqa: F811
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=1"])
    run = experiment.parent / "run"
    words = ["-c", str(experiment), f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]
    words += [f"--data.predict={copper_file}"]
    for verb, name in (("test", "test_errors.json"), ("predict", "predictions.extxyz")):
        main([verb, *words])
        assert name in refusal(capsys, verb, *words)
        main([verb, *words, "--overwrite"])


def test_a_run_is_named_after_its_experiment(experiment, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load(experiment.read_text())
    del document["trainer"]["default_root_dir"]
    (tmp_path / "copper.yaml").write_text(yaml.safe_dump(document))
    main(["fit", "-ccopper.yaml", "--trainer.max_epochs=1"])  # a form that only a parser knows
    assert (tmp_path / "runs/copper/potential/model.yaml").is_file()
    assert (tmp_path / "runs/copper/checkpoints/best.ckpt").is_file()
    saved = yaml.safe_load((tmp_path / "runs/copper/config.yaml").read_text())
    assert saved["trainer"]["default_root_dir"] == "runs/copper"


def test_the_task_is_read_from_the_file_in_every_form(experiment, capsys):  # noqa: F811
    document = yaml.safe_load(experiment.read_text()) | {"task": "propagation"}
    experiment.write_text(yaml.safe_dump(document))
    for words in ([f"-c{experiment}"], [f"--config={experiment}"], ["-c", str(experiment)]):
        assert "Propagation" in refusal(capsys, "fit", *words)  # the data are none
    with pytest.raises(SystemExit):
        command(["fit", "-c", str(experiment), "--task=potential", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["task"] == "potential"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"], "val/los"),
        (["--checkpoint.monitor=val/los"], "val/los"),
        (["--model.model.init_args.hidden_channels=-1"], "cannot be built"),
        (["--model.model.init_args.cutoff=0"], "cutoff must be"),
        (["--trainer.devices=0"], "devices"),
    ],
)
def test_what_callbacks_and_constructors_refuse_is_one_line(experiment, capsys, words, said):  # noqa: F811
    assert said in refusal(capsys, "fit", "-c", str(experiment), "--trainer.max_epochs=1", *words)


def test_training_starts_from_a_shipped_potential_by_name(experiment, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shipped = load_potential("cu-pbe")
    node = {"model": shipped.model.config(), "start_from": "cu-pbe", "references": "none"}
    document = yaml.safe_load(experiment.read_text())
    document["model"] |= node
    document["model"]["optimizer"]["init_args"]["lr"] = 0.0
    document["ema"] = {"decay": 0.0}
    experiment.write_text(yaml.safe_dump(json.loads(json.dumps(document))))
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=1"])
    ours = load_potential(tmp_path / "run" / "potential").state_dict()
    taken = {k: v for k, v in shipped.state_dict().items() if not k.startswith("uncertainty.")}
    assert all(torch.equal(ours[k], v) for k, v in taken.items())
    folder = Path(__file__).resolve().parents[2] / "potentials" / "cu-pbe"
    document["model"]["start_from"] = str(folder)
    experiment.write_text(yaml.safe_dump(json.loads(json.dumps(document))))
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=1", "--overwrite"])
