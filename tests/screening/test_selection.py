"""A choice depends on what is in the pool, not on its order, and copies count once."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from small_potential import small_potential

from atomeq.potential.mean import MeanPotential
from atomeq.screening.selection import CRITERIA, select


def pool() -> list[Atoms]:
    structures = []
    for k in range(12):
        atoms = bulk("Cu", cubic=True)
        atoms.symbols[k % 4] = "Al"
        atoms.rattle(0.02 * (1 + k), seed=k)
        structures.append(atoms)
    return structures


@pytest.fixture(scope="module")
def committee() -> MeanPotential:
    other = small_potential()
    for parameter in other.model.parameters():
        parameter.data *= 1.05
    return MeanPotential([small_potential(), other])


def turned(atoms: Atoms) -> Atoms:
    copy = atoms[[3, 1, 0, 2]]
    copy.rotate(30, (1, 2, 3), rotate_cell=True)
    return copy


@pytest.mark.parametrize("by", CRITERIA)
def test_the_order_of_a_pool_does_not_matter(committee: MeanPotential, by):
    structures = pool()
    order = np.random.RandomState(1).permutation(len(structures))
    first = select(structures, 5, committee, by=by)
    again = select([structures[k] for k in order], 5, committee, by=by)
    assert [one.id for one in first.chosen] == [one.id for one in again.chosen]
    assert [one.index for one in first.chosen] == [order[one.index] for one in again.chosen]
    assert len({one.id for one in first.chosen}) == 5


@pytest.mark.parametrize("by", CRITERIA)
def test_copies_are_chosen_once_and_those_of_the_training_set_never(committee, by):
    structures = pool()
    doubled = [*structures, turned(structures[11]), turned(structures[3]), structures[3].copy()]
    found = select(doubled, 20, committee, by=by, training=[turned(structures[0])])
    assert found.copies[0] == "training"
    assert len(found.chosen) == 11  # 12 that differ, but for one that is known
    assert len(found.copies) == 4
    assert not {one.index for one in found.chosen} & set(found.copies)
    ids = {one.id for one in found.chosen}
    assert {which for which in found.copies.values() if which != "training"} <= ids


def test_cells_of_an_odd_and_an_even_number_of_electrons_are_copies(committee: MeanPotential):
    found = select([bulk("Cu"), bulk("Cu", cubic=True)], 2, committee, by="farthest")
    assert len(found.chosen) == 1  # 29 electrons and 116, each in its lowest multiplicity


def test_what_is_known_is_not_chosen_again(committee: MeanPotential):
    structures = pool()
    known = structures[6:]
    near = known[0].copy()
    near.positions[0, 0] += 1e-3  # no copy, but nothing new
    found = select([*structures[:6], near], 7, committee, by="farthest", training=known)
    assert found.chosen[-1].index == 6


def test_spread_asks_who_can_doubt(committee: MeanPotential):
    found = select(pool(), 12, committee, by="spread")
    scores = [one.score for one in found.chosen]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match="does not know its uncertainty"):
        select(pool(), 3, small_potential(), by="spread")
    with pytest.raises(ValueError, match="by is one of"):
        select(pool(), 3, committee, by="beauty")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 or more"):
        select(pool(), 0, committee)
