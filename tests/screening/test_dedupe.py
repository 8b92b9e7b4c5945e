"""Copies in any disguise are found, and what differs is kept."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell, molecule
from structures import rattled_crystal, rattled_molecule, rattled_slab

from atomeq.screening.dedupe import Matcher
from atomeq.screening.ledger import Ledger
from atomeq.screening.steps import Dedupe

NOISE = 1e-3  # Å


@pytest.fixture
def matcher(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield Matcher(Dedupe(match="structure"), ledger)
    ledger.close()


def permuted(atoms):
    return atoms[np.random.default_rng(0).permutation(len(atoms)).tolist()]


def rattled(atoms):
    moved = atoms.copy()
    moved.rattle(NOISE, seed=5)
    return moved


def turned(atoms):
    other = atoms.copy()
    other.rotate(37, (1, 2, 3), rotate_cell=True)
    return other


def skewed(atoms):
    return make_supercell(atoms, [[1, 1, 0], [0, 1, 0], [0, 0, 1]])


STRUCTURES = {
    "rocksalt": lambda: bulk("MgO", "rocksalt", a=4.2, cubic=True),
    "rattled": rattled_crystal,
    "slab": rattled_slab,
    "molecule": rattled_molecule,
}
DISGUISES = {
    "rattled": rattled,
    "permuted": permuted,
    "turned": turned,
    "supercell": lambda atoms: rattled(atoms.repeat((2, 1, 1))),
    "skewed": skewed,
}


# The cell of a molecule cannot be chosen otherwise.
PAIRS = [
    (name, disguise)
    for name in STRUCTURES
    for disguise in DISGUISES
    if name != "molecule" or disguise not in ("supercell", "skewed")
]


@pytest.mark.parametrize(("name", "disguise"), PAIRS)
def test_copy_is_found(name, disguise, matcher):
    atoms = STRUCTURES[name]()
    assert matcher.original_of("first", atoms) is None
    assert matcher.original_of("second", DISGUISES[disguise](atoms)) == "first"


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_differs_is_kept(name, matcher):
    atoms = STRUCTURES[name]()
    moved, other = atoms.copy(), atoms.copy()
    moved.positions[0] += [0.2, 0.1, 0]
    other.numbers[0] = 14
    assert matcher.original_of("first", atoms) is None
    assert matcher.original_of("moved", moved) is None
    assert matcher.original_of("other", other) is None


def test_strained_cells_differ(matcher):
    for k, a in enumerate((3.5, 3.55, 3.6)):
        assert matcher.original_of(str(k), bulk("Cu", a=a)) is None
    assert matcher.original_of("copy", bulk("Cu", a=3.55, cubic=True)) == "1"


def test_conformers_differ(matcher):
    names = ["trans-butane", "isobutane"]
    for name in names:
        assert matcher.original_of(name, molecule(name)) is None
    assert matcher.original_of("again", molecule(names[0])) == names[0]


def test_an_interrupted_structure_is_no_copy_of_itself(matcher):
    assert matcher.original_of("a", bulk("Cu")) is None
    assert matcher.original_of("a", bulk("Cu")) is None


def test_single_atoms_match(matcher):
    assert matcher.original_of("a", Atoms("Cu")) is None
    assert matcher.original_of("b", Atoms("Cu", [[1, 2, 3]])) == "a"


def test_what_distances_tell_apart_is_not_compared_site_by_site(matcher, monkeypatch):
    crystal = bulk("MgO", "rocksalt", a=4.2, cubic=True)
    exchanged = crystal.copy()
    exchanged.numbers[[0, 1]] = exchanged.numbers[[1, 0]]
    moved = crystal.copy()
    moved.positions[0] += (0.2, 0, 0)
    assert matcher.original_of("crystal", crystal) is None
    monkeypatch.setattr(matcher, "_same", pytest.fail)
    assert matcher.original_of("exchanged", exchanged) is None
    assert matcher.original_of("moved", moved) is None


def test_copies_atom_by_atom_are_copies_by_symmetry_too(matcher):
    crystal = rattled_crystal()
    images = crystal.copy()
    images.translate((0.3, 0.2, 0.1))
    images.positions[1:3] += images.cell.array[1:]
    strained = crystal.copy()
    strained.set_cell(strained.cell.array * 1.004, scale_atoms=True)
    for copy in (rattled(crystal), images, strained):
        assert matcher.are_close(copy, crystal)
    assert matcher.original_of("first", crystal) is None
    for k, copy in enumerate((rattled(crystal), images, strained)):
        assert matcher.original_of(str(k), copy) == "first"


def test_what_has_moved_is_not_close(matcher):
    crystal = rattled_crystal()
    moved, swollen, other = crystal.copy(), crystal.copy(), crystal.copy()
    moved.positions[0] += (0.05, 0, 0)
    swollen.set_cell(swollen.cell.array * 1.006, scale_atoms=True)
    other.numbers[0] = 14
    different = (moved, swollen, other, permuted(crystal), skewed(crystal), crystal[1:])
    assert not any(matcher.are_close(atoms, crystal) for atoms in different)
