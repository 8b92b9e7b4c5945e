"""Item 8: a flipped bit in a part is found, and a broken ledger is made anew from the parts."""

import os

import pyarrow.parquet as pq
import pytest
from analytic_potentials import Pairs, crystal, of

from atomeq.screening.results import read_rows, result_files
from atomeq.screening.run import screen
from atomeq.screening.sources import Found

STEPS = ["validate", {"dedupe": "structure"}, "single_point"]


def found(n=4):
    structures = [crystal(seed=k) for k in range(n)]
    return [
        Found(f"s#{k}", a) for k, a in enumerate([*structures, structures[0].repeat((2, 1, 1))])
    ]


def screened(folder, n=4, **options):
    return screen(found(n), of(Pairs()), out=folder, steps=STEPS, **options)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_pages_carry_checksums_that_readers_verify(tmp_path):
    screened(tmp_path)
    (path,) = result_files(tmp_path)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    flip(path, chunk.data_page_offset + chunk.total_compressed_size - 2)  # in the hashes
    with pytest.raises(ValueError, match=r"part-000000\.parquet is damaged .*--resume"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("touched", [False, True])
def test_a_flipped_bit_is_found_and_its_rows_are_computed_again(touched, tmp_path, caplog):
    screened(tmp_path)
    (path,) = result_files(tmp_path)
    before = sorted((row["hash"], row["energy"] or 0.0) for row in read_rows(tmp_path))
    status = path.stat()
    chunk = pq.read_metadata(path).row_group(0).column(1)
    flip(path, chunk.data_page_offset + chunk.total_compressed_size - 2)
    if not touched:  # as a disk would flip it: nobody wrote the file
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    summary = screened(tmp_path)
    assert summary.seen.rows == 5
    assert "is damaged" in caplog.text
    assert path.with_suffix(".damaged").exists()
    assert sorted((row["hash"], row["energy"] or 0.0) for row in read_rows(tmp_path)) == before


def test_a_flip_anywhere_is_found_by_the_digest(tmp_path):
    """Checksums of pages do not cover the footer."""
    screened(tmp_path)
    (path,) = result_files(tmp_path)
    status = path.stat()
    flip(path, status.st_size - 200)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert screened(tmp_path).seen.rows == 5


@pytest.mark.parametrize("place", [3, 4096])
def test_a_broken_ledger_says_how_to_rebuild_it_and_is_rebuilt(place, tmp_path):
    screened(tmp_path)
    before = sorted(map(str, read_rows(tmp_path)))
    ledger = tmp_path / "ledger.sqlite"
    data = bytearray(ledger.read_bytes())
    data[place : place + 400] = b"\xff" * 400
    ledger.write_bytes(data)
    with pytest.raises(ValueError, match=r"ledger\.sqlite is damaged .*--resume"):
        screened(tmp_path)
    summary = screened(tmp_path, rebuild=True)
    assert (summary.seen.earlier, summary.seen.rows) == (5, 0)
    assert sorted(map(str, read_rows(tmp_path))) == before
    assert summary.counts == {"done": 4, "duplicate": 1}
    # What was computed before is still compared with.
    more = [*found(), Found("new#0", crystal(seed=1).repeat((1, 2, 1)))]
    summary = screen(more, of(Pairs()), out=tmp_path, steps=STEPS)
    assert summary.counts == {"done": 4, "duplicate": 2}
