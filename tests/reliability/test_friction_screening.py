"""What a new user stumbled over in a screening: ids, labels, formats, copies, slabs, the report."""

import io
import json
import shutil

import ase.db
import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from analytic_potentials import Gas, Pairs, crystal, of
from ase.build import bulk, fcc111
from structures import rattled_crystal

from atomeq.screening.dedupe import Matcher, _fingerprint, _strains
from atomeq.screening.ledger import Ledger
from atomeq.screening.results import read_rows
from atomeq.screening.run import screen
from atomeq.screening.sources import Found, read_sources
from atomeq.screening.steps import Dedupe

SECOND_ORDER = 1.02  # of a strain of one percent


def pymatgen_document(atoms):
    return {
        "lattice": {"matrix": atoms.cell.tolist()},
        "sites": [
            {"species": [{"element": symbol, "occu": 1}], "xyz": xyz.tolist()}
            for symbol, xyz in zip(atoms.get_chemical_symbols(), atoms.positions, strict=True)
        ],
    }


def optimade_entry(atoms, identifier):
    names = atoms.get_chemical_symbols()
    attributes = {
        "lattice_vectors": atoms.cell.tolist(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "species_at_sites": names,
        "species": [{"name": "Cu", "chemical_symbols": ["Cu"], "concentration": [1.0]}],
        "band_gap": 0.5,
    }
    return {"id": identifier, "type": "structures", "attributes": attributes}


def cif_of(atoms):
    stream = io.BytesIO()
    ase.io.write(stream, atoms, format="cif")
    return stream.getvalue().decode()


def write_extxyz(folder, atoms):
    atoms.info = {"id": "mine-1", "band_gap": 0.5, "energy": "unknown"}
    ase.io.write(folder / "s.extxyz", atoms)


def write_parquet(folder, atoms, column, value):
    table = {column: [value], "material_id": ["mine-1"], "band_gap": [0.5]}
    pq.write_table(pa.table(table), folder / "s.parquet")


def write_database(folder, atoms):
    with ase.db.connect(folder / "s.db") as database:
        database.write(atoms, material_id="mine-1", band_gap=0.5)


WRITERS = {
    "extxyz": write_extxyz,
    "optimade": lambda folder, a: (folder / "s.json").write_text(
        json.dumps({"data": [optimade_entry(a, "mine-1")]})
    ),
    "pymatgen": lambda folder, a: (folder / "s.json").write_text(
        json.dumps({"mine-1": {"structure": pymatgen_document(a), "band_gap": 0.5}, "n": {}})
    ),
    "cif column": lambda folder, a: write_parquet(folder, a, "cif", cif_of(a)),
    "json column": lambda folder, a: write_parquet(
        folder, a, "structure", json.dumps(pymatgen_document(a))
    ),
    "struct column": lambda folder, a: write_parquet(folder, a, "structure", pymatgen_document(a)),
    "ase.db": write_database,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_ids_and_chosen_keys_of_the_source_are_columns(kind, tmp_path):
    atoms = bulk("Cu", cubic=True, a=3.7)
    (tmp_path / "in").mkdir()
    WRITERS[kind](tmp_path / "in", atoms)
    id_key = "material_id" if kind == "ase.db" else None  # else the row's number is the id
    screen(
        tmp_path / "in",
        of(Pairs()),
        out=tmp_path / "o",
        steps=["validate", "single_point", "rank"],
        id_key=id_key,
        info=["band_gap:number", "absent"],
    )
    found = [row for row in read_rows(tmp_path / "o") if row["status"] == "done"]
    ((row,), (ranked,)) = found, pq.read_table(tmp_path / "o" / "ranking.parquet").to_pylist()
    assert (row["id"], row["band_gap"], row["absent"]) == ("mine-1", 0.5, None)
    assert (ranked["id"], ranked["band_gap"]) == ("mine-1", 0.5)
    assert len(row["hash"]) == 32
    assert np.linalg.det(np.reshape(row["cell"], (3, 3))) == pytest.approx(3.7**3, rel=1e-5)


def test_keys_are_refused_and_missed_by_name(tmp_path, caplog):
    with pytest.raises(ValueError, match="'energy' cannot be a column"):
        screen([], of(Pairs()), out=tmp_path, info=["energy"])
    atoms = crystal()
    atoms.info["gap"] = "wide"
    summary = screen(
        iter([Found("s#0", atoms)]),
        of(Pairs()),
        out=tmp_path,
        steps=["single_point"],
        info=["gap:number", "absent"],
    )
    assert summary.kinds == {"unreadable": 1}
    assert "'gap' is 'wide', no number" in next(read_rows(tmp_path))["reason"]
    assert "no structure has the info key absent" in caplog.text


def test_results_of_the_old_format_are_refused(tmp_path):
    screen([Found("s#0", crystal())], of(Pairs()), out=tmp_path, steps=["single_point"])
    document = json.loads((tmp_path / "run.json").read_text())
    del document["format"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="format 1 of another atomeq"):
        screen([Found("s#0", crystal())], of(Pairs()), out=tmp_path, steps=["single_point"])


def test_a_cell_of_parquet_that_is_no_structure_is_one_row(tmp_path):
    values = [cif_of(bulk("Cu")), "not a cif", None, "{broken"]
    table = pa.table({"cif": values, "id": ["a", "b", "c", "d"]})
    pq.write_table(table, tmp_path / "s.parquet")
    found = list(read_sources([tmp_path / "s.parquet"]))
    assert [item.atoms is not None for item in found] == [True, False, False, False]
    assert [item.about["id"] for item in found] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("distinct", [None, False])
def test_winners_differ_after_relaxing(distinct, tmp_path):
    """Rattled copies of one crystal end in the same minimum; another one is not hidden by them."""
    structures = [rattled(bulk("Cu", a=3.55, cubic=True), k) for k in range(4)]
    structures.append(bulk("Cu", "sc", a=2.4))
    found = [Found(f"s#{k}", atoms) for k, atoms in enumerate(structures)]
    steps = ["dedupe", {"relax": {"fmax": 1e-3}}, {"rank": {"top": 2, "distinct": distinct}}]
    summary = screen(iter(found), of(Pairs()), out=tmp_path, steps=steps)
    assert summary.counts == {"done": 5}
    names = [row["n_atoms"] for row in summary.best]
    assert sorted(names) == ([1, 4] if distinct is None else [4, 4])


def rattled(atoms, seed):
    atoms.rattle(0.05, seed=seed)
    return atoms


def test_a_slab_in_a_pile_keeps_its_cell_and_says_so(tmp_path):
    slab = fcc111("Cu", (1, 1, 3), vacuum=6.0)
    slab.rattle(0.05, seed=0)
    found = [Found("bulk#0", crystal()), Found("slab#0", slab), Found("bulk#1", crystal(seed=1))]
    steps = [{"relax": {"cell": True, "fmax": 0.2}}, {"filter": "n_atoms > 0"}]
    summary = screen(iter(found), of(Pairs()), out=tmp_path, steps=steps)
    assert summary.counts == {"done": 3}
    rows = {row["locator"]: row for row in read_rows(tmp_path)}
    assert {name: row["cell_kept"] for name, row in rows.items()} == {
        "bulk#0": False,
        "slab#0": True,
        "bulk#1": False,
    }
    assert np.array_equal(np.reshape(rows["slab#0"]["cell"], (3, 3)), slab.cell.array)
    assert rows["slab#0"]["kind"] == "cell_kept"
    assert rows["slab#0"]["converged"]
    assert np.abs(np.reshape(rows["bulk#0"]["cell"], (3, 3)) - crystal().cell.array).max() > 1e-3
    screen(iter(found), of(Pairs()), out=tmp_path, steps=steps[:1])  # judged again
    assert {row["locator"]: row["reason"] for row in read_rows(tmp_path)} == {
        name: row["reason"] for name, row in rows.items()
    }


def test_more_slabs_than_a_group_are_relaxed(tmp_path):
    def slab(k):
        atoms = fcc111("Cu", (1, 1, 2), vacuum=6.0)
        atoms.positions[0, 2] += 0.001 * k
        return atoms

    found = (Found(f"s#{k}", slab(k)) for k in range(130))
    steps = [{"relax": {"cell": True, "max_steps": 1}}]
    assert screen(found, of(Gas()), out=tmp_path, steps=steps).counts == {"done": 130}


@pytest.mark.parametrize("cell", ["fcc", "bcc"])
def test_angles_count_in_the_bound_of_a_comparison(cell):
    """Every distance of a sheared cell is within what the bound allows for its angles."""
    step = Dedupe(match="structure")
    atoms = bulk("Cu", cell, a=9.0)
    stretch, _ = _strains(step, atoms)
    parameters = atoms.cell.cellpar()
    largest = 0.0
    for signs in np.ndindex(2, 2, 2):
        other = atoms.copy()
        turned = parameters.copy()
        turned[3:] += step.angle * (2 * np.array(signs) - 1)
        other.set_cell(turned, scale_atoms=True)
        marks = _fingerprint(atoms)[1:], _fingerprint(other)[1:]
        largest = max(largest, float(np.nanmax(np.abs(marks[1] / marks[0] - 1))))
    assert step.length < largest <= SECOND_ORDER * stretch


def test_a_copy_with_other_angles_is_found(tmp_path):
    atoms = rattled_crystal().repeat((1, 1, 1))
    other = atoms.copy()
    parameters = atoms.cell.cellpar()
    parameters[3:] += 0.4
    other.set_cell(parameters, scale_atoms=True)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    matcher = Matcher(Dedupe(match="structure"), ledger)
    assert matcher.original_of("a", atoms) is None
    assert matcher.original_of("b", other) == "a"
    ledger.close()


@pytest.mark.parametrize("named", [True, False])
def test_report_fits_into_1300_pixels_and_its_titles_stand_apart(named, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = []
    for k in range(12):
        atoms = crystal(seed=k, a=3.5 + 1e-4 * k)
        atoms.info = {"id": f"some-database-{k:08d}"} if named else {}
        found.append(Found(f"a/rather/deep/folder/with_a_long_name/{k:06d}.cif#{k}", atoms))
    steps = [
        {"relax": {"max_steps": 2, "cell": True}},
        {"properties": {"hull": {"Cu": -1.0}}},
        "rank",
    ]
    screen(iter(found), of(Pairs()), out=tmp_path, steps=steps)
    with sync_api.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox"],
                ignore_default_args=["--hide-scrollbars"],
            )
        except sync_api.Error as error:
            pytest.skip(f"Chromium cannot be started: {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.goto((tmp_path / "report.html").as_uri())
        widths = page.evaluate(
            "[document.documentElement, ...document.querySelectorAll('.scroll')]"
            ".map((box) => [box.scrollWidth, box.clientWidth])"
        )
        boxes = page.evaluate(
            "[...document.querySelectorAll('#plots svg')].map((svg) => "
            "[...svg.querySelectorAll('text')].map((text) => "
            "{ const b = text.getBoundingClientRect(); "
            "return [b.left, b.right, b.top, b.bottom]; }))"
        )
        browser.close()
    assert all(needed <= there for needed, there in widths), widths
    assert len(boxes) == 3
    for plot in boxes:
        for k, one in enumerate(plot):
            for other in plot[:k]:
                apart = one[0] >= other[1] or other[0] >= one[1]
                assert apart or one[2] >= other[3] or other[2] >= one[3], (one, other)
