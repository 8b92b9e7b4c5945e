"""A screening accounts for every structure, computes what is right, and goes on after any end."""

import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from analytic_potentials import Pairs, Trap, crystal, of
from ase import Atoms
from ase.build import bulk
from small_potential import small_potential

from atomeq.dynamics.run import relax
from atomeq.potential.checkpoint import save_potential
from atomeq.screening import dedupe
from atomeq.screening.results import read_rows, read_run
from atomeq.screening.rows import structure_of
from atomeq.screening.run import screen
from atomeq.screening.sources import Found

SAME_ENERGY = 1e-9  # eV; batches of other company, the same sums in another order
LOOSE = {"relax": {"fmax": 0.2, "max_steps": 40}}


def potential():
    return of(Pairs())


def crystals(n=6):
    return [crystal(seed=k, a=3.5 + 0.02 * k) for k in range(n)]


def write(folder, structures, name="s.extxyz"):
    folder.mkdir(exist_ok=True)
    ase.io.write(folder / name, structures)
    return folder


def rows_of(folder, *columns):
    return {row["locator"]: row for row in read_rows(Path(folder), list(columns) or None)}


def test_rows_are_what_relax_gives(tmp_path):
    source = write(tmp_path / "in", crystals()) / "s.extxyz"
    summary = screen(source, potential(), out=tmp_path / "out", steps=["validate", LOOSE, "rank"])
    rows = rows_of(tmp_path / "out")
    assert summary.counts == {"done": 6}
    read = ase.io.read(source, index=":")
    for outcome in relax(read, potential(), fmax=0.2, max_steps=40):
        row = rows[f"{source}#{outcome.index}"]
        assert row["energy"] == pytest.approx(outcome.energy, abs=SAME_ENERGY)
        assert row["converged"] == outcome.converged
        assert row["n_steps"] == outcome.n_steps
        assert row["energy_per_atom"] == pytest.approx(row["energy"] / row["n_atoms"])
        assert row["max_force"] < 0.2
        relaxed = structure_of(row)
        assert np.abs(relaxed.positions - outcome.atoms.positions).max() < SAME_ENERGY
        assert (
            row["potential_sha256"]
            == read_run(tmp_path / "out")["provenance"]["potential"]["sha256"]
        )
    ranked = ase.io.read(source, index=":")  # the ranking is by energy per atom
    assert len(ranked) == 6
    energies = [row["energy_per_atom"] for row in _ranking(tmp_path / "out")]
    assert energies == sorted(energies)


def _ranking(folder):
    import pyarrow.parquet as pq

    return pq.read_table(folder / "ranking.parquet").to_pylist()


def bad_folder(folder):
    """Good crystals with one of each kind of bad structure among them."""
    good = crystals(5)
    nan, overlapping, unknown = good[0].copy(), good[1].copy(), good[2].copy()
    nan.positions[0, 0] = np.nan
    overlapping.positions[1] = overlapping.positions[0] + 0.01
    unknown.numbers[0] = 92
    write(folder, [good[0], nan, good[1], overlapping, good[2], unknown, good[3]])
    (folder / "empty.cif").touch()
    ase.io.write(folder / "cut.cif", good[4])
    text = (folder / "cut.cif").read_text()
    (folder / "cut.cif").write_text(text[: len(text) // 4])
    ase.io.write(folder / "POSCAR", good[4])
    return folder


def test_bad_structures_are_accounted_for_and_harm_no_other(tmp_path):
    folder = bad_folder(tmp_path / "in")
    small = small_potential()
    summary = screen(folder, small, out=tmp_path / "out", steps=["validate", "single_point"])
    assert summary.counts == {"done": 5, "failed": 5}
    assert summary.kinds == {
        "unreadable": 2,
        "not_finite": 1,
        "overlap": 1,
        "unknown_element": 1,
    }
    assert summary.seen.structures == 10
    for row in rows_of(tmp_path / "out").values():
        assert (row["energy"] is not None) == (row["status"] == "done")
        assert bool(row["reason"]) == (row["status"] == "failed")


def test_a_second_run_computes_nothing_and_changes_nothing(tmp_path):
    folder = bad_folder(tmp_path / "in")
    options = {"out": tmp_path / "out", "steps": ["validate", "dedupe", "single_point"]}
    first = screen(folder, small_potential(), **options)
    before = sorted(str(row) for row in read_rows(tmp_path / "out"))
    calls = []
    second = screen(
        folder, small_potential(), **options, observe=lambda seen, row: calls.append(row)
    )
    assert second.counts == first.counts
    assert second.seen.earlier == second.seen.structures == 10
    assert calls == [None]
    assert sorted(str(row) for row in read_rows(tmp_path / "out")) == before


def test_exact_copies_are_told_and_not_computed(tmp_path):
    first, other = crystals(2)
    source = write(tmp_path / "in", [first, other, first, first]) / "s.extxyz"
    summary = screen(source, potential(), out=tmp_path / "o", steps=["dedupe", "single_point"])
    rows = rows_of(tmp_path / "o")
    assert summary.counts == {"done": 2, "duplicate": 2}
    assert rows[f"{source}#3"]["duplicate_of"] == rows[f"{source}#0"]["hash"]
    assert len({row["hash"] for row in rows.values()}) == 4


def test_without_dedupe_every_copy_is_computed(tmp_path):
    source = write(tmp_path / "in", [crystal()] * 3) / "s.extxyz"
    assert screen(source, potential(), out=tmp_path / "o", steps=["single_point"]).counts == {
        "done": 3
    }
    assert len(rows_of(tmp_path / "o")) == 3


def test_failures_are_retried_and_others_stay(tmp_path):
    folder = bad_folder(tmp_path / "in")
    options = {"out": tmp_path / "out", "steps": ["validate", "single_point"]}
    screen(folder, small_potential(), **options)
    ase.io.write(folder / "empty.cif", crystal(a=3.9))
    again = screen(folder, small_potential(), **options, retry=["unreadable"])
    assert again.seen.structures - again.seen.earlier == 2
    assert again.counts == {"done": 6, "failed": 4}


def test_a_potential_that_raises_for_one_structure_keeps_the_others(tmp_path):
    class Fragile(Pairs):
        def forward(self, graph):
            if bool((graph.pos[:, 2] > 100).any()):
                raise RuntimeError("no such atoms")
            return super().forward(graph)

    structures = crystals(4)
    structures[2].positions += [0, 0, 200]
    source = write(tmp_path / "in", structures) / "s.extxyz"
    summary = screen(source, of(Fragile()), out=tmp_path / "o", steps=["single_point"])
    assert summary.counts == {"done": 3, "failed": 1}
    row = rows_of(tmp_path / "o")[f"{source}#2"]
    assert (row["kind"], row["reason"]) == ("error", "RuntimeError: no such atoms")


def test_a_structure_that_breaks_on_the_way_is_told(tmp_path):
    structures = crystals(3)
    structures[1].positions += [0, 0, 200]
    source = write(tmp_path / "in", structures) / "s.extxyz"
    summary = screen(source, of(Trap()), out=tmp_path / "o", steps=[LOOSE])
    assert summary.kinds == {"no_forces": 1}
    assert rows_of(tmp_path / "o")[f"{source}#1"]["stage"] == "relax"


def test_properties_of_a_known_crystal(tmp_path):
    source = write(tmp_path / "in", bulk("Cu", cubic=True, a=3.6)) / "s.extxyz"
    steps = [
        "single_point",
        {"properties": {"hull": {"Cu": -1.0}}},
    ]
    screen(source, potential(), out=tmp_path / "o", steps=steps)
    (row,) = rows_of(tmp_path / "o").values()
    assert row["volume"] == pytest.approx(3.6**3)
    assert row["density"] == pytest.approx(4 * 63.546 / 3.6**3 * 1.66053907, rel=1e-6)
    assert (row["space_group"], row["space_group_number"]) == ("Fm-3m", 225)
    assert row["formation_energy"] == pytest.approx(row["energy_per_atom"] + 1.0)
    assert row["energy_above_hull"] == pytest.approx(row["formation_energy"])


def test_a_missing_reference_is_a_failure_with_its_name(tmp_path):
    source = write(tmp_path / "in", bulk("Al")) / "s.extxyz"
    steps = ["single_point", {"properties": {"hull": {"Cu": -1.0}}}]
    summary = screen(source, potential(), out=tmp_path / "o", steps=steps)
    assert summary.kinds == {"no_reference": 1}


def test_committee_spread_is_that_of_its_members(tmp_path):
    members = [small_potential(), small_potential()]
    for parameter in members[1].parameters():
        parameter.data *= 1.02
    names = [str(save_potential(m, tmp_path / f"m{k}")) for k, m in enumerate(members)]
    atoms = crystal()
    source = write(tmp_path / "in", atoms) / "s.extxyz"
    steps = ["single_point", {"committee": {"potentials": names[1:]}}]
    screen(source, names[0], out=tmp_path / "o", steps=steps)
    (row,) = rows_of(tmp_path / "o").values()
    read = ase.io.read(source)
    results = [m(m.build_graph(read)) for m in members]
    energies = torch.stack([r["energy"] for r in results])[:, 0] / len(atoms)
    assert row["energy_std"] == pytest.approx(float(energies.std()), rel=1e-9)
    difference = (results[0]["forces"] - results[1]["forces"]).norm(dim=1).max()
    assert row["force_std"] == pytest.approx(float(difference) / np.sqrt(2), rel=1e-9)


def test_filter_marks_rows_and_ranking_leaves_them_out(tmp_path):
    source = write(tmp_path / "in", crystals()) / "s.extxyz"
    options = {"steps": ["single_point", "properties", {"filter": "volume > 45.0"}, "rank"]}
    summary = screen(source, potential(), out=tmp_path / "o", **options)
    rows = rows_of(tmp_path / "o").values()
    assert {row["status"] == "done" for row in rows if row["volume"] > 45} == {True}
    assert summary.counts["filtered"] == sum(row["volume"] <= 45 for row in rows) > 0
    assert len(_ranking(tmp_path / "o")) == summary.counts["done"]


def test_shards_together_are_the_whole(tmp_path):
    folder = bad_folder(tmp_path / "in")
    options = {"out": tmp_path / "out", "steps": ["validate", "single_point"]}
    seen = [
        screen(folder, small_potential(), **options, shard=(k, 3)).seen.structures for k in range(3)
    ]
    assert sum(seen) == 10
    assert len(list(read_rows(tmp_path / "out"))) == len(rows_of(tmp_path / "out")) == 10


def test_other_filters_and_rankings_judge_again_and_compute_nothing(tmp_path):
    steps = ["dedupe", {"relax": {"fmax": 0.01, "max_steps": 2}}, "properties"]

    def screened(*more):
        found = (Found(f"s#{k}", atoms) for k, atoms in enumerate([*crystals(), crystals()[0]]))
        summary = screen(found, potential(), out=tmp_path, steps=[*steps, *more])
        assert read_run(tmp_path)["provenance"]["settings"]["steps"][3:] == [
            {"filter": {"where": step["filter"]}} if "filter" in step else step for step in more
        ]
        return summary

    screened()
    plain = sorted(read_rows(tmp_path), key=lambda row: row["hash"])
    assert {row["kind"] for row in plain} == {"not_converged", "duplicate"}
    summary = screened({"filter": "volume > 45.0"})
    assert summary.seen.rows == 0
    assert summary.counts["filtered"] == sum(
        row["status"] == "done" and row["volume"] <= 45 for row in plain
    )
    rows = {row["hash"]: row for row in read_rows(tmp_path)}
    for row in plain:
        now = rows.pop(row["hash"])
        assert now["energy"] == row["energy"]
        assert "volume > 45.0" in now["provenance"]
        if row["status"] == "done":
            assert now["status"] == ("done" if row["volume"] > 45 else "filtered")
    assert not rows
    by_volume = {"by": "volume", "descending": True, "top": 3, "distinct": False}
    screened({"rank": by_volume})
    again = sorted(read_rows(tmp_path), key=lambda row: row["hash"])
    for row, now in zip(plain, again, strict=True):
        assert {**now, "provenance": ""} == {**row, "provenance": ""}
    volumes = [row["volume"] for row in _ranking(tmp_path)]
    assert volumes == sorted((row["volume"] for row in plain if row["volume"]), reverse=True)[:3]


def test_a_near_copy_is_in_the_shard_of_its_original(tmp_path):
    """Their content hashes differ, and each shard knows its own structures only."""
    originals = crystals(4)
    copies = [atoms.repeat((2, 1, 1)) for atoms in originals]
    source = write(tmp_path / "in", originals + copies) / "s.extxyz"
    options = {"out": tmp_path / "out", "steps": [{"dedupe": "structure"}]}
    for k in range(2):
        screen(source, potential(), **options, shard=(k, 2))
    statuses = [row["status"] for row in read_rows(tmp_path / "out")]
    assert sorted(statuses) == ["done"] * 4 + ["duplicate"] * 4


def test_rows_are_observed_whoever_made_them(tmp_path):
    found = [Found("a", crystal()), Found("b", None, "broken"), Found("c", crystal())]
    seen = []
    screen(
        iter(found),
        potential(),
        out=tmp_path,
        steps=["dedupe", "single_point"],
        observe=lambda now, row: seen.append((now.rows, now.failed, row and row["status"])),
    )
    assert [count for count, _, _ in seen] == [1, 2, 3, 3]
    assert {status for _, _, status in seen} == {"done", "failed", "duplicate", None}
    assert seen[-1] == (3, 1, None)


def test_settings_and_shards_are_refused_at_the_door(tmp_path):
    with pytest.raises(ValueError, match="0 <= k < n"):
        screen([], potential(), out=tmp_path / "o", shard=(2, 2))
    with pytest.raises(ValueError, match="no engine 'grid'"):
        screen([], potential(), out=tmp_path / "o", engine="grid")


def test_an_interrupt_keeps_what_was_computed(tmp_path):
    def stream():
        for k, atoms in enumerate(crystals(6)):
            if k == 4:
                raise KeyboardInterrupt
            yield Found(f"s#{k}", atoms)

    def screened(found):
        screen(found, potential(), out=tmp_path / "o", steps=["single_point"], max_edges=400)

    with pytest.raises(KeyboardInterrupt):
        screened(stream())
    kept = len(rows_of(tmp_path / "o"))
    assert 0 < kept < 6
    screened(Found(f"s#{k}", atoms) for k, atoms in enumerate(crystals(6)))
    assert len(list(read_rows(tmp_path / "o"))) == len(rows_of(tmp_path / "o")) == 6


# Imports once, then forks a process per screening and kills it as it has so many rows.
_VICTIMS = """
import os, random, signal, sys, time
import torch
sys.path.insert(0, {tests!r})
from functools import partial
from pathlib import Path
from analytic_potentials import Pairs, crystal, of
from atomeq.screening import run
from atomeq.screening.results import read_rows
from atomeq.screening.sources import Found

run.Results = partial(run.Results, rows_per_part=3)
draw = random.Random(0)
torch.set_num_threads(1)

for last in {kills!r}:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        found = (Found(f"s#{{k}}", crystal(seed=k)) for k in range({n}))
        tell = lambda seen, row: os.write(theirs, b".")
        steps = ["single_point"]
        run.screen(found, of(Pairs()), out={out!r}, steps=steps, max_edges=300, observe=tell)
        os._exit(0)
    os.close(theirs)
    seen = 0
    while seen < last and (came := os.read(ours, 1)):
        seen += len(came)
    time.sleep(draw.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ours)
    print(len(list(read_rows(Path({out!r}), ["hash"]))), flush=True)
"""


def test_sigkill_at_any_moment_leaves_every_row_once(tmp_path):
    n, out = 40, tmp_path / "o"
    tests = str(Path(__file__).parents[1])
    code = _VICTIMS.format(tests=tests, out=str(out), kills=[8, 3, 12], n=n)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    after_kills = [int(line) for line in done.stdout.split()]
    assert after_kills == sorted(after_kills)  # what was there stays
    assert 0 < after_kills[0] < n
    found = (Found(f"s#{k}", crystal(seed=k)) for k in range(n))
    summary = screen(found, potential(), out=out, steps=["single_point"])
    assert summary.seen.earlier == after_kills[-1]
    rows = list(read_rows(out))
    assert sorted(row["locator"] for row in rows) == sorted(f"s#{k}" for k in range(n))
    assert {row["status"] for row in rows} == {"done"}


def test_single_atoms_and_molecules_are_screened(tmp_path):
    source = write(tmp_path / "in", [Atoms("Cu"), Atoms("Cu2", [[0, 0, 0], [0, 0, 2.4]])])
    steps = ["validate", LOOSE, "properties"]
    assert screen(source, potential(), out=tmp_path / "o", steps=steps).counts == {"done": 2}


@pytest.mark.parametrize(("repeat", "n_asked"), [(1, 0), (2, 6)])
def test_copies_by_relaxation_leave_the_ranking_mostly_without_their_symmetry(
    repeat, n_asked, tmp_path, monkeypatch
):
    """Finding a primitive cell takes longer than a small crystal's relaxation.

    Where one is another cell of the same crystal, nothing else tells.
    """
    starts = [crystal() for _ in range(6)]
    starts[-1] = starts[-1].repeat((repeat, 1, 1))
    for k, atoms in enumerate(starts):
        atoms.rattle(0.01, seed=k)
    asked = []
    find = dedupe._primitive
    monkeypatch.setattr(dedupe, "_primitive", lambda *args: asked.append(args) or find(*args))
    stream = iter(Found(f"s#{k}", atoms) for k, atoms in enumerate(starts))
    steps = [{"relax": {"fmax": 0.01, "max_steps": 200}}, "rank"]
    summary = screen(stream, potential(), out=tmp_path, steps=steps)
    assert summary.counts == {"done": 6}
    assert len(_ranking(tmp_path)) == 1
    assert len(asked) == n_asked
