"""A site that is not one whole atom is refused by reason, whoever wrote it."""

import json
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from pymatgen.core import Lattice, Structure
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.graph.convert import StructureError, from_structures, validate_structure
from atomeq.screening.json_structures import structures_of_document
from atomeq.screening.results import read_rows
from atomeq.screening.run import screen
from atomeq.screening.sources import Found, read_sources

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


def test_attached_atoms_and_sites_that_exclude_each_other_are_refused():
    assert list(read(optimade(nattached=[0])).numbers) == [29]
    assert "attached atoms" in str(read(optimade(attached=["H"], nattached=[2])))
    document = optimade()
    document["data"][0]["attributes"]["assemblies"] = [{"sites_in_groups": [[0], [1]]}]
    assert "assemblies" in str(read(document))


def test_an_infinite_cell_does_not_become_a_number():
    document = optimade()
    document["data"][0]["attributes"]["lattice_vectors"] = np.diag([np.inf, 1, 1]).tolist()
    with pytest.raises(StructureError, match="finite"):
        validate_structure(read(document))


def half_occupied(share: float = 0.5) -> Atoms:
    """Atoms as ASE reads them from a CIF, where only ``info`` tells."""
    atoms = bulk("Cu", cubic=True)
    atoms.info["occupancy"] = {"0": {"Cu": 1.0}, "1": {"Cu": share}}
    return atoms


@pytest.mark.parametrize("share", NOT_ONE)
def test_every_door_for_atoms_refuses(share: float):
    atoms = half_occupied(share)
    atoms.calc = AtomeqCalculator(small_potential())
    for door in (
        lambda: from_structures(atoms),
        lambda: validate_structure(atoms),
        atoms.get_potential_energy,
        lambda: atoms.calc.evaluate([bulk("Cu"), atoms]),
    ):
        with pytest.raises(StructureError, match=r"Cu4\): a site is (partly|impossibly) occupied"):
            door()


def test_full_occupation_and_notes_of_that_name_pass():
    atoms = half_occupied(1.0)
    validate_structure(atoms)
    atoms.info["occupancy"] = "high"
    validate_structure(atoms)


def test_single_point_of_a_disordered_cif_ends_with_code_2(tmp_path, capsys):
    ase.io.write(tmp_path / "whole.cif", bulk("Cu", cubic=True))
    text = (tmp_path / "whole.cif").read_text()
    assert "1.0000\n" in text
    (tmp_path / "half.cif").write_text(text.replace("1.0000\n", "0.5000\n"))
    words = ["single-point", str(tmp_path / "half.cif"), "--potential", "cu-pbe"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", str(tmp_path / "out.extxyz")])
    assert stop.value.code == 2
    assert "partly occupied (Cu 0.5)" in capsys.readouterr().err
    assert not (tmp_path / "out.extxyz").exists()


def test_a_screening_gives_it_a_row_with_its_kind(tmp_path):
    (tmp_path / "o.json").write_text(json.dumps(optimade(concentration=[0.5])))
    found = [*read_sources([tmp_path / "o.json"]), Found("s#0", half_occupied())]
    found.append(Found("s#1", bulk("Cu")))
    summary = screen(iter(found), small_potential(), out=tmp_path / "out")
    assert summary.counts == {"failed": 2, "done": 1}
    rows = {row["locator"].split("/")[-1]: row for row in read_rows(tmp_path / "out")}
    assert "partly occupied" in rows["o.json#0"]["reason"]
    assert rows["s#0"]["kind"] == "partly_occupied"
    assert rows["s#1"]["status"] == "done"
