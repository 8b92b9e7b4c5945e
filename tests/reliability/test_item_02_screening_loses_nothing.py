"""Item 2: an error of the source is one of the run, and every structure seen has a row."""

import os
import sys

import ase.io
import pytest
from analytic_potentials import Pairs, crystal, of

from atomeq.screening.compute import Computation
from atomeq.screening.identity import printable
from atomeq.screening.results import read_rows
from atomeq.screening.run import screen
from atomeq.screening.sources import Found
from atomeq.screening.steps import parse_steps

N_GOOD = 5  # structures that come before the source fails


def failing():
    for k in range(N_GOOD):
        yield Found(f"s#{k}", crystal(seed=k))
    raise ValueError("row 5 of the user's table")


def rows_of(folder):
    return {row["locator"]: row for row in read_rows(folder)}


@pytest.mark.parametrize("steps", [["single_point"], [{"relax": {"max_steps": 2}}], ["validate"]])
def test_an_error_of_the_source_is_raised_and_what_came_before_is_kept(steps, tmp_path):
    with pytest.raises(ValueError, match="row 5 of the user's table"):
        screen(failing(), of(Pairs()), out=tmp_path, steps=steps)
    assert {row["status"] for row in rows_of(tmp_path).values()} == {"done"}
    assert len(rows_of(tmp_path)) == N_GOOD


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_other_engines_raise_it_too(engine, tmp_path, monkeypatch):
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is the extra atomeq[ray]")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    with pytest.raises(ValueError, match="row 5 of the user's table"):
        screen(
            failing(), of(Pairs()), out=tmp_path, steps=["single_point"], engine=engine, workers=1
        )
    assert len(rows_of(tmp_path)) == N_GOOD


def test_names_that_are_not_utf8_have_rows(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    atoms = crystal()
    ase.io.write(folder / "a.cif", atoms)
    text = (folder / "a.cif").read_bytes()
    (folder / os.fsdecode(b"b\xe9.cif")).write_bytes(text.replace(b"Cu", b"Al"))
    (folder / os.fsdecode(b"c\xe9.cif")).write_bytes(b"")
    # The same structure under the name that the one before looks like.
    (folder / "b\\udce9.cif").write_bytes(text.replace(b"Cu", b"Al"))
    ase.io.write(folder / "d.cif", crystal(seed=1))
    summary = screen(folder, of(Pairs()), out=tmp_path / "o", steps=["single_point"])
    assert summary.counts == {"done": 4, "failed": 1}
    shown = {locator.split("/")[-1] for locator in rows_of(tmp_path / "o")}
    names = {"a.cif#0", r"b\udce9.cif#0", r"b\\udce9.cif#0", r"c\udce9.cif#0", "d.cif#0"}
    assert shown == names
    again = screen(folder, of(Pairs()), out=tmp_path / "o", steps=["single_point"])
    assert (again.seen.earlier, again.seen.rows) == (5, 0)


def test_no_two_texts_are_printed_alike():
    texts = ["a", "a\\", "a\\udce9", "a\udce9", "a\\\\udce9", "\ud800", "\\ud800"]
    assert len({printable(text) for text in texts}) == len(texts)
    for text in texts:
        printable(text).encode()


def test_an_item_that_is_no_structure_is_a_row_of_its_own(tmp_path):
    broken = crystal()
    broken.arrays["positions"] = broken.positions[:, :2]  # content_hash takes it, validate does not
    found = [Found("s#0", crystal()), Found("s#1", "Cu"), Found("s#2", broken), Found("s#3", None)]
    found.append(Found("s#4", crystal(seed=4)))
    summary = screen(iter(found), of(Pairs()), out=tmp_path, steps=["validate", "single_point"])
    assert summary.counts == {"done": 2, "failed": 3}
    reasons = {name: row["reason"] for name, row in rows_of(tmp_path).items() if row["reason"]}
    assert all(reasons[f"s#{k}"] for k in (1, 2, 3))


def test_a_row_that_an_engine_loses_is_missed(tmp_path, monkeypatch):
    whole = Computation.run

    def careless(self, candidates):
        return (row for row in whole(self, candidates) if row["locator"] != "s#1")

    monkeypatch.setattr(Computation, "run", careless)
    found = (Found(f"s#{k}", crystal(seed=k)) for k in range(3))
    with pytest.raises(RuntimeError, match=r"of 3 structures 2 have ended and 1 have no row.*s#1"):
        screen(found, of(Pairs()), out=tmp_path, steps=["single_point"])


def test_a_computation_alone_raises_what_its_stream_raised():
    def stream():
        raise LookupError("no such key")
        yield

    with pytest.raises(LookupError, match="no such key"):
        list(Computation(parse_steps(["single_point"]), of(Pairs())).run(stream()))
