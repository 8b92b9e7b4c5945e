"""Prediction files of Matbench Discovery from a sample in its format: right, whole, resumable."""

import csv
import gzip
import io
import json
import zipfile

import ase.io
import numpy as np
import pytest
from analytic_potentials import Pairs, crystal, of
from ase import Atoms
from ase.build import bulk
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor

from atomeq.dynamics.run import relax
from atomeq.screening.matbench_discovery import predict_matbench_discovery

OXYGEN = -0.687  # eV per atom of an oxide, published with the MP2020 corrections
REFERENCES = {"Cu": (-4.0993 * 2, 2), "Mg": (-1.5003, 1), "O": (-39.5735, 8)}  # eV, atoms
POTCARS = {"Cu": "PAW_PBE Cu_pv 06Sep2000", "Mg": "PAW_PBE Mg_pv 06Sep2000"}
ROUNDED = 1.01e-4  # eV, of the published files
SETTINGS = {"fmax": 0.1, "max_steps": 60}


def sample() -> dict[str, Atoms]:
    oxide = bulk("MgO", "rocksalt", a=4.6)
    oxide.rattle(0.05, seed=1)
    overlap = Atoms("Cu2", positions=[[0, 0, 0], [0.1, 0, 0]], cell=[4, 4, 4], pbc=True)
    copper = {f"wbm-1-{k}": crystal(seed=k, a=3.5 + 0.04 * k) for k in range(1, 4)}
    return {**copper, "wbm-2-1": oxide, "wbm-2-2": overlap, "wbm-3-1": copper["wbm-1-1"].copy()}


def write_zip(folder, structures):
    path = folder / "2024-08-04-wbm-initial-atoms.extxyz.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for identifier, atoms in structures.items():
            named, text = atoms.copy(), io.StringIO()
            named.info["material_id"] = identifier
            ase.io.write(text, named, format="extxyz")
            archive.writestr(f"{identifier}.extxyz", text.getvalue())
    return path


def write_lines(path, documents):
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(document) + "\n" for document in documents)
    return path


def entry_of(identifier, atoms):
    elements = sorted(set(atoms.symbols))
    parameters = {
        "run_type": "GGA",
        "is_hubbard": False,
        "hubbards": {},
        "potcar_symbols": [POTCARS.get(e, "PAW_PBE O 08Apr2002") for e in elements],
    }
    entry = {"@module": "os", "@class": "system", "energy": 0.0, "correction": 1.0}
    return {
        "material_id": identifier,
        "formula_from_cse": atoms.get_chemical_formula(),
        "computed_structure_entry": {**entry, "parameters": parameters, "data": {}},
    }


@pytest.fixture
def files(tmp_path):
    structures = sample()
    entries = [entry_of(*item) for item in structures.items()]
    references = {
        element: {"energy": energy, "composition": {element: n}, "correction": 0.0}
        for element, (energy, n) in REFERENCES.items()
    }
    path = tmp_path / "mp-elemental-reference-entries.json.gz"
    path.write_bytes(gzip.compress(json.dumps(references).encode()))
    return {
        "structures": write_zip(tmp_path, structures),
        "entries": write_lines(tmp_path / "wbm-computed-structure-entries.jsonl.gz", entries),
        "references": path,
    }


def predict(files, out, **options):
    given = {**files, **SETTINGS, **options}
    return predict_matbench_discovery(given.pop("structures"), of(Pairs()), out=out, **given)


def read_table(path):
    with gzip.open(path, "rt", newline="") as stream:
        return {row["material_id"]: row for row in csv.DictReader(stream)}


def read_lines(path):
    with gzip.open(path, "rt") as stream:
        return {line["material_id"]: line for line in map(json.loads, stream)}


@pytest.mark.filterwarnings("ignore:Failed to guess oxidation states")  # rattled: as published
def test_the_files_hold_what_relaxations_give(files, tmp_path):
    found = predict(files, tmp_path / "out")
    assert (found.missing, found.failed) == (0, 1)
    table, lines = read_table(found.discovery), read_lines(found.geometry)
    structures = sample()
    assert list(table) == list(structures)
    assert list(lines) == [name for name in structures if name != "wbm-2-2"]
    for identifier in lines:
        (alone,) = relax([structures[identifier]], of(Pairs()), cell=True, **SETTINGS)
        row, line = table[identifier], lines[identifier]
        atoms = AseAtomsAdaptor.get_atoms(Structure.from_dict(line["structure"]))
        assert line["energy"] == pytest.approx(alone.energy, abs=1e-6)
        np.testing.assert_allclose(atoms.cell.array, alone.atoms.cell.array, atol=1e-5)
        np.testing.assert_allclose(atoms.positions, alone.atoms.positions, atol=1e-5)
        assert (line["converged"], line["n_steps"]) == (alone.converged, alone.n_steps)
        counts = {symbol: atoms.get_chemical_symbols().count(symbol) for symbol in REFERENCES}
        elements = sum(n * REFERENCES[e][0] / REFERENCES[e][1] for e, n in counts.items())
        corrected = alone.energy + OXYGEN * counts["O"]
        assert float(row["corrected_energy"]) == pytest.approx(corrected, abs=ROUNDED)
        expected = (corrected - elements) / len(atoms)
        assert float(row["e_form_per_atom"]) == pytest.approx(expected, abs=ROUNDED)
    assert table["wbm-2-2"]["e_form_per_atom"] == ""
    assert "apart" in table["wbm-2-2"]["error"] or "overlap" in table["wbm-2-2"]["error"]


def test_an_interrupted_run_goes_on_and_doubles_nothing(files, tmp_path):
    whole = predict(files, tmp_path / "whole")
    rows = []

    def stop_after_two(seen, row):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(files, tmp_path / "out", observe=stop_after_two)
    assert not list((tmp_path / "out").glob("*.gz"))
    again = predict(files, tmp_path / "out")
    assert again.summary.seen.earlier == 2
    assert read_table(again.discovery) == read_table(whole.discovery)
    before = again.discovery.read_bytes(), again.geometry.read_bytes()
    third = predict(files, tmp_path / "out")
    assert third.summary.seen.rows == 0
    assert (third.discovery.read_bytes(), third.geometry.read_bytes()) == before
    assert len(list((tmp_path / "out").glob("*.gz"))) == 2


def test_shards_write_the_files_when_all_are_done(files, tmp_path):
    first = predict(files, tmp_path / "out", shard=(0, 2))
    assert first.missing > 0
    assert first.discovery is None
    second = predict(files, tmp_path / "out", shard=(1, 2))
    assert second.missing == 0
    assert list(read_table(second.discovery)) == list(sample())


def test_structures_of_pymatgen_give_the_same(files, tmp_path):
    documents = [
        {
            "material_id": identifier,
            "formula_from_cse": atoms.get_chemical_formula(),
            "initial_structure": AseAtomsAdaptor.get_structure(atoms).as_dict(),
        }
        for identifier, atoms in sample().items()
    ]
    lines = write_lines(tmp_path / "2022-10-19-wbm-init-structs.jsonl.gz", documents)
    found = predict({**files, "structures": lines}, tmp_path / "lines")
    expected = read_table(predict(files, tmp_path / "zip").discovery)
    table = read_table(found.discovery)
    assert list(table) == list(expected)
    for identifier, row in table.items():
        for name in ("e_form_per_atom", "energy"):
            if expected[identifier][name]:
                known = float(expected[identifier][name])
                assert float(row[name]) == pytest.approx(known, abs=1e-3)
    with pytest.raises(ValueError, match=r"two rows of|not given now"):
        predict(files, tmp_path / "lines")  # other atoms to the last bit: rows of their own


def test_what_does_not_belong_is_refused(files, tmp_path):
    few = [entry_of("wbm-1-1", sample()["wbm-1-1"])]
    entries = write_lines(tmp_path / "few.jsonl.gz", few)
    with pytest.raises(ValueError, match="has no entry of 4 structures"):
        predict({**files, "entries": entries}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"line 1 of .* is no computed structure entry"):
        predict({**files, "entries": files["references"]}, tmp_path / "out")
    with pytest.raises(ValueError, match="no elemental reference entries"):
        predict({**files, "references": files["entries"]}, tmp_path / "out")
    nameless = tmp_path / "nameless.extxyz"
    ase.io.write(nameless, crystal())
    with pytest.raises(ValueError, match="has no material_id"):
        predict({**files, "structures": nameless}, tmp_path / "nameless")
    part = write_zip(tmp_path, {"wbm-1-1": sample()["wbm-1-1"]})
    with pytest.raises(ValueError, match="5 structures that were not given now"):
        predict({**files, "structures": part}, tmp_path / "out")


def test_an_id_stands_once(files, tmp_path):
    doubled = [crystal(seed=1), crystal(seed=2)]
    for atoms in doubled:
        atoms.info["material_id"] = "wbm-1-1"
    ase.io.write(tmp_path / "doubled.extxyz", doubled)
    with pytest.raises(ValueError, match="wbm-1-1 stands twice"):
        predict({**files, "structures": tmp_path / "doubled.extxyz"}, tmp_path / "out")
