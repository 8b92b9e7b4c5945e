"""Neighbour lists against ase.neighborlist."""

import numpy as np
import pytest
from ase.build import bulk, graphene
from ase.neighborlist import neighbor_list as ase_neighbor_list
from awkward import CUTOFFS, STRUCTURES, random_atoms, rattled

from atomeq.graph.neighbors import (
    complete_cell,
    edge_lengths,
    neighbor_list,
    neighbor_list_with_lengths,
)


def arrays(atoms):
    return atoms.positions, atoms.cell.array, atoms.pbc


def rows(edges):
    return np.column_stack([edges.edge_index[1], edges.edge_index[0], edges.cell_offsets])


@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_edges_equal_ase(name, cutoff):
    atoms = STRUCTURES[name]()
    i, j, offsets = ase_neighbor_list("ijS", atoms, cutoff)
    edges = neighbor_list(*arrays(atoms), cutoff)
    wanted = np.column_stack([i, j, offsets]).reshape(-1, 5)
    wanted = wanted[np.lexsort(wanted.T[::-1])]
    np.testing.assert_array_equal(rows(edges), wanted)


def test_edges_equal_ase_when_the_non_periodic_vector_lies_in_the_plane():
    atoms = random_atoms(8, [[4, 0, 0], [0, 4, 0], [0, 0, 4]], (1, 1, 0))
    reference = ase_neighbor_list("ijS", atoms, CUTOFFS[1])
    cell = atoms.cell.array.copy()
    cell[2] = cell[0]
    edges = neighbor_list(atoms.positions, cell, atoms.pbc, CUTOFFS[1])
    wanted = np.column_stack(reference)
    np.testing.assert_array_equal(rows(edges), wanted[np.lexsort(wanted.T[::-1])])


@pytest.mark.parametrize("name", STRUCTURES)
def test_lengths_are_those_of_the_edges(name):
    atoms = STRUCTURES[name]()
    edges, lengths = neighbor_list_with_lengths(*arrays(atoms), CUTOFFS[1])
    measured = edge_lengths(*arrays(atoms)[:2], *edges)
    np.testing.assert_array_equal(lengths, measured)  # what moves is measured alike
    assert (measured < CUTOFFS[1]).all()


@pytest.mark.parametrize("far", [0, 300, 900_000])
def test_edges_are_in_order_however_far_their_images_are(far):
    """Beside what 64 bits hold for 8 atoms too: 900,000 lattice vectors each way."""
    atoms = random_atoms(8, [[4, 0, 0], [0, 4, 0], [0, 0, 4]], (1, 1, 1))
    pos, cell, pbc = arrays(atoms)
    near = neighbor_list(pos, cell, pbc, 3.0)
    moved = np.zeros((8, 3), np.int64)
    moved[2], moved[5] = (far, -far, far), (-far, far, 0)
    found = rows(neighbor_list(pos + moved @ cell, cell, pbc, 3.0))
    np.testing.assert_array_equal(found, found[np.lexsort(found.T[::-1])])
    source, target = near.edge_index
    wanted = rows(near)
    wanted[:, 2:] += moved[target] - moved[source]
    np.testing.assert_array_equal(found, wanted[np.lexsort(wanted.T[::-1])])


def test_a_pair_exactly_at_the_cutoff_is_outside():
    pos = np.array([[0.0, 0, 0], [3.0, 0, 0]])
    outside = neighbor_list(pos, np.zeros((3, 3)), np.zeros(3, bool), 3.0)
    inside = neighbor_list(pos, np.zeros((3, 3)), np.zeros(3, bool), np.nextafter(3.0, 4.0))
    assert outside.edge_index.shape == (2, 0)
    assert inside.edge_index.shape == (2, 2)


def flat_and_wide():
    # 1e6 Å long and thin: vesin alone would end the process with a division by zero.
    pos = np.array([[0.0, 0, 0], [1.0, 0, 0], [1e6, 0, 0], [1e6, 1.2, 0.3]])
    return pos, np.zeros((3, 3)), np.zeros(3, bool)


def test_an_evaporated_atom_leaves_the_others_their_edges():
    edges = neighbor_list(*flat_and_wide(), 2.5)
    assert edges.edge_index.T.tolist() == [[1, 0], [0, 1], [3, 2], [2, 3]]


def test_a_long_periodic_box_with_a_thin_skewed_direction_equals_the_short_one():
    atoms = random_atoms(40, [[25.0, 0, 0], [1.0, 3.3, 0], [0, 0, 4.4]], (0, 1, 1), seed=2)
    shifts = np.random.default_rng(1).integers(-3, 4, (40, 2)) @ atoms.cell.array[1:]
    pos = atoms.positions + shifts
    short = neighbor_list(pos, atoms.cell.array, atoms.pbc, 2.9)
    with_far_atom = np.vstack([pos, [[3e6, 0.5, 0.5]]])
    edges = neighbor_list(with_far_atom, atoms.cell.array, atoms.pbc, 2.9)
    np.testing.assert_array_equal(edges.edge_index, short.edge_index)
    np.testing.assert_array_equal(edges.cell_offsets, short.cell_offsets)


def test_graphene_of_many_atoms_equals_ase():
    atoms = rattled(graphene(size=(6, 5, 1), vacuum=None))
    i, _, _ = ase_neighbor_list("ijS", atoms, 3.1)
    assert neighbor_list(*arrays(atoms), 3.1).edge_index.shape[1] == len(i)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cutoff_that_is_no_length_is_refused(cutoff):
    with pytest.raises(ValueError, match="cutoff must be a positive finite length"):
        neighbor_list(*arrays(bulk("Cu")), cutoff)


def test_a_periodic_direction_without_cell_vector_is_refused():
    with pytest.raises(ValueError, match=r"periodic in directions \[2\]"):
        complete_cell(np.diag([3.0, 3.0, 0.0]), np.array([False, False, True]))


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (1e-3 * np.eye(3), (True, True, True)),  # once filled the memory
        ([[4, 0, 0], [4.001, 0.002, 0], [0, 0, 0.05]], (True, True, True)),
        (np.diag([1e-4, 1e-4, 20.0]), (True, True, False)),
        (np.diag([30.0, 30.0, 1e-9]), (False, False, True)),
    ],
)
def test_a_collapsed_cell_is_refused_before_its_images_are_counted(cell, pbc):
    with pytest.raises(ValueError, match="collapsed"):
        neighbor_list(np.zeros((1, 3)), np.array(cell, dtype=float), np.array(pbc), 4.91)


def test_the_smallest_lattice_without_overlap_is_searched():
    closest = 0.1001 / np.sqrt(2) * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    edges = neighbor_list(np.zeros((1, 3)), closest, np.array([True] * 3), 0.11)
    assert edges.edge_index.shape == (2, 12)


def test_an_atom_too_many_cells_away_is_refused():
    pos = np.array([[0.0, 0, 0], [1e9, 0, 0]])
    with pytest.raises(ValueError, match=r"atom 1 lies .* lattice vectors outside"):
        neighbor_list(pos, np.eye(3), np.ones(3, bool), 2.0)


@pytest.mark.parametrize("distance", [1e9, 1e30, 1e300])
def test_an_atom_too_far_from_the_others_is_refused(distance):
    pos = np.array([[0.0, 0, 0], [0, distance, 0]])
    with pytest.raises(ValueError, match=r"atom 1 lies .* Å away from another"):
        neighbor_list(pos, np.zeros((3, 3)), np.zeros(3, bool), 2.0)


def test_inputs_are_left_alone():
    atoms = STRUCTURES["slab with zero c"]()
    before = [array.copy() for array in arrays(atoms)]
    neighbor_list(*arrays(atoms), 4.0)
    for array, old in zip(arrays(atoms), before, strict=True):
        np.testing.assert_array_equal(array, old)
