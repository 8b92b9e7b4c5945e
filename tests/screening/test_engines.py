"""Every engine gives the same rows; a worker that dies loses nothing but what killed it."""

import os
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from analytic_potentials import Pairs, crystal, of

from atomeq.screening.results import read_rows
from atomeq.screening.run import screen
from atomeq.screening.sources import Found

SAME_ENERGY = 1e-8  # eV; a relaxation in other company sums in another order, step after step


class Deadly(Pairs):
    """Kills its process over atoms above z = 100 Å; above 300 Å the first time only."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, graph):
        top = float(graph.pos[:, 2].detach().max())
        if 100 < top < 300:
            os._exit(7)
        if top > 300 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os._exit(9)
        return super().forward(graph)


def crystals(n):
    return [crystal(seed=k, a=3.5 + 0.01 * k) for k in range(n)]


def rows_of(folder):
    return {row["locator"]: row for row in read_rows(folder)}


def same_rows(one, other):
    assert one.keys() == other.keys()
    for name, row in one.items():
        for column, value in row.items():
            if isinstance(value, float):
                assert other[name][column] == pytest.approx(value, abs=SAME_ENERGY)
            elif column == "positions" and value:
                assert np.abs(np.subtract(other[name][column], value)).max() < SAME_ENERGY
            elif not isinstance(value, list):
                assert other[name][column] == value, (name, column)


def compare_with_local(engine, structures, dead, folder, monkeypatch):
    """Screen with an engine, and all but some structures, which are to be quarantined, locally."""
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is the extra atomeq[ray]")
    # The potential of this test is made of its own modules, which Ray's processes must find.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    found = [Found(f"s#{k}", atoms) for k, atoms in enumerate(structures)]
    potential = of(Deadly(str(folder / "mark")))
    steps = ["validate", {"relax": {"fmax": 0.3, "max_steps": 10}}]
    summary = screen(
        iter(found), potential, out=folder / engine, steps=steps, engine=engine, workers=2
    )
    assert (folder / "mark").exists()  # a worker did die
    rows = rows_of(folder / engine)
    crashed = [rows.pop(f"s#{k}") for k in dead]
    assert {(row["status"], row["kind"]) for row in crashed} <= {("failed", "crashed")}
    assert sum(summary.counts.values()) == len(structures)
    good = (item for k, item in enumerate(found) if k not in dead)
    screen(good, potential, out=folder / "local", steps=steps)
    same_rows(rows, rows_of(folder / "local"))


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_a_worker_that_dies_loses_nothing(engine, tmp_path, monkeypatch):
    structures = crystals(8)
    structures[6].positions += [0, 0, 500]
    compare_with_local(engine, structures, [], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_what_kills_its_worker_is_quarantined(engine, tmp_path, monkeypatch):
    structures = crystals(8)
    structures[3].positions += [0, 0, 150]
    structures[6].positions += [0, 0, 500]
    compare_with_local(engine, structures, [3], tmp_path, monkeypatch)


def test_workers_that_cannot_begin_are_an_error_not_a_loop(tmp_path):
    ase.io.write(tmp_path / "s.extxyz", crystals(2))
    steps = ["single_point", {"properties": {"hull": str(tmp_path / "nowhere")}}]
    with pytest.raises(FileNotFoundError, match="holds no results"):
        screen(tmp_path / "s.extxyz", of(Pairs()), out=tmp_path / "o", steps=steps)
