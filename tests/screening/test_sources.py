"""Every format gives the structures written into it; what is damaged is told, not raised."""

import gzip
import json

import ase.db
import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.build import bulk
from oc20 import slab_frames
from structures import rattled_crystal, rattled_molecule, rattled_slab

from atomeq.data.oc20_write import write_lmdb
from atomeq.screening.identity import content_hash, place_hash, shard_of
from atomeq.screening.rows import structure_columns
from atomeq.screening.sources import read_sources

TEXT_DIGITS = 1e-6  # Å; what the text formats keep


def crystals():
    slab = rattled_slab()
    slab.info.clear()  # extxyz cannot hold what ASE's builder writes there
    return [rattled_crystal(), slab, bulk("Cu")]


def pymatgen_document(atoms):
    return {
        "@module": "os",
        "@class": "system",  # a decoder that imports what a file names would run this
        "lattice": {"matrix": atoms.cell.tolist(), "pbc": atoms.pbc.tolist()},
        "sites": [
            {"species": [{"element": symbol, "occu": 1}], "abc": abc.tolist()}
            for symbol, abc in zip(
                atoms.get_chemical_symbols(), atoms.get_scaled_positions(wrap=False), strict=True
            )
        ],
    }


def optimade_document(atoms):
    names = atoms.get_chemical_symbols()
    return {
        "type": "structures",
        "attributes": {
            "lattice_vectors": atoms.cell.tolist(),
            "cartesian_site_positions": atoms.positions.tolist(),
            "species_at_sites": names,
            "species": [
                {"name": name, "chemical_symbols": [name], "concentration": [1.0]}
                for name in sorted(set(names))
            ],
            "dimension_types": [int(flag) for flag in atoms.pbc],
        },
    }


def write_json(path, document):
    path.write_text(json.dumps(document))


def write_database(path, frames):
    with ase.db.connect(path) as database:
        for atoms in frames:
            database.write(atoms)


def write_parquet(path, frames):
    pq.write_table(pa.Table.from_pylist([structure_columns(atoms) for atoms in frames]), path)


WRITERS = {
    "s.extxyz": lambda path, frames: ase.io.write(path, frames),
    "s.extxyz.gz": lambda path, frames: ase.io.write(path, frames),
    "s.traj": lambda path, frames: ase.io.write(path, frames),
    "s.db": write_database,
    "s.aselmdb": write_database,
    "s.parquet": write_parquet,
    "s.json": lambda path, frames: write_json(path, [pymatgen_document(a) for a in frames]),
    "o.json": lambda path, frames: write_json(
        path, {"data": [optimade_document(a) for a in frames]}
    ),
    "o.jsonl": lambda path, frames: path.write_text(
        "\n".join(json.dumps(d) for d in [{"x-optimade": {}}, *map(optimade_document, frames)])
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_format_gives_back_what_was_written(name, tmp_path):
    WRITERS[name](tmp_path / name, crystals())
    found = list(read_sources([name], working_directory=tmp_path))
    assert [item.locator for item in found] == [f"{name}#{k}" for k in range(3)]
    for item, atoms in zip(found, crystals(), strict=True):
        assert item.atoms is not None, item.error
        assert item.atoms.numbers.tolist() == atoms.numbers.tolist()
        assert item.atoms.pbc.tolist() == atoms.pbc.tolist()
        assert np.abs(item.atoms.positions - atoms.positions).max() < TEXT_DIGITS
        assert np.abs(item.atoms.cell.array - atoms.cell.array).max() < TEXT_DIGITS


@pytest.mark.parametrize("name", ["POSCAR", "CONTCAR_7", "a.vasp", "a.cif"])
def test_files_of_one_structure(name, tmp_path):
    form = "cif" if name.endswith("cif") else "vasp"
    ase.io.write(tmp_path / name, rattled_crystal(), format=form)
    (found,) = read_sources([tmp_path / name])
    assert found.atoms is not None
    assert found.atoms.get_volume() == pytest.approx(rattled_crystal().get_volume(), rel=1e-5)


def test_lmdb_of_oc20(tmp_path):
    write_lmdb(tmp_path / "oc20.lmdb", slab_frames(3), "stored")
    found = list(read_sources([tmp_path / "oc20.lmdb"]))
    assert [len(item.atoms) for item in found] == [len(f.numbers) for f in slab_frames(3)]
    assert found[0].atoms.constraints


def test_a_folder_is_read_in_order_and_other_files_are_passed_over(tmp_path):
    (tmp_path / "b").mkdir()
    ase.io.write(tmp_path / "b" / "2.cif", bulk("Cu"))
    ase.io.write(tmp_path / "a.extxyz", [bulk("Cu"), bulk("Al")])
    (tmp_path / "notes.txt").write_text("no structure")
    (tmp_path / ".hidden.cif").write_text("no structure")
    found = [item.locator for item in read_sources([tmp_path])]
    assert found == [f"{tmp_path}/a.extxyz#0", f"{tmp_path}/a.extxyz#1", f"{tmp_path}/b/2.cif#0"]


DAMAGED = {
    "empty.cif": b"",
    "empty.extxyz": b"",
    "empty.traj": b"",
    "empty.db": b"",
    "empty.lmdb": b"",
    "empty.parquet": b"",
    "empty.json": b"",
    "POSCAR": b"Cu\n1.0\n3 0 0\n",
    "cut.cif": b"data_x\n_cell_length_a 3.6\nloop_\n_atom_site_label\n",
    "no.parquet": b"PAR1 but not really",
    "no.traj": b"- of Ulm",
    "no.json": b'{"lattice": ',
    "bytes.extxyz": b"\xff\xfe\x00\x01",
    "cut.extxyz.gz": gzip.compress(b"1\n\nCu 0 0 0\n")[:-9],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_told_and_the_next_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(DAMAGED[name])
    ase.io.write(tmp_path / "z.extxyz", bulk("Cu"))
    found = list(read_sources([name, "z.extxyz"], working_directory=tmp_path))
    errors = [item for item in found if item.atoms is None]
    assert [bool(item.error) for item in errors] == [True]
    assert errors[0].locator.startswith(name)
    assert found[-1].atoms is not None


def test_a_bad_frame_does_not_hide_the_next(tmp_path):
    good = "1\n\nCu 0.0 0.0 0.0\n"
    (tmp_path / "s.xyz").write_text(good + "1\n\nCu 0.0 what 0.0\n" + good + "5\n\nCu 0 0 0\n")
    found = list(read_sources([tmp_path / "s.xyz"]))
    assert [item.atoms is not None for item in found] == [True, False, True, False]
    assert "cut short" in found[3].error


def test_partial_occupancy_is_refused_not_guessed(tmp_path):
    document = pymatgen_document(bulk("Cu"))
    document["sites"][0]["species"] = [
        {"element": "Cu", "occu": 0.5},
        {"element": "Au", "occu": 0.5},
    ]
    write_json(tmp_path / "s.json", [document, pymatgen_document(bulk("Al"))])
    first, second = read_sources([tmp_path / "s.json"])
    assert first.atoms is None
    assert "partly occupied (Cu 0.5, Au 0.5)" in first.error
    assert second.atoms is not None


def test_a_document_of_something_else_is_one_failure(tmp_path):
    write_json(tmp_path / "notes.json", {"author": {"name": "A"}, "year": {"of": 1}})
    (found,) = read_sources([tmp_path / "notes.json"])
    assert "holds no structure; its keys are author, year" in found.error


def test_sources_are_refused_at_the_door(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.cif"):
        read_sources([tmp_path / "nowhere.cif"])
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="no known kind"):
        read_sources([tmp_path / "a.txt"])
    with pytest.raises(ValueError, match="holds no structure file"):
        read_sources([tmp_path])


def test_hash_sees_content_only():
    atoms = rattled_molecule()
    same = atoms.copy()
    same.info["name"] = "other"
    same.positions += 1e-9
    assert content_hash(same) == content_hash(atoms)
    for changed in (atoms.copy(), atoms.copy(), atoms.copy(), atoms.copy()):
        assert content_hash(changed) == content_hash(atoms)
    moved, other, periodic, held = (atoms.copy() for _ in range(4))
    moved.positions[0, 0] += 1e-4
    other.numbers[0] = 14
    periodic.cell, periodic.pbc = [9, 9, 9], True
    held.set_constraint(ase.constraints.FixAtoms([0]))
    hashes = {content_hash(a) for a in (atoms, moved, other, periodic, held, Atoms())}
    assert len(hashes) == 6
    assert place_hash("a", "x#0") != place_hash("a", "x#1")
    assert {shard_of(content, 3) for content in hashes} <= {0, 1, 2}
