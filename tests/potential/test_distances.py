"""Distances shorter than a potential knows are told of once, with a way out."""

import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.dynamics.run import relax
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.models.faenet import FAENet
from atomeq.potential.checkpoint import CheckpointError, load_potential, save_potential
from atomeq.potential.distances import REACH, SHORTEST, KnownDistances, shortest_distances
from atomeq.potential.potential import Potential
from atomeq.potential.repulsion import ZBL


def crowded() -> Atoms:
    """An aluminium atom 1.2 Å from a copper atom, whose covalent radii sum to 2.53 Å."""
    atoms = bulk("Cu", cubic=True).repeat(2)
    atoms += Atoms("Al", positions=[atoms.positions[0] + [0.4, 0.8, 0.8]])
    return atoms


def told(caplog) -> list[str]:
    return [record.message for record in caplog.records if "guesses" in record.message]


@pytest.fixture(autouse=True)
def warnings(caplog):
    caplog.set_level(logging.WARNING)


def test_the_calculator_warns_once_with_pair_distance_and_way_out(caplog):
    calculator = AtomeqCalculator(small_potential())
    calculator.evaluate([bulk("Cu"), bulk("Al")])
    assert told(caplog) == []
    calculator.evaluate([bulk("Cu"), crowded()])
    calculator.evaluate([crowded()])
    (message,) = told(caplog)
    assert message.startswith("structure 1: atoms 0 (Cu) and 32 (Al) are 1.200 Å apart")
    assert f"{SHORTEST * 2.53:.2f} Å" in message
    assert "ZBL(0.65)" in message


def test_a_batch_that_relaxes_warns_once(caplog):
    list(relax([bulk("Cu"), crowded(), crowded()], small_potential(), max_steps=2))
    assert len(told(caplog)) == 1


def test_training_does_not_look(caplog):
    potential = small_potential().train()
    potential(potential.build_graph(crowded()), ("energy",))
    assert told(caplog) == []


def test_what_data_hold_is_known(tmp_path, caplog):
    structures = [crowded(), bulk("Cu", a=3.3)]
    potential = small_potential()
    graphs = [potential.build_graph(atoms) for atoms in structures]
    found = shortest_distances(graphs)
    expected = {}
    for atoms in structures:
        for i, j, d in zip(*neighbor_list("ijd", atoms, potential.cutoff), strict=True):
            pair = "-".join(sorted([atoms.symbols[i], atoms.symbols[j]], key=["Al", "Cu"].index))
            expected[pair] = min(d, expected.get(pair, 9.0))
    assert found.keys() == {"Al-Cu", "Cu-Cu"}  # by atomic number
    for pair, distance in found.items():
        assert 0 <= expected[pair] - distance < 1.1e-3

    potential.distances = KnownDistances(found)
    save_potential(potential, tmp_path)
    calculator = AtomeqCalculator(tmp_path)
    calculator.evaluate(structures)
    assert told(caplog) == []
    calculator.evaluate([bulk("Cu", a=3.3 * (REACH + 0.005))])  # so little beyond the data
    assert told(caplog) == []
    calculator.evaluate([bulk("Cu", a=3.3 * (REACH - 0.005))])
    assert len(told(caplog)) == 1


@pytest.mark.parametrize(("distance", "said"), [(2.0, True), (2.3, False)])
def test_lengths_that_are_known_are_not_measured_again(distance, said, monkeypatch):
    atoms = Atoms("Cu2O", [[0, 0, 0], [distance, 0, 0], [0, 1.8, 0]])
    graph = RadiusGraph(4.0)(atoms)
    measured = KnownDistances({"Cu-Cu": 2.2, "Cu-O": 1.0}).first_shorter(graph)
    assert (measured is not None) == said
    lengths = graph.edge_vectors().norm(dim=1)
    monkeypatch.setattr(AtomGraph, "edge_vectors", None)
    known = KnownDistances({"Cu-Cu": 2.2, "Cu-O": 1.0})
    assert known.first_shorter(graph.replace(edge_lengths=lengths)) == measured


def test_further_data_only_widen_what_is_known():
    known = KnownDistances({"Cu-Cu": 2.2, "Al-Cu": 2.0})
    wider = known.widened({"Cu-Cu": 2.4, "Al-Cu": 1.9, "Al-Al": 2.9})
    limits = [wider.limit(pair) for pair in ("Cu-Cu", "Cu-Al", "Al-Al")]
    assert limits == pytest.approx([2.2, 1.9, SHORTEST * 2.42], rel=1e-6)


@pytest.mark.parametrize(
    "value", [5, [1], {"Cu": 1.0}, {"Cu-Xx": 1.0}, {"Cu-Cu": -1}, {"Cu-Cu": "2"}, {1: 2.0}], ids=str
)
def test_hostile_distances_are_refused(value, tmp_path):
    potential = small_potential()
    potential.distances.shortest = value
    save_potential(potential, tmp_path)
    with pytest.raises(CheckpointError, match="distance"):
        load_potential(tmp_path)


def test_terms_of_a_calculator_are_added_to_a_copy(caplog):
    potential, near = small_potential(), crowded()
    bare = AtomeqCalculator(potential)
    repelled = AtomeqCalculator(potential, terms=[ZBL(SHORTEST)])
    assert not len(potential.terms)
    assert repelled.provenance["terms"][0]["class_path"].endswith("ZBL")
    far = bulk("Cu", cubic=True)
    before, after = (c.evaluate([far, near]) for c in (bare, repelled))
    assert before[0]["energy"] == after[0]["energy"]  # to the last bit: no pair is that close
    graph = potential.build_graph(near)
    added = float(ZBL(SHORTEST)(graph).sum())
    assert added > 1.0
    assert after[1]["energy"] - before[1]["energy"] == pytest.approx(added, rel=1e-9)
    assert np.abs(after[1]["forces"] - before[1]["forces"]).max() > 1.0
    assert "only its repulsion" in caplog.records[-1].message


def test_a_force_head_takes_no_terms():
    model = FAENet(cutoff=4.0, num_filters=8, num_interactions=1, force_head="mlp")
    with pytest.raises(ValueError, match="force head"):
        AtomeqCalculator(Potential(model), terms=[ZBL(SHORTEST)])


def test_a_dimer_is_pushed_apart_below_what_is_known():
    """Whatever the network says there: ZBL outweighs what weights of this size can give."""
    calculator = AtomeqCalculator(small_potential(), terms=[ZBL(SHORTEST)])
    lengths = np.linspace(0.3, 0.9, 7)
    pairs = [Atoms("Cu2", [[0, 0, 0], [0, 0, r]]) for r in lengths]
    energies = np.array([one["energy"] for one in calculator.evaluate(pairs)])
    assert np.all(np.diff(energies) < 0)


def test_what_is_known_follows_the_potential_to_other_dtypes():
    potential = small_potential().to(torch.float32)
    assert potential.distances.limit("Cu-Cu") == pytest.approx(SHORTEST * 2.64, rel=1e-6)
