"""Losses in stages, offsets of the stress, weights of properties, trained references, terms."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from copper_experiment import labelled_copper
from lightning.pytorch.callbacks import ModelCheckpoint

from atomeq.cli.training import main
from atomeq.data.ase_files import DataError, LabelKeys, read_structures
from atomeq.data.batching import GraphDataset
from atomeq.models.egnn import EGNN
from atomeq.models.mace import MACE
from atomeq.models.nequip import NequIP
from atomeq.potential.checkpoint import load_potential, scatter_weights
from atomeq.potential.potential import Potential
from atomeq.potential.repulsion import ZBL
from atomeq.training.callbacks import ExponentialMovingAverage
from atomeq.training.losses import PotentialLoss
from atomeq.training.preparation import with_neighbor_count, without_terms
from atomeq.training.stages import Stage, forget_best, forget_moments, stage_of


def checkpoint(run: Path, name: str) -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_stages_begin_at_their_epoch_or_step():
    loss = PotentialLoss()
    stages = [Stage(loss, epoch=3), Stage(loss, step=70)]
    assert [stage_of(stages, e, s) for e, s in ((2, 60), (3, 60), (3, 69), (4, 70))] == [0, 1, 1, 2]
    for wrong in ({}, {"epoch": 1, "step": 1}, {"epoch": 0}):
        with pytest.raises(ValueError, match="a stage begins at"):
            Stage(loss, **wrong)


def test_a_second_stage_has_its_loss_and_its_own_best_weights(tmp_path: Path, experiment: Path):
    second = {"epoch": 2, "loss": {"energy": 1000.0, "forces": 1.0}}
    stages = f"--model.stages={json.dumps([second])}"
    ema = ["--ema.decay=0", "--model.scheduler=null"]
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=4", stages, *ema])
    run = tmp_path / "run"
    # Its values are larger: kept, the first stage's best would never have been beaten.
    best = checkpoint(run, "best")
    assert best["epoch"] >= 2
    rows = (run / "metrics" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[2] > losses[1]
    assert "Stage(" in best["loss"]
    assert checkpoint(run, "best_stage_1")["epoch"] < 2
    moments = checkpoint(run, "last")["optimizer_states"][0]["state"].values()
    steps = checkpoint(run, "last")["global_step"]
    assert {2 * int(moment["step"]) for moment in moments} == {steps}
    # Continued inside the stage, the best weights so far still count.
    main(["fit", "-c", str(experiment), "--trainer.max_epochs=5", stages, *ema, "--ckpt_path=last"])
    again = checkpoint(run, "last")["callbacks"]
    score = next(c["best_model_score"] for name, c in again.items() if "RunCheckpoint" in name)
    assert float(score) <= min(losses[2:]) * (1 + 1e-6)


def test_a_run_that_stops_where_a_stage_begins_goes_on_as_if_it_had_not(tmp_path, experiment):
    stages = f"--model.stages={json.dumps([{'epoch': 2, 'loss': {'energy': 1000.0}}])}"
    words = ["fit", "-c", str(experiment), stages, "--model.scheduler=null"]
    main([*words, "--trainer.max_epochs=3"])
    run = tmp_path / "run"
    expected = checkpoint(run, "last")
    run.rename(tmp_path / "whole")
    main([*words, "--trainer.max_epochs=2"])
    main([*words, "--trainer.max_epochs=3", "--ckpt_path=last"])
    found = checkpoint(run, "last")
    torch.testing.assert_close(found["raw_weights"], expected["raw_weights"], rtol=0, atol=0)
    assert checkpoint(run, "best")["epoch"] == 2  # of the second stage, whose losses are larger


def test_a_stage_renames_the_best_by_its_own_loss_alone(tmp_path: Path):
    callbacks = [ModelCheckpoint(monitor=one) for one in ("val/loss", "val/forces_mae")]
    for callback, name in zip(callbacks, ("best.ckpt", "forces.ckpt"), strict=True):
        callback.best_model_path = str(tmp_path / name)
        (tmp_path / name).touch()
    forget_best(callbacks, 1, rename=True)
    assert {path.name for path in tmp_path.iterdir()} == {"best_stage_1.ckpt", "forces.ckpt"}
    assert [bool(callback.best_model_path) for callback in callbacks] == [False, True]


@pytest.mark.parametrize("forgotten", [True, False])
def test_the_first_steps_of_a_stage_are_no_larger_than_the_rate(forgotten: bool):
    weight = torch.nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    longest = 0.0
    for step in range(60):
        factor = 1e-4 if step < 50 else 1.0
        if step == 50 and forgotten:
            forget_moments([optimizer])
        before = weight.item()
        optimizer.zero_grad()
        (factor * (weight - 3.0).square()).backward()
        optimizer.step()
        longest = max(longest, abs(weight.item() - before))
    assert (longest < 1.1e-3) is forgotten


def test_a_stage_may_need_further_labels(experiment: Path, copper_file: Path, tmp_path, capsys):
    frames = ase.io.read(copper_file, index=":")
    for atoms in frames:
        del atoms.calc.results["stress"]
    ase.io.write(tmp_path / "bare.extxyz", frames)
    stages = json.dumps([{"epoch": 1, "loss": {"stress": 1.0}}])
    words = [f"--model.stages={stages}", "--model.loss.stress=0"]
    with pytest.raises(ValueError, match="the loss trains on stress"):
        main(["fit", "-c", str(experiment), *words, f"--data.train={tmp_path / 'bare.extxyz'}"])


def test_equal_averages_begin_anew_at_their_epoch():
    module = torch.nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(decay=0.9, equal_from=1)
    average.setup(None, module, "fit")  # pyright: ignore
    seen = []
    for step in range(1, 7):
        with torch.no_grad():
            module.weight += step
        trainer = type("Trainer", (), {"global_step": step, "current_epoch": step // 4})()
        average.on_train_batch_end(trainer, module)  # pyright: ignore
        seen += [float(module.weight.detach())] if step >= 4 else []
    assert float(average._average[0]) == pytest.approx(np.mean(seen))


PULAY = 0.02  # eV/Å³


def test_a_pressure_that_is_given_is_taken_from_the_labels(tmp_path, experiment, copper_file):
    """Training goes as on labels that never had it."""
    frames = ase.io.read(copper_file, index=":")
    for atoms in frames:
        stress = atoms.get_stress() + PULAY * np.array([1, 1, 1, 0, 0, 0])
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, stress=stress, **results)
    ase.io.write(tmp_path / "pulay.extxyz", frames)
    errors = []
    for words in ([f"--data.train={tmp_path / 'pulay.extxyz'}"], []):
        offset = f"--model.stress_offset={PULAY if words else 0.0}"
        main(["fit", "-c", str(experiment), *words, offset, "--overwrite"])
        path = f"--ckpt_path={tmp_path}/run/checkpoints/best.ckpt"
        main(["test", "-c", str(experiment), *words, offset, path, "--overwrite"])
        tested = json.loads((tmp_path / "run" / "test_errors.json").read_text())
        errors.append([checkpoint(tmp_path / "run", "best")["validation"], tested["held_out"]])
    for with_it, without in zip(*errors, strict=True):
        assert with_it == pytest.approx(without, rel=1e-3)


def test_labels_have_weights_of_their_own(tmp_path: Path):
    frames = labelled_copper(3)
    frames[0].info |= {"config_type": "md", "forces_weight": 3.0}
    frames[1].info |= {"config_type": "strained", "weight": 2.0}
    ase.io.write(tmp_path / "some.extxyz", frames)
    kinds = {"md": {"stress": 0.0, "forces": 2.0}, "strained": 5.0}
    found = list(read_structures(tmp_path / "some.extxyz", labels=LabelKeys(kind_weights=kinds)))
    keys = ("weight", "energy_weight", "forces_weight", "stress_weight")
    weights = [[atoms.info.get(key, 1.0) for key in keys] for atoms in found]
    assert weights == [[1, 1, 6, 0], [10, 1, 1, 1], [1, 1, 1, 1]]
    with pytest.raises(DataError, match="of energy, forces or stress"):
        LabelKeys(kind_weights={"md": {"force": 1.0}})
    frames[0].info["stress_weight"] = -1.0
    ase.io.write(tmp_path / "some.extxyz", frames)
    with pytest.raises(DataError, match="'stress_weight' is -1"):
        list(read_structures(tmp_path / "some.extxyz"))


def test_references_are_trained_and_stay_in_the_potential(tmp_path: Path, experiment: Path):
    rates = json.dumps({"*": 0.0, "references": 1.0})
    words = [f"--model.rates={rates}", "--model.train_references=true", "--model.references=none"]
    words += ["--model.optimizer.init_args.weight_decay=1000", "--trainer.max_epochs=8"]
    main(["fit", "-c", str(experiment), *words, "--model.loss={energy: 1, forces: 0}"])
    potential = load_potential(tmp_path / "run" / "potential")
    assert not isinstance(potential.references.shift, torch.nn.Parameter)
    shift = float(potential.references.shift[29])
    energies = [a.get_potential_energy() / len(a) for a in labelled_copper()]
    assert 0.5 < shift / np.mean(energies) < 1.5  # from zero to them; a decay would hold it there
    untouched = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert "potential.references.shift" in untouched["raw_weights"]


def test_the_scale_of_an_element_is_trained_where_that_is_asked_for(tmp_path, experiment: Path):
    main(["fit", "-c", str(experiment), "--model.train_scale=true", "--model.scale=5"])
    found = load_potential(tmp_path / "run" / "potential").references.scale
    assert not isinstance(found, torch.nn.Parameter)
    assert 0.001 < abs(float(found[29]) - 5) < 1
    assert found[1:29].eq(5).all()
    validation = checkpoint(tmp_path / "run", "last")["validation"]
    more = [f"--model.start_from={tmp_path}/run/potential", "--model.references=none"]
    more += ["--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}/tuned"]
    main(["fit", "-c", str(experiment), *more])
    tuned = load_potential(tmp_path / "tuned" / "potential").references.scale
    assert torch.equal(tuned, found)
    started = checkpoint(tmp_path / "tuned", "last")["validation_before"]
    assert started["forces_mae"] == pytest.approx(validation["forces_mae"])


@pytest.mark.parametrize(
    "network",
    [
        EGNN(3.5, num_layers=1, hidden_channels=4),
        NequIP(3.5, irreps=["4x0e", "4x0e"], radial_channels=[4]),
        MACE(3.5, irreps="4x0e", lmax_edge=0, correlation=1, radial_channels=[4]),
    ],
    ids=lambda network: type(network).__name__,
)
def test_a_network_takes_another_count_of_neighbours(network):
    network = network.double()
    scatter_weights(network)
    graph = Potential(network).build_graph(labelled_copper(1))
    same = with_neighbor_count(network, network.avg_num_neighbors)
    torch.testing.assert_close(same(graph)["energies"], network(graph)["energies"])
    other = with_neighbor_count(network, 3.0)
    assert other.config()["init_args"]["avg_num_neighbors"] == 3.0
    assert not torch.allclose(other(graph)["energies"], network(graph)["energies"])
    for name, weight in network.named_parameters():
        assert torch.equal(weight, other.get_parameter(name))


def test_the_count_of_neighbours_is_measured_and_saved(tmp_path: Path, experiment: Path):
    auto = "--model.avg_num_neighbors=auto"
    main(["fit", "-c", str(experiment), auto, "--trainer.max_epochs=1"])
    run = tmp_path / "run"
    count = load_potential(run / "potential").model.avg_num_neighbors
    assert count == pytest.approx(12.0, abs=3.0)
    assert count != 20.0
    validated = checkpoint(run, "best")["validation"]["forces_mae"]
    path = f"--ckpt_path={run}/checkpoints/best.ckpt"
    files = yaml.safe_load(experiment.read_text())["data"]["init_args"]["train"]
    main(["test", "-c", str(experiment), auto, path, f"--data.val={files}"])
    main(["validate", "-c", str(experiment), auto, path])  # the network is that of the fit
    potential = load_potential(run / "potential")
    assert potential.model.avg_num_neighbors == count
    assert validated > 0


def test_the_network_learns_what_terms_leave(tmp_path: Path, experiment: Path):
    words = ["--model.terms=[zbl]", "--trainer.max_epochs=1", "--model.references=least_squares"]
    main(["fit", "-c", str(experiment), *words])
    saved = load_potential(tmp_path / "run" / "potential")
    assert [node["class_path"].rsplit(".", 1)[1] for node in saved.term_configs()] == ["ZBL"]
    close = Atoms("Cu2", [[0, 0, 0], [0, 0, 1.0]])
    potential = Potential(EGNN(3.5, num_layers=1, hidden_channels=4), terms=[ZBL()])
    graph = potential.build_graph([close])
    labels = potential(graph, ("energy", "forces"), create_graph=False)
    labels = {key: value.detach() for key, value in labels.items()}
    (left,) = without_terms(potential, GraphDataset([graph.replace(**labels)])).sample()
    bare = Potential(potential.model)(graph, ("energy", "forces"), create_graph=False)
    torch.testing.assert_close(left.energy, bare["energy"].detach())
    torch.testing.assert_close(left.forces, bare["forces"].detach().double(), atol=1e-4, rtol=1e-5)
    assert float((labels["forces"] - bare["forces"]).abs().max()) > 10.0
