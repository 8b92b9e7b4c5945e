"""Neighbour lists against ase.neighborlist, and the reused list against the fresh one."""

import threading

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, graphene, molecule
from ase.neighborlist import neighbor_list as ase_neighbor_list

from atomeq.graph.neighbors import (
    SkinNeighborList,
    complete_cell,
    edge_lengths,
    neighbor_list,
    neighbor_list_with_lengths,
)

# Generic: a cutoff equal to a lattice length would put pairs on the border, where rounding rules.
CUTOFFS = (2.37, 4.91)


def rattled(atoms, seed=0):
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, 0.08, atoms.positions.shape)
    return atoms


def random_atoms(n_atoms, cell, pbc, seed=0):
    scaled = np.random.default_rng(seed).random((n_atoms, 3))
    return Atoms(f"H{n_atoms}", cell=cell, pbc=pbc, scaled_positions=scaled)


def far_outside():
    atoms = rattled(bulk("Cu", cubic=True) * (2, 2, 2))
    shifts = np.random.default_rng(5).integers(-7, 8, (len(atoms), 3))
    atoms.positions += shifts @ atoms.cell.array
    return atoms


def one_unwrapped():
    atoms = rattled(bulk("NaCl", "rocksalt", a=5.64))
    atoms.positions[1] += 3 * atoms.cell.array[2] - atoms.cell.array[0]
    return atoms


def slab_without_c():
    atoms = fcc111("Pt", (2, 2, 3), vacuum=None)
    atoms.cell[2] = 0
    atoms.pbc = (True, True, False)
    return rattled(atoms)


def overlapping():
    atoms = bulk("Cu", cubic=True)
    atoms.positions[1] = atoms.positions[0]
    return atoms


def left_handed():
    atoms = random_atoms(9, [[4.1, 0.3, 0.2], [0.1, 0.4, 5.3], [0.5, 3.9, 0.1]], True, seed=3)
    assert np.linalg.det(atoms.cell.array) < 0
    return atoms


TINY_SKEWED = [[1.9, 0, 0], [1.5, 0.8, 0], [-1.1, 0.5, 1.7]]
STRUCTURES = {
    "cubic": lambda: rattled(bulk("Cu", cubic=True) * (2, 2, 2)),
    "one-atom primitive": lambda: bulk("Cu"),
    "triclinic": lambda: random_atoms(7, [[5.1, 0, 0], [1.7, 4.3, 0], [-0.9, 1.1, 3.9]], True),
    "tiny skewed": lambda: random_atoms(2, TINY_SKEWED, True),
    "left-handed": left_handed,
    "slab TTF": lambda: rattled(fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=False)),
    "slab with zero c": slab_without_c,
    "wire FFT": lambda: random_atoms(6, [[9, 0, 0], [0, 9, 0], [0.3, 0.2, 2.2]], (0, 0, 1)),
    "molecule without cell": lambda: molecule("C6H6"),
    "far outside the cell": far_outside,
    "one atom unwrapped": one_unwrapped,
    "huge cell": lambda: Atoms(
        "H4", [[0, 0, 0], [1.1, 0, 0], [499, 0, 0], [250, 250, 250]], cell=[500] * 3, pbc=True
    ),
    "single atom": lambda: Atoms("H", [[0.3, 0.1, 9.0]]),
    "overlapping": overlapping,
    "FFF in a cell": lambda: random_atoms(12, [6.0, 7.0, 8.0], False),
    "empty": lambda: Atoms(cell=[4.0] * 3, pbc=True),
    "mixed TFT skewed": lambda: random_atoms(
        8, [[3.1, 0.4, 0], [1.2, 6.3, 0.2], [0.7, 0.5, 3.3]], (1, 0, 1)
    ),
}


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
    np.testing.assert_allclose(lengths, measured, atol=1e-12)
    assert (measured < CUTOFFS[1]).all()


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


def test_a_negative_skin_is_refused():
    with pytest.raises(ValueError, match="skin must be"):
        SkinNeighborList(3.0, -0.1)


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


def assert_same(edges, fresh):
    np.testing.assert_array_equal(edges.edge_index, fresh.edge_index)
    np.testing.assert_array_equal(edges.cell_offsets, fresh.cell_offsets)


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_reused_list_equals_fresh_list_on_a_random_walk(pbc):
    rng = np.random.default_rng(11)
    atoms = rattled(bulk("Cu", cubic=True) * (2, 2, 2))
    atoms.pbc = pbc
    reused = SkinNeighborList(4.1, 0.6)
    n_steps = 60
    for step in range(n_steps):
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        if step % 15 == 14:
            atoms.wrap()
        if step == 40:
            atoms.set_cell(atoms.cell.array * 1.01, scale_atoms=True)
        assert_same(reused(*arrays(atoms)), neighbor_list(*arrays(atoms), 4.1))
    assert 2 < reused.n_searches < n_steps / 2


def test_reused_list_decides_pairs_on_the_border_like_the_fresh_one():
    # A perfect crystal whose cutoff is a lattice length: every shell member sits on the border.
    atoms = bulk("Cu", a=3.6, cubic=True) * (3, 3, 3)
    reused = SkinNeighborList(3.6, 0.5)
    reused(*arrays(atoms))
    atoms.positions += [0.05, 0.11, -0.07]
    assert_same(reused(*arrays(atoms)), neighbor_list(*arrays(atoms), 3.6))
    assert reused.n_searches == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda atoms: atoms.set_cell(atoms.cell.array * 1.001),
        lambda atoms: atoms.set_pbc((True, True, False)),
        lambda atoms: atoms.pop(),
        lambda atoms: atoms.append("Cu"),
        lambda atoms: atoms.positions.__setitem__((0, 0), 0.26),
    ],
    ids=["cell", "pbc", "fewer atoms", "more atoms", "half the skin"],
)
def test_reused_list_searches_anew_when_the_reference_does_not_hold(change):
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    reused = SkinNeighborList(3.1, 0.5)
    reused(*arrays(atoms))
    change(atoms)
    assert_same(reused(*arrays(atoms)), neighbor_list(*arrays(atoms), 3.1))
    assert reused.n_searches == 2


def test_reused_list_shared_by_threads_is_exact():
    reused = SkinNeighborList(3.1, 0.5)
    structures = [rattled(bulk(symbol, cubic=True) * (2, 2, 2)) for symbol in ("Cu", "Al", "Au")]
    wrong = []

    def work(atoms):
        fresh = neighbor_list(*arrays(atoms), 3.1)
        for _ in range(30):
            edges = reused(*arrays(atoms))
            if not np.array_equal(rows(edges), rows(fresh)):
                wrong.append(atoms)

    threads = [threading.Thread(target=work, args=(atoms,)) for atoms in structures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inputs_are_left_alone():
    atoms = slab_without_c()
    before = [array.copy() for array in arrays(atoms)]
    neighbor_list(*arrays(atoms), 4.0)
    SkinNeighborList(4.0, 0.3)(*arrays(atoms))
    for array, old in zip(arrays(atoms), before, strict=True):
        np.testing.assert_array_equal(array, old)
