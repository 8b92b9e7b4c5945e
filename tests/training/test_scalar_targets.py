"""Scalars of molecules: one task learns them, and what it leaves is no potential.

The made-up property is known exactly, so that references, readouts and units can be told apart.
"""

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
from atomeq.cli.training import main
from atomeq.data.ase_files import DataError
from atomeq.data.batching import GraphDataset
from atomeq.data.targets import ScalarTarget
from atomeq.graph.builders import RadiusGraph
from atomeq.models.egnn import EGNN
from atomeq.models.egnn_published import MoleculeEGNN
from atomeq.models.faenet import FAENet
from atomeq.models.registry import MODELS, build
from atomeq.potential.checkpoint import (
    CheckpointError,
    load_potential,
    load_predictor,
    save_potential,
)
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.scalar import ScalarPredictor
from atomeq.training.losses import PotentialLoss, ScalarLoss
from atomeq.training.metrics import ScalarErrors
from atomeq.training.normalisation import fit_scalar_references
from atomeq.training.task import AtomisticTask

EXTENSIVE = ScalarTarget("polarizability", "bohr³", "sum")
INTENSIVE = ScalarTarget("gap", "eV")
NAMES = ["CH4", "NH3", "H2O", "CH3OH", "C2H6", "HCN", "CO2", "N2"]
PER_ATOM = {"H": 1.5, "C": 8.0, "N": 6.0, "O": 4.0}
ROUND_OFF = 1e-9  # of a sum in float64


def labelled(n_structures: int = 16) -> list[Atoms]:
    """Molecules with an additive property, and one that is the share of hydrogen."""
    rng = np.random.RandomState(0)
    structures = []
    for k in range(n_structures):
        atoms = molecule(NAMES[k % len(NAMES)])
        atoms.rattle(0.02, rng=rng)
        atoms.info["polarizability"] = sum(PER_ATOM[s] for s in atoms.symbols)
        atoms.info["gap"] = 5.0 + float(np.mean(atoms.numbers == 1))
        structures.append(atoms)
    return structures


def dataset(name: str) -> GraphDataset:
    graphs = [
        RadiusGraph(4.0)(atoms).replace(
            scalar=torch.tensor([atoms.info[name]], dtype=torch.float64)
        )
        for atoms in labelled()
    ]
    return GraphDataset(graphs)


def small_model() -> EGNN:
    torch.manual_seed(0)
    model = EGNN(4.0, num_layers=1, hidden_channels=8)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def value(predictor: ScalarPredictor, structures) -> torch.Tensor:
    return predictor(predictor.build_graph(structures))["scalar"].detach()


def apart(atoms: Atoms) -> Atoms:
    """Return a structure and a copy of it far away, as one."""
    copy = atoms.copy()
    copy.positions += 50.0
    return atoms + copy


@pytest.mark.parametrize(("target", "factor"), [(EXTENSIVE, 2.0), (INTENSIVE, 1.0)])
def test_sums_are_extensive_and_means_are_not(target: ScalarTarget, factor: float):
    references = AtomicReferences({1: 0.3, 6: 1.0, 8: 2.0} if factor == 2.0 else None, scale=1.7)
    predictor = ScalarPredictor(small_model(), target, references)
    atoms = molecule("CH3OH")
    alone, twice = value(predictor, atoms), value(predictor, apart(atoms))
    torch.testing.assert_close(twice, factor * alone, rtol=ROUND_OFF, atol=0)


def test_a_readout_of_its_own_is_taken():
    torch.manual_seed(0)
    model = MoleculeEGNN(hidden_channels=8, num_layers=1).double()
    references = AtomicReferences({1: 0.5, 6: -2.0}, scale=3.0, offset=10.0)
    predictor = ScalarPredictor(model, EXTENSIVE, references)
    graph = predictor.build_graph([molecule("CH4"), molecule("C2H6")])
    shift = torch.tensor([4 * 0.5 - 2.0, 6 * 0.5 - 4.0], dtype=torch.float64)
    expected = 3.0 * model(graph)["scalar"] + shift + 10.0
    torch.testing.assert_close(predictor(graph)["scalar"], expected)
    # Every pair of a molecule is joined, and none of two molecules.
    assert graph.n_edges == 5 * 4 + 8 * 7


def test_references_of_a_sum_are_least_squares_per_element():
    fitted = fit_scalar_references(dataset("polarizability"), EXTENSIVE)
    expected = {1: 1.5, 6: 8.0, 7: 6.0, 8: 4.0}
    for number, each in expected.items():
        assert float(fitted.shift[number]) == pytest.approx(each, abs=1e-6)
    assert float(fitted.offset) == 0.0


def test_references_of_a_mean_are_mean_and_spread_of_the_labels():
    labels = np.array([atoms.info["gap"] for atoms in labelled()])
    fitted = fit_scalar_references(dataset("gap"), INTENSIVE)
    assert float(fitted.offset) == pytest.approx(labels.mean())
    assert float(fitted.scale) == pytest.approx(labels.std())
    assert float(fitted.shift.abs().max()) == 0.0


def test_published_atoms_leave_the_bonds():
    target = ScalarTarget("polarizability", "bohr³", "sum", PER_ATOM)
    fitted = fit_scalar_references(dataset("polarizability"), target, shift="atoms")
    assert float(fitted.shift[6]) == 8.0
    assert float(fitted.scale) == 1.0  # nothing is left, and nothing has no spread


def test_references_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="gap is a mean over atoms"):
        fit_scalar_references(dataset("gap"), INTENSIVE, shift="least_squares")
    with pytest.raises(DataError, match="no values of isolated atoms for polarizability"):
        fit_scalar_references(dataset("polarizability"), EXTENSIVE, shift="atoms")
    bare = GraphDataset([graph.replace(scalar=None) for graph in dataset("gap").graphs])
    with pytest.raises(DataError, match="no training structure has a label for gap"):
        fit_scalar_references(bare, INTENSIVE)


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
def test_loss_and_errors_leave_out_what_is_unknown(kind):
    graph = RadiusGraph(4.0)([molecule(name) for name in ("CH4", "NH3", "H2O")])
    labels = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
    graph = graph.replace(scalar=labels, weight=torch.ones(3))
    prediction = {"scalar": torch.tensor([1.5, 100.0, 1.0], dtype=torch.float64)}
    loss = ScalarLoss(kind=kind, huber_delta=10.0)(prediction, graph)["loss"]
    expected = {"mae": 0.75, "mse": 0.625, "huber": 0.3125}
    assert float(loss) == pytest.approx(expected[kind])
    errors = ScalarErrors(INTENSIVE)
    errors.update(prediction, graph)
    assert float(errors.compute()["gap_mae"]) == pytest.approx(0.75)
    assert errors.columns["gap_mae"] == ("gap MAE", "eV")


def test_a_saved_scalar_is_no_potential(tmp_path: Path):
    predictor = ScalarPredictor(small_model(), INTENSIVE, AtomicReferences(offset=5.0)).eval()
    save_potential(predictor, tmp_path / "gap")
    loaded = load_predictor(tmp_path / "gap")
    assert isinstance(loaded, ScalarPredictor)
    assert loaded.target == INTENSIVE
    atoms = molecule("CH3OH")
    torch.testing.assert_close(value(loaded, atoms), value(predictor, atoms), rtol=1e-12, atol=0)
    with pytest.raises(CheckpointError, match=r"predicts gap \[eV\] and is no potential"):
        load_potential(tmp_path / "gap")
    for given in (tmp_path / "gap", predictor):
        with pytest.raises(ValueError, match="no energy and no forces"):
            AtomeqCalculator(given)
    with pytest.raises(ValueError, match="it has no forces"):
        predictor(predictor.build_graph(atoms), ("forces",))


def test_a_potential_predicts_no_scalar():
    potential = Potential(small_model())
    with pytest.raises(ValueError, match="unknown property 'scalar'"):
        potential(potential.build_graph(molecule("H2O")), ("scalar",))


def test_losses_belong_to_what_is_trained():
    with pytest.raises(ValueError, match="for the target gap set scalar_loss"):
        AtomisticTask(small_model(), target="gap", loss=PotentialLoss())
    with pytest.raises(ValueError, match="set target"):
        AtomisticTask(small_model(), scalar_loss=ScalarLoss())


@pytest.mark.parametrize("target", ["gap", "polarizability"])
def test_fit_test_and_predict(tmp_path: Path, capsys, target: str):
    """From the file to a folder that predicts, in the unit of the target, on the command line."""
    ase.io.write(tmp_path / "molecules.extxyz", labelled(20))
    spelled = {"name": "polarizability", "unit": "bohr³", "readout": "sum"}
    document = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0},
        "model": {
            "target": target if target == "gap" else spelled,
            "model": {
                "class_path": "atomeq.models.egnn.EGNN",
                "init_args": {"cutoff": 4.0, "num_layers": 1, "hidden_channels": 8},
            },
            "scalar_loss": {"kind": "huber", "huber_delta": 0.1},
        },
        "data": {
            "class_path": "atomeq.data.datamodule.AtomisticDataModule",
            "init_args": {
                "train": str(tmp_path / "molecules.extxyz"),
                "split": {"val": 0.1, "test": 4},
                "max_structures": 8,
            },
        },
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(document))
    run = tmp_path / "run"
    words = ["-c", str(tmp_path / "experiment.yaml"), f"--trainer.default_root_dir={run}"]
    main(["fit", *words])
    best = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    main(["test", *words, best])
    assert f"{target} MAE" in capsys.readouterr().out
    main(["predict", *words, best, f"--data.predict={tmp_path / 'molecules.extxyz'}"])
    predicted = [a.info[target] for a in ase.io.read(run / "predictions.extxyz", ":")]
    loaded = load_predictor(run / "potential")
    assert isinstance(loaded, ScalarPredictor)
    expected = value(loaded, labelled(20))
    np.testing.assert_allclose(predicted, expected, rtol=1e-4)  # float32, in other batches
    for key in ("energy", "forces"):
        assert key not in (run / "predictions.extxyz").read_text().splitlines()[1]


def test_gradient_target_draws_the_head_alone():
    """FAENet's third term: the head learns the gradient, and the energy does not feel it."""
    torch.manual_seed(0)
    model = FAENet(
        4.0,
        hidden_channels=24,
        num_filters=8,
        num_interactions=1,
        num_gaussians=8,
        pg_channels=4,
        force_head="simple",
        decoder_channels=8,
    )
    potential = Potential(model.double())
    atoms = molecule("CH3OH")
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.zeros((6, 3)))
    graph = potential.build_graph(atoms).replace(weight=torch.ones(1))
    loss = PotentialLoss(energy=1.0, forces=1.0, gradient_forces=10.0)
    prediction = potential(graph, loss.properties, create_graph=True)
    step = 1e-4
    ends = []
    for sign in (step, -step):
        moved = atoms.copy()
        moved.positions[1, 0] += sign
        ends.append(float(potential(potential.build_graph(moved), ("energy",))["energy"].detach()))
    slope = -(ends[0] - ends[1]) / (2 * step)
    assert float(prediction["gradient_forces"][1, 0]) == pytest.approx(slope, abs=1e-6)
    term = loss(prediction, graph)["gradient_forces"]
    expected = (prediction["forces"] - prediction["gradient_forces"]).square().mean()
    assert float(term.detach()) == pytest.approx(float(expected.detach()))
    term.backward()
    assert float(model.decoder.state_dict(keep_vars=True)[_first(model)].grad.abs().max()) > 0
    assert model.output_block.lin2.weight.grad is None
    conservative = Potential(small_model())
    with pytest.raises(ValueError, match="force head"):
        conservative(conservative.build_graph(atoms), ("gradient_forces",))
    with pytest.raises(ValueError, match="set forces above 0"):
        PotentialLoss(forces=0.0, gradient_forces=1.0)


def _first(model: FAENet) -> str:
    return next(name for name, _ in model.decoder.named_parameters())


def test_weights_of_the_first_version_of_the_qm9_form_are_read() -> None:
    """They had the names of a network inside."""
    model = MoleculeEGNN(hidden_channels=8, num_layers=1)
    node = model.config()
    assert node.pop("checkpoint_version") == 2
    weights = {f"model.network.{name}": w for name, w in model.state_dict().items()}
    built = build(node, MODELS, weights, "model.")
    built.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
