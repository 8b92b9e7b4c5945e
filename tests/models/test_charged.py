"""Charge and multiplicity: told to any model, at first without effect, never left out unsaid."""

import logging

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Molecule, Structure
from small_models import SMALL_MODELS
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main as command
from atomeq.data.targets import known_target
from atomeq.dynamics.run import relax
from atomeq.graph import electrons
from atomeq.graph.convert import from_structures
from atomeq.graph.electrons import charge_of, multiplicity_of
from atomeq.graph.to_structures import to_ase
from atomeq.models.charged import Charged
from atomeq.potential.checkpoint import (
    build_model,
    load_potential,
    save_potential,
    scatter_weights,
)
from atomeq.potential.export import ExportError, export_potential
from atomeq.potential.potential import Potential
from atomeq.potential.scalar import ScalarPredictor
from atomeq.screening.dedupe import bucket_of
from atomeq.screening.identity import content_hash
from atomeq.screening.selection import select

EXACT = 1e-12  # rounding of float64


def charged(network: str) -> Potential:
    """A potential with generic weights that is told, but whose vectors are still zero."""
    torch.manual_seed(0)
    model = build_model(SMALL_MODELS[network])
    scatter_weights(model)
    return Potential(Charged(model, charges=[-1, 0, 1], multiplicities=[1, 2, 3])).double().eval()


def copper(**info: float) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.info.update(info)
    return atoms


def energies(potential: Potential, structures: list[Atoms]) -> np.ndarray:
    return potential(potential.build_graph(structures), ("energy",))["energy"].detach().numpy()


@pytest.mark.parametrize("network", SMALL_MODELS)
def test_a_model_that_is_told_starts_where_it_was(network: str):
    potential = charged(network)
    bare = Potential(potential.model.model).eval()
    kinds = [copper(), copper(charge=1), copper(charge=-1, spin=2), copper(multiplicity=3)]
    alone = energies(bare, [copper()])
    np.testing.assert_allclose(energies(potential, kinds), alone.repeat(4), rtol=0, atol=EXACT)

    graph = potential.train()(potential.build_graph(kinds), ("energy",), create_graph=True)
    (graph["energy"] ** 2).sum().backward()
    for table in (potential.model.charge_embedding, potential.model.multiplicity_embedding):
        assert bool((table.weight.grad != 0).any())  # and can be trained from there
        torch.nn.init.normal_(table.weight)
    told = energies(potential.eval(), kinds)
    assert len(np.unique(told.round(8))) == 4
    # A structure that says nothing is neutral with the lowest multiplicity, alone or in a batch.
    assert told[0] == pytest.approx(energies(potential, [copper(charge=0, spin=1)])[0], abs=EXACT)
    assert told[0] == pytest.approx(energies(potential, [copper()])[0], abs=EXACT)


@pytest.mark.filterwarnings("ignore:Structure charge")  # pymatgen's, that one was given
@pytest.mark.parametrize(
    ("structure", "charge", "multiplicity"),
    [
        (molecule("H2O"), 0, 1),
        (molecule("CH3"), 0, 2),
        (Atoms("H2O", molecule("H2O").positions, info={"charge": 1}), 1, 2),
        (Atoms("O2", [[0, 0, 0], [0, 0, 1.2]], info={"spin": 3}), 0, 3),
        (Atoms("O2", [[0, 0, 0], [0, 0, 1.2]], info={"multiplicity": 3, "spin": 1}), 0, 3),
        (Atoms("OH", [[0, 0, 0], [0, 0, 1]], charges=[-1.1, 0.1]), -1, 1),
        (Molecule(["O", "H"], [[0, 0, 0], [0, 0, 1.0]], charge=-1), -1, 1),
        (Molecule(["O", "O"], [[0, 0, 0], [0, 0, 1.2]], spin_multiplicity=3), 0, 3),
        (Structure(np.eye(3) * 3, ["Na"], [[0, 0, 0]], charge=1), 1, 1),
    ],
)
def test_they_are_read_from_where_they_are_kept(structure, charge: int, multiplicity: int):
    graph = from_structures(structure)
    assert charge_of(graph).tolist() == [charge]
    assert multiplicity_of(graph).tolist() == [multiplicity]
    again = from_structures(to_ase(graph))
    assert charge_of(again).tolist() == [charge]
    assert multiplicity_of(again).tolist() == [multiplicity]


def test_partial_charges_and_moments_are_left_out_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(electrons, "_told", set())
    iron = bulk("Fe", cubic=True)
    iron.set_initial_magnetic_moments([2.2, 2.2])
    salt = bulk("NaCl", "rocksalt", a=5.6)
    salt.set_initial_charges([0.9, -0.9])
    with caplog.at_level(logging.WARNING, logger="atomeq"):
        for atoms in (iron, iron, salt, salt):
            graph = from_structures(atoms)
            assert "charge" not in graph
            assert "multiplicity" not in graph
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "a structure has initial magnetic moments",
        "a structure has initial charges that cancel",
    ]


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"info\['charge'\] is 'high'"):
        from_structures(copper(charge="high"))


def test_a_potential_that_does_not_know_them_refuses():
    potential = small_potential()
    plain = energies(potential, [copper()])
    for info, found in (({"charge": 1}, "total charge 1"), ({"spin": 3}, "multiplicity 3")):
        with pytest.raises(ValueError, match=rf"structure 1 has {found}, of which potential"):
            energies(potential, [copper(), copper(**info)])
        # Whoever makes the graph: the potential itself looks.
        graph = potential.model.graph_builder()(copper(**info))
        with pytest.raises(ValueError, match="knows nothing"):
            potential(graph, ("energy",))
    # What every structure of so many electrons has is no statement.
    assert energies(potential, [copper(charge=0, spin=1)]) == pytest.approx(plain)
    potential.ignore(["charge"])
    assert energies(potential, [copper(charge=1)]) == pytest.approx(plain)
    with pytest.raises(ValueError, match="multiplicity 3"):
        energies(potential, [copper(spin=3)])
    with pytest.raises(ValueError, match="not 'spn'"):
        potential.ignore(["spn"])


def test_scalars_and_compilations_refuse_too(tmp_path):
    scalar = ScalarPredictor(build_model(SMALL_MODELS["egnn"]), known_target("gap")).eval()
    with pytest.raises(ValueError, match="total charge 1"):
        scalar(scalar.model.graph_builder()(copper(charge=1)))
    with pytest.raises(ExportError, match="not told of charge"):
        export_potential(charged("egnn"), tmp_path / "charged.pt2")


def test_the_calculator_refuses_and_notices_a_change():
    atoms = copper()
    atoms.calc = AtomeqCalculator(small_potential())
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    with pytest.raises(ValueError, match="AtomeqCalculator"):
        atoms.get_potential_energy()
    atoms.calc = AtomeqCalculator(small_potential(), ignore=["charge"])
    assert atoms.get_potential_energy() == neutral

    potential = charged("egnn")
    torch.nn.init.normal_(potential.model.charge_embedding.weight)
    atoms.calc = AtomeqCalculator(potential)
    positive = atoms.get_potential_energy()
    del atoms.info["charge"]
    assert atoms.get_potential_energy() != positive
    atoms.set_initial_charges([1, 0, 0, 0])
    assert atoms.get_potential_energy() == positive


def test_charges_that_the_model_was_not_made_for_are_refused():
    with pytest.raises(ValueError, match=r"total charge 2, and this model was made for -1, 0, 1"):
        energies(charged("egnn"), [copper(charge=2)])
    only_spin = Charged(build_model(SMALL_MODELS["egnn"]), charges=[])
    with pytest.raises(ValueError, match="total charge 1, of which"):
        energies(Potential(only_spin), [copper(charge=1)])
    with pytest.raises(ValueError, match="give charges or multiplicities"):
        Charged(build_model(SMALL_MODELS["egnn"]), charges=[], multiplicities=[])


def test_one_charged_structure_does_not_stop_the_others():
    found = relax([copper(), copper(charge=1), copper()], small_potential(), max_steps=2)
    refused = {outcome.index: outcome.status == "refused" for outcome in found}
    assert refused == {0: False, 1: True, 2: False}


def test_charge_and_spin_make_another_structure():
    kinds = [copper(), copper(charge=1), copper(spin=3), copper(charge=0, spin=1)]
    hashes = [content_hash(atoms) for atoms in kinds]
    assert hashes[0] == hashes[3]  # which says nothing
    assert len(set(hashes)) == len({bucket_of(atoms) for atoms in kinds}) == 3
    pool = select(kinds, 4, charged("egnn"), by="farthest")
    assert len(pool.chosen) == 3


def test_it_is_saved_and_loaded(tmp_path):
    potential = charged("mace")
    torch.nn.init.normal_(potential.model.charge_embedding.weight)
    save_potential(potential, tmp_path / "charged")
    again = load_potential(tmp_path / "charged")
    kinds = [copper(), copper(charge=1)]
    np.testing.assert_array_equal(energies(again, kinds), energies(potential, kinds))


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_adds_them_to_a_potential(tmp_path, capsys):
    """A potential of neutral cells learns that charged ones are 2 eV higher."""
    rng = np.random.RandomState(0)
    frames = []
    for k in range(24):
        atoms = copper()
        atoms.positions += rng.normal(scale=0.03, size=(4, 3))
        atoms.info["charge"] = k % 2
        energy = -12.0 + 2.0 * (k % 2)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((4, 3)))
        frames.append(atoms)
    ase.io.write(tmp_path / "set.extxyz", frames)
    torch.manual_seed(0)
    start = Potential(build_model(SMALL_MODELS["egnn"]))
    save_potential(start, tmp_path / "start")
    document = {
        "trainer": {"max_epochs": 40, "accelerator": "cpu", "default_root_dir": str(tmp_path)},
        "model": {
            "start_from": str(tmp_path / "start"),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
            "loss": {"energy": 1.0, "forces": 0.01},
        },
        "data": {
            "class_path": "atomeq.data.datamodule.AtomisticDataModule",
            "init_args": {"train": str(tmp_path / "set.extxyz"), "split": {"val": 4}},
        },
    }
    words = ["fit", "-c", str(tmp_path / "fit.yaml")]
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(SystemExit):
        command(words)
    assert "knows nothing" in capsys.readouterr().err
    document["model"]["electrons"] = {"charges": [0, 1]}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(document))
    command([*words, "--overwrite"])
    potential = load_potential(tmp_path / "potential")
    neutral, positive = energies(potential, [copper(), copper(charge=1)])
    assert positive - neutral == pytest.approx(2.0, abs=0.5)


def test_the_command_line_has_the_way_out(tmp_path, capsys):
    save_potential(small_potential(), tmp_path / "potential")
    ase.io.write(tmp_path / "cu.extxyz", copper(charge=1))
    words = ["single-point", str(tmp_path / "cu.extxyz"), "--out", str(tmp_path / "out.extxyz")]
    words += ["--potential", str(tmp_path / "potential")]
    with pytest.raises(SystemExit) as stop:
        command(words)
    assert stop.value.code == 2
    assert "--ignore charge" in capsys.readouterr().err
    command([*words, "--ignore", "charge"])
    assert (tmp_path / "out.extxyz").is_file()
