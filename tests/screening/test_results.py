"""Rows are written once, whatever was interrupted; the ledger follows the files."""

import os
import shutil

import pyarrow.parquet as pq
import pytest

from atomeq.screening import results as results_module
from atomeq.screening.results import Results, part_provenance, read_rows, result_files


def provenance(fmax=0.05):
    settings = {"steps": [{"relax": {"fmax": fmax}}]}
    return {
        "settings_hash": f"settings-{fmax}",
        "settings": settings,
        "potential": {"name": "test", "sha256": "0" * 64},
        "dtype": "float64",
        "device": "cpu",
        "versions": {"torch": "2"},
    }


def row(k, status="done", **columns):
    return {"hash": f"id{k}", "locator": f"f#{k}", "status": status, **columns}


def identifiers(folder):
    return sorted(row["hash"] for row in read_rows(folder, ["hash"]))


def opened(folder, **options):
    return Results(folder, provenance(), **options)


def test_rows_carry_their_provenance_and_so_does_the_file(tmp_path):
    results = opened(tmp_path)
    results.add(row(0, energy=-1.5))
    results.close()
    (found,) = read_rows(tmp_path)
    assert found["energy"] == -1.5
    assert found["potential_sha256"] == "0" * 64
    assert '"torch": "2"' in found["provenance"]
    assert part_provenance(result_files(tmp_path)[0]) == provenance()


def test_a_part_is_written_when_enough_rows_wait(tmp_path):
    results = opened(tmp_path, rows_per_part=3)
    for k in range(7):
        results.add(row(k))
    assert [pq.read_metadata(path).num_rows for path in result_files(tmp_path)] == [3, 3]
    assert results.has("id6")
    results.close()
    assert identifiers(tmp_path) == [f"id{k}" for k in range(7)]


@pytest.mark.parametrize("moment", ["before the rename", "before the record", "after"])
def test_a_kill_at_any_moment_of_a_flush_leaves_every_row_once(tmp_path, monkeypatch, moment):
    results = opened(tmp_path)
    results.add(row(0))
    results.flush()
    results.add(row(1))

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    if moment == "before the rename":
        monkeypatch.setattr(results_module.os, "replace", kill)
    if moment == "before the record":
        monkeypatch.setattr(results.ledger, "record", kill)
    if moment == "after":
        results.flush()
    else:
        with pytest.raises(Killed):
            results.flush()
    monkeypatch.undo()
    results.ledger.close()
    os.close(results._lock)

    again = opened(tmp_path)
    expected = moment != "before the rename"
    assert again.has("id1") == expected
    if not expected:
        again.add(row(1))
    again.close()
    assert identifiers(tmp_path) == ["id0", "id1"]
    assert not list(tmp_path.glob(".part*"))


def test_a_part_that_was_lost_is_computed_again(tmp_path, caplog):
    results = opened(tmp_path)
    results.add(row(0))
    results.close()
    result_files(tmp_path)[0].unlink()
    again = opened(tmp_path)
    assert not again.has("id0")
    assert "is gone" in caplog.text
    again.close()


def test_a_lost_ledger_is_rebuilt_from_the_parts(tmp_path):
    results = opened(tmp_path)
    results.add(row(0, status="failed", kind="overlap"))
    results.close()
    for file in tmp_path.glob("ledger.sqlite*"):
        file.unlink()
    again = opened(tmp_path)
    assert again.has("id0")
    assert again.ledger.kinds() == {"overlap": 1}
    again.close()


def test_a_damaged_part_is_set_aside_and_computed_again(tmp_path, caplog):
    results = opened(tmp_path)
    results.add(row(0))
    results.close()
    path = result_files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:100])
    again = opened(tmp_path)
    assert not again.has("id0")
    assert result_files(tmp_path) == []
    assert path.with_suffix(".damaged").exists()
    assert "damaged" in caplog.text
    again.close()


def test_a_copied_part_does_not_double_its_rows(tmp_path):
    results = opened(tmp_path)
    for k in range(2):
        results.add(row(k))
    results.close()
    path = result_files(tmp_path)[0]
    shutil.copy(path, path.with_name("part-000009.parquet"))
    opened(tmp_path).close()
    assert identifiers(tmp_path) == ["id0", "id1"]


def test_running_structures_are_not_there(tmp_path):
    results = opened(tmp_path)
    results.ledger.start("id0", "f#0")
    assert not results.has("id0")
    assert results.ledger.counts() == {"running": 1}
    results.add(row(0))
    results.close()
    again = opened(tmp_path)
    assert again.ledger.counts() == {"done": 1}
    again.close()


def test_failures_are_retried_by_kind(tmp_path):
    results = opened(tmp_path)
    results.add(row(0, status="failed", kind="overlap"))
    results.add(row(1, status="failed", kind="unreadable"))
    results.add(row(2))
    assert results.retry(["overlap"]) == 1
    assert [results.has(f"id{k}") for k in range(3)] == [False, True, True]
    results.add(row(0))
    results.close()
    assert identifiers(tmp_path) == ["id0", "id1", "id2"]


def test_other_settings_are_refused_with_what_differs(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(ValueError, match=r"other settings .*fmax.* 0.05.* 0.01"):
        Results(tmp_path, provenance(fmax=0.01))


def test_a_kill_between_judging_two_parts_leaves_the_rest_for_the_next_run(tmp_path):
    results = opened(tmp_path, rows_per_part=1)
    results.add(row(0))
    results.add(row(1))
    results.close()
    filtered = provenance()
    filtered["settings"] = {"steps": [*filtered["settings"]["steps"], {"filter": {"where": "n"}}]}
    judged = []

    def judge(row):
        judged.append(row["hash"])
        if len(judged) == 2:
            raise KeyboardInterrupt
        return {**row, "status": "filtered"}

    again = Results(tmp_path, filtered)
    with pytest.raises(KeyboardInterrupt):
        again.filter_again(judge)
    again.close()
    last = Results(tmp_path, filtered)
    last.filter_again(judge)
    assert judged == ["id0", "id1", "id1"]
    assert last.ledger.counts() == {"filtered": 2}
    last.close()
    assert identifiers(tmp_path) == ["id0", "id1"]


def test_two_processes_cannot_share_a_folder(tmp_path):
    results = opened(tmp_path)
    with pytest.raises(BlockingIOError, match="another process is screening"):
        opened(tmp_path)
    results.close()
    opened(tmp_path).close()


def test_shards_keep_apart(tmp_path):
    first, second = opened(tmp_path, shard=(0, 2)), opened(tmp_path, shard=(1, 2))
    first.add(row(0))
    second.add(row(1))
    first.close()
    second.close()
    again = opened(tmp_path, shard=(0, 2))
    assert again.has("id0")
    assert not again.has("id1")
    again.close()
    assert identifiers(tmp_path) == ["id0", "id1"]
    with pytest.raises(ValueError, match="begun in 2 shards"):
        opened(tmp_path)
