"""Downloads go on where they stopped, and nothing gets its name before its content is right."""

import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from atomeq.cli import main
from atomeq.data import download as module
from atomeq.data.ase_files import DataError
from atomeq.data.download import DATA_SETS, DataSet, content_digest, download


def structures(n: int = 200) -> list[Atoms]:
    rng = np.random.RandomState(0)
    made = []
    for _ in range(n):
        atoms = Atoms("CuO", positions=rng.normal(size=(2, 3)))
        atoms.positions[1, 0] += 9.0  # no overlap
        atoms.info["energy"] = rng.normal()
        atoms.arrays["forces"] = np.round(rng.normal(size=(2, 3)), 8)
        made.append(atoms)
    return made


class Server:
    """Serves a folder; counts bytes, and can break off or ignore ranges."""

    def __init__(self, folder: Path) -> None:
        self.break_after: int | None = None
        self.ranges = True
        self.sent = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                content, start = path.read_bytes(), 0
                asked = self.headers.get("Range")
                if asked and outer.ranges:
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                    if start >= len(content):
                        self.send_error(416)
                        return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                part = content[start : outer.break_after]
                outer.sent += len(part)
                self.wfile.write(part)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    ase.io.write(folder / "a.xyz", structures(), format="extxyz")
    ase.io.write(folder / "b.xyz", structures(3), format="extxyz")
    return folder


@pytest.fixture
def server(source: Path) -> Iterator[Server]:
    server = Server(source)
    server.thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    server.thread.join()


@pytest.fixture
def toy(source: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    files = {
        "a.extxyz.gz": ("a.xyz", content_digest(source / "a.xyz")),
        "b.extxyz": ("b.xyz", content_digest(source / "b.xyz")),
    }
    data_set = DataSet(source=server.url, licence="MIT", files=files)
    monkeypatch.setitem(module.DATA_SETS, "toy", data_set)
    return data_set


def test_a_set_arrives_whole_and_is_left_alone_after(tmp_path: Path, toy: DataSet, server: Server):
    paths = download("toy", tmp_path / "data")
    assert [path.name for path in paths] == list(toy.files)
    assert [content_digest(path) for path in paths] == [digest for _, digest in toy.files.values()]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(toy.files)
    sent = server.sent
    download("toy", tmp_path / "data")
    assert server.sent == sent


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(
    tmp_path: Path, toy: DataSet, source: Path, server: Server, ranges: bool
):
    size = (source / "a.xyz").stat().st_size
    server.ranges = ranges
    server.break_after = size // 2
    with pytest.raises(DataError, match="run the command again"):
        download("toy", tmp_path / "data")
    assert not (tmp_path / "data" / "toy" / "a.extxyz.gz").exists()
    server.break_after, server.sent = None, 0
    download("toy", tmp_path / "data")
    rest = size - size // 2 if ranges else size
    assert server.sent == rest + (source / "b.xyz").stat().st_size


def test_wrong_content_is_refused(tmp_path: Path, toy: DataSet, source: Path):
    changed = structures()
    changed[100].positions[0, 0] += 1e-6
    ase.io.write(source / "a.xyz", changed, format="extxyz")
    with pytest.raises(DataError, match="SHA-256"):
        download("toy", tmp_path / "data")
    (source / "a.xyz").write_text("<html>not found</html>")
    with pytest.raises(DataError, match="not a file of structures"):
        download("toy", tmp_path / "data")
    assert not list((tmp_path / "data" / "toy").iterdir())


def test_what_cannot_be_reached_is_named(tmp_path: Path, toy: DataSet, source: Path):
    (source / "a.xyz").unlink()
    with pytest.raises(DataError, match=r"a\.xyz.*404"):
        download("toy", tmp_path / "data")
    with pytest.raises(DataError, match="known: acac"):
        download("nothing", tmp_path / "data")


def test_the_command(tmp_path: Path, toy: DataSet, source: Path, capsys, monkeypatch):
    main(["data", "list"])
    assert "acac" in capsys.readouterr().out
    monkeypatch.setenv("ATOMEQ_DATA", str(tmp_path / "data"))
    main(["data", "download", "toy", "--source", source.as_uri()])
    assert "2 files" in capsys.readouterr().out
    monkeypatch.delenv("ATOMEQ_DATA")
    for words, message in (
        (["data", "download", "toy"], "--folder"),
        (["data", "download"], "name a data set"),
        (["data", "download", "nothing", "--folder", str(tmp_path)], "known: acac"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(words)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_the_digest_is_of_the_content(tmp_path: Path, source: Path):
    """The format, a box around a molecule and other information do not change it."""
    again = structures()
    for atoms in again:
        atoms.cell = [50.0, 50.0, 50.0]
        atoms.info["config_type"] = "MD"
    ase.io.write(tmp_path / "again.extxyz.gz", again)
    assert content_digest(tmp_path / "again.extxyz.gz") == content_digest(source / "a.xyz")


def test_sources_are_pinned_to_a_commit():
    for data_set in DATA_SETS.values():
        for names, _ in data_set.files.values():
            first = names if isinstance(names, str) else names[0]
            assert re.search(r"/[0-9a-f]{40}(/|$)", f"{data_set.source}/{first}")
        assert all(len(digest) == 64 for _, digest in data_set.files.values())


def test_public_sets_have_the_published_content(tmp_path: Path, data_folder: Path):
    shutil.copytree(data_folder / "acac", tmp_path / "acac")
    # A source that does not exist: with the right content in place nothing is fetched.
    download("acac", tmp_path, source="file:///nonexistent")
