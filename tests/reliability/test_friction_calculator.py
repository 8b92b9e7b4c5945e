"""What a calculator tells of itself, what it refuses to change, and what its calls cost."""

import copy
import pickle

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read, write
from small_potential import small_potential

import atomeq
from atomeq import AtomeqCalculator
from atomeq.graph.builders import HyperGraph, NearestNeighborGraph, RadiusGraph
from atomeq.graph.convert import from_structures
from atomeq.potential.checkpoint import save_potential
from atomeq.potential.committee import Committee, frozen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_potential(small_potential(), tmp_path_factory.mktemp("potentials") / "small")


def test_repr_and_parameters_tell_potential_precision_and_device(folder):
    calculator = AtomeqCalculator(folder, dtype="float32")
    assert calculator.parameters == {"potential": str(folder), "dtype": "float32", "device": "cpu"}
    assert repr(calculator) == f"AtomeqCalculator({str(folder)!r}, device='cpu', dtype='float32')"
    assert repr(AtomeqCalculator(small_potential())).startswith("AtomeqCalculator('EGNN', ")
    both = AtomeqCalculator([folder, small_potential()])
    assert both.parameters["potential"][0] == str(folder)
    for copied in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert repr(copied) == repr(both)
        assert [one.dtype for one in copied.potentials] == [one.dtype for one in both.potentials]


def test_parameters_go_into_ases_files(folder, tmp_path):
    atoms = bulk("Cu", cubic=True)
    atoms.calc = AtomeqCalculator(folder)
    energy = atoms.get_potential_energy()
    write(tmp_path / "cu.json", atoms)
    assert read(tmp_path / "cu.json").get_potential_energy() == energy
    assert str(folder) in (tmp_path / "cu.json").read_text()


def test_parameters_cannot_be_changed_to_no_effect(folder):
    with pytest.raises(ValueError, match=r"dtype.*another AtomeqCalculator"):
        AtomeqCalculator(folder).set(dtype="float32")


def test_stresses_of_atoms_are_refused_with_the_reason(folder):
    atoms = bulk("Cu", cubic=True)
    atoms.calc = AtomeqCalculator(folder)
    with pytest.raises(PropertyNotImplementedError, match="divided between them in many ways"):
        atoms.get_stresses()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"potential": "cu-bpe"}, "did you mean 'cu-pbe'"),
        ({"potential": "cu-pbe", "dtype": "half"}, "dtype must be 'float32' or 'float64'"),
        ({"potential": "cu-pbe", "dtype": torch.float16}, "dtype must be 'float32' or 'float64'"),
        ({"potential": "cu-pbe", "device": "gpu"}, "'gpu' is not a device"),
        ({"potential": []}, "at least one potential"),
    ],
)
def test_errors_at_the_door_name_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        AtomeqCalculator(**arguments)


def test_structures_go_out_by_the_top_level():
    atoms = bulk("Cu", cubic=True)
    (back,) = atomeq.to_ase(from_structures(atoms))
    np.testing.assert_array_equal(back.positions, atoms.positions)


def test_builders_of_equal_arguments_are_equal():
    kinds = {RadiusGraph(3.0), RadiusGraph(3.0), RadiusGraph(4.0)}
    kinds |= {NearestNeighborGraph(3.0, 5), NearestNeighborGraph(3, 5), HyperGraph(3.0)}
    assert len(kinds) == 4
    assert RadiusGraph(3.0) != HyperGraph(3.0)


def test_members_with_equal_builders_share_a_graph():
    members = [small_potential(), small_potential(cutoff=3.5), small_potential()]
    committee = Committee(members)
    assert len(committee.builders) == 2
    graphs = [builder(bulk("Cu", cubic=True)) for builder in committee.builders]
    results = committee.evaluate(graphs, ("energy",))
    each = [one(one.build_graph(bulk("Cu", cubic=True)), ("energy",))["energy"] for one in members]
    assert results["energy"][0] == pytest.approx(np.mean([e.item() for e in each]), rel=1e-12)


def test_no_builder_is_made_while_computing(folder, monkeypatch):
    """The calculator asks the model for its builder once, when it is made."""
    atoms = bulk("Cu", cubic=True)
    atoms.calc = AtomeqCalculator([folder, folder])
    model = type(atoms.calc.potential.model)
    monkeypatch.setattr(model, "graph_builder", lambda self: pytest.fail("made again"))
    atoms.get_forces()
    atoms.calc.evaluate([atoms, atoms])


def test_a_given_potential_is_left_as_it_is():
    given = small_potential()
    dtype, trainable = given.dtype, [p.requires_grad for p in given.parameters()]
    own = frozen(given, dtype=torch.float32)
    assert own is not given
    assert own.dtype == torch.float32
    assert given.dtype == dtype
    assert [p.requires_grad for p in given.parameters()] == trainable


@pytest.mark.parametrize("field", ["positions", "cell", "numbers", "pbc"])
def test_the_smallest_change_is_seen(folder, field):
    atoms = bulk("Cu", cubic=True).repeat(2)
    atoms.rattle(0.1, seed=0)
    atoms.calc = AtomeqCalculator(folder)
    before = atoms.get_forces()
    assert not atoms.calc.check_state(atoms)
    if field == "positions":
        atoms.positions[3, 1] = np.nextafter(atoms.positions[3, 1], np.inf)
    elif field == "cell":
        atoms.cell[0, 0] = np.nextafter(atoms.cell[0, 0], np.inf)
    elif field == "numbers":
        atoms.numbers[2] = 13
    else:
        atoms.pbc[1] = False
    assert atoms.calc.check_state(atoms) == [field]
    if field in ("numbers", "pbc"):
        assert not np.array_equal(atoms.get_forces(), before)
