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


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_engine_gives_the_rows_of_the_local_one_whatever_dies(engine, tmp_path, monkeypatch):
    # The potential of this test is made of its own modules, which Ray's processes must find.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is the extra atomeq[ray]")
    structures = crystals(8)
    structures[3].positions += [0, 0, 150]
    structures[6].positions += [0, 0, 500]
    ase.io.write(tmp_path / "s.extxyz", structures)
    potential = of(Deadly(str(tmp_path / "mark")))
    steps = ["validate", {"relax": {"fmax": 0.3, "max_steps": 10}}]
    summary = screen(
        tmp_path / "s.extxyz",
        potential,
        out=tmp_path / engine,
        steps=steps,
        engine=engine,
        workers=2,
    )
    assert summary.counts == {"done": 7, "failed": 1}
    assert summary.kinds == {"crashed": 1}
    rows = rows_of(tmp_path / engine)
    dead = f"{tmp_path}/s.extxyz#3"
    assert rows.pop(dead)["status"] == "failed"
    structures[3].positions -= [0, 0, 150]  # which would end this process
    ase.io.write(tmp_path / "s.extxyz", structures)
    screen(tmp_path / "s.extxyz", potential, out=tmp_path / "local", steps=steps)
    local = rows_of(tmp_path / "local")
    local.pop(dead)
    same_rows(rows, local)


def test_workers_that_cannot_begin_are_an_error_not_a_loop(tmp_path):
    ase.io.write(tmp_path / "s.extxyz", crystals(2))
    steps = ["single_point", {"properties": {"hull": str(tmp_path / "nowhere")}}]
    with pytest.raises(FileNotFoundError, match="holds no results"):
        screen(tmp_path / "s.extxyz", of(Pairs()), out=tmp_path / "o", steps=steps)
