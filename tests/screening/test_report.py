"""The report shows what the rows say, escapes what strangers named, and works in a browser."""

import gzip
import json
import re
import shutil

import ase.db
import numpy as np
import pytest
from analytic_potentials import Pairs, crystal, of
from ase import Atoms
from ase.build import bulk

from atomeq.screening import plots as plots_module
from atomeq.screening.export import export_chemiscope, export_database
from atomeq.screening.report import write_report
from atomeq.screening.results import read_rows
from atomeq.screening.rows import STATUSES
from atomeq.screening.run import screen
from atomeq.screening.sources import Found

EVIL = '</script><script>document.title="taken"</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("screening")
    found = [Found(f"{EVIL}#{k}", crystal(seed=k, a=3.5 + 0.02 * k)) for k in range(6)]
    found += [Found(f"{EVIL}#6", None, EVIL), Found("two#0", Atoms("Cu2", [[0] * 3, [0.01] * 3]))]
    screen(
        iter(found), of(Pairs()), out=out, steps=["validate", "single_point", "properties", "rank"]
    )
    return out


def data_of(folder):
    text = (folder / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def test_report_holds_what_the_rows_say(folder):
    data = data_of(folder)
    counts = {name: count for name, count, _ in data["counts"]}
    assert [counts[name] for name in STATUSES] == [6, 2, 0, 0]
    assert {item["kind"]: item["count"] for item in data["failures"]} == {
        "unreadable": 1,
        "overlap": 1,
    }
    assert data["retry"].endswith(f"--out {folder.name} --resume --retry unreadable,overlap")
    energies = [row["energy_per_atom"] for row in data["best"]]
    assert energies == sorted(energies)
    assert len(energies) == 6
    assert data["best"][0]["view"]["elements"].keys() == {"Cu"}
    assert dict(data["provenance"])["its SHA-256"] == data["settings"]["potential"]["sha256"]


def test_names_of_strangers_stay_text_and_nothing_is_loaded(folder):
    text = (folder / "report.html").read_text()
    assert EVIL not in text
    assert EVIL in str(data_of(folder)["failures"])  # it is there, as data
    assert text.count("</script>") == 2
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)
    assert "default-src 'none'" in text


def test_plots_hold_every_structure_once(folder, monkeypatch):
    energy, volume, scatter = plots_module.plots(folder, "energy_per_atom")
    rows = [row for row in read_rows(folder) if row["status"] == "done"]
    for plot, name in ((energy, "energy_per_atom"), (volume, "volume")):
        values = [row[name] for row in rows]
        assert (plot["low"], plot["high"]) == (min(values), max(values))
        assert plot["counts"] == np.histogram(values, bins=len(plot["counts"]))[0].tolist()
    expected = sorted((row["volume"] / row["n_atoms"], row["energy_per_atom"]) for row in rows)
    drawn = sorted((x, y) for x, y, _ in scatter["points"])
    assert np.abs(np.subtract(drawn, expected)).max() < 1e-5  # digits that are written
    assert scatter["groups"] == ["Cu4"]
    monkeypatch.setattr(plots_module, "_POINTS", 3)
    assert len(list(plots_module.plots(folder, "energy_per_atom"))[-1]["points"]) == 3


def test_formulas_have_colours_while_these_tell_most_structures_apart():
    few, many = ["Cu", "Ag", "Cu"], [f"Cu{k}" for k in range(20)]
    assert plots_module._groups(few) == ["Ag", "Cu"]
    assert plots_module._groups(many) == [None]
    assert plots_module._groups(many + ["Ag"] * 12) == [*sorted(["Ag", *many[:5]]), None]


def test_whole_numbers_have_bins_of_their_own(tmp_path):
    found = [Found(f"s#{k}", crystal(repeat=(1 + k % 3, 1, 1), seed=k)) for k in range(5)]
    screen(iter(found), of(Pairs()), out=tmp_path, steps=["single_point"])
    plot = next(plots_module.plots(tmp_path, "n_atoms"))
    assert plot["counts"] == [2, 0, 0, 0, 2, 0, 0, 0, 1]  # of 4, 8 and 12 atoms
    assert (plot["low"], plot["high"]) == (3.5, 12.5)


def test_atoms_on_faces_are_drawn_on_the_opposite_ones_too(tmp_path):
    screen(iter([Found("s#0", bulk("Cu", cubic=True))]), of(Pairs()), out=tmp_path)
    assert len(data_of(tmp_path)["best"][0]["view"]["positions"]) == 14


def test_report_of_structures_that_are_nearly_the_same(tmp_path):
    found = [Found(f"s#{k}", crystal(a=3.6 + 1e-13 * k)) for k in range(2)]
    screen(iter(found), of(Pairs()), out=tmp_path, steps=["single_point", "properties"])
    assert [sum(plot["counts"]) for plot in data_of(tmp_path)["plots"] if "counts" in plot] == [
        2,
        2,
    ]


def test_report_of_nothing_is_written(tmp_path):
    screen(iter([]), of(Pairs()), out=tmp_path, steps=["validate"])
    assert write_report(tmp_path).stat().st_size > 1000


def test_exports_hold_the_structures(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("atomeq.screening.export._GROUP", 4)  # more than one transaction
    assert export_database(folder, tmp_path / "x.db") == 6
    rows = list(ase.db.connect(tmp_path / "x.db").select())
    assert len(rows) == 6
    assert rows[0].energy_per_atom == pytest.approx(rows[0].energy / rows[0].natoms)
    assert export_chemiscope(folder, tmp_path / "x.json.gz") == 6
    document = json.loads(gzip.decompress((tmp_path / "x.json.gz").read_bytes()))
    assert len(document["structures"]) == len(document["properties"]["energy"]["values"]) == 6
    assert len(document["structures"][0]["cell"]) == 9


def test_report_works_in_a_browser(folder):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
        except sync_api.Error as error:
            pytest.skip(f"Chromium cannot be started: {str(error).splitlines()[0]}")
        page = browser.new_page()
        problems: list[str] = []
        requested: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto((folder / "report.html").as_uri())
        assert page.title() == "atomeq screening"
        assert page.locator("#best tbody tr").count() == 6
        assert page.locator("#plots svg").count() == 3
        assert page.locator("#plots .bar").count() > 2
        assert page.locator("#plots circle").count() == 6
        ranks = page.locator("#best tbody tr td:first-child")
        assert ranks.all_text_contents() == list("123456")
        assert page.locator("th[aria-sort]").all_text_contents() == ["rank "]
        page.click('button[data-column="volume"]')
        page.click('button[data-column="volume"]')
        shown = page.locator("#best tbody tr td:nth-child(6)").all_text_contents()
        assert shown == sorted(shown, key=float, reverse=True)
        header = page.locator('th:has(button[data-column="volume"])')
        assert header.get_attribute("aria-sort") == "descending"
        page.click('button[data-column=""]')
        assert ranks.all_text_contents() == list("123456")
        before = page.evaluate("document.getElementById('viewer').toDataURL()")
        page.locator("#best tbody tr").nth(3).click()
        name = page.locator("#best tbody tr").nth(3).locator("td").last.text_content()
        assert name in (page.locator("#viewer-name").text_content() or "")
        chosen = page.evaluate("document.getElementById('viewer').toDataURL()")
        page.focus("#viewer")
        page.keyboard.press("ArrowLeft")
        turned = page.evaluate("document.getElementById('viewer').toDataURL()")
        assert len({before, chosen, turned}) == 3
        assert EVIL in (page.locator("#failures").text_content() or "")
        browser.close()
    assert problems == []
    assert [url.split(":")[0] for url in requested] == ["file"]
