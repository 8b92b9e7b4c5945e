"""A site that is not one whole atom is refused by reason, whoever wrote it."""

import json
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure

from atomeq.graph.convert import StructureError, from_structures
from atomeq.screening.json_structures import structures_of_document

NOT_ONE = [0.5, 0.0, 1.5, 2, -1.0, float("nan"), float("inf")]


def optimade(**species: Any) -> dict[str, Any]:
    one = {"name": "Cu", "chemical_symbols": ["Cu"], **species}
    attributes = {
        "species": [one],
        "species_at_sites": ["Cu"],
        "lattice_vectors": [[3, 0, 0], [0, 3, 0], [0, 0, 3]],
        "cartesian_site_positions": [[0, 0, 0]],
    }
    return {"data": [{"id": "1", "attributes": attributes}]}


def pymatgen(share: float) -> dict[str, Any]:
    site = {"species": [{"element": "Cu", "occu": share}], "abc": [0, 0, 0]}
    return {"lattice": {"matrix": [[3, 0, 0], [0, 3, 0], [0, 0, 3]]}, "sites": [site]}


def read(document: dict[str, Any]) -> Any:
    (item,) = structures_of_document(json.loads(json.dumps(document)))
    return item


@pytest.mark.parametrize("share", NOT_ONE)
def test_a_share_that_is_not_one_is_refused(share: float):
    for document in (optimade(concentration=[share]), pymatgen(share)):
        item = read(document)
        assert isinstance(item, ValueError)
        assert f"occupied (Cu {share})" in str(item)


def test_shares_and_elements_that_differ_in_number_are_refused():
    for species in (
        {"chemical_symbols": ["Cu", "vacancy"], "concentration": [0.9, 0.1]},
        {"chemical_symbols": ["Cu", "Au"]},
        {"concentration": [0.5, 0.5]},
        {"concentration": ["many"]},
    ):
        assert isinstance(read(optimade(**species)), ValueError)


def test_whole_atoms_are_read():
    for document in (optimade(), optimade(concentration=[1.0]), optimade(concentration=None)):
        assert list(read(document).numbers) == [29]
    assert list(read(pymatgen(1.0)).numbers) == [29]
    assert list(read(pymatgen(1 - 1e-10)).numbers) == [29]


@pytest.mark.parametrize("share", [0.5, 1.5, 2.0, float("nan")])
def test_structures_of_pymatgen_are_held_to_the_same(share: float):
    structure = Structure(Lattice.cubic(3.0), ["Cu"], [[0, 0, 0]])
    structure[0]._species._data = {key: share for key in structure[0].species}
    structure[0]._species._n_atoms = share
    with pytest.raises(StructureError, match="not one element"):
        from_structures(structure)
