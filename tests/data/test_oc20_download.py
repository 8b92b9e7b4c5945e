"""Downloads from a server on this machine: resumed, checked, unpacked; nothing else is kept."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from atomeq.cli.parsers.data import main
from atomeq.data import oc20_download
from atomeq.data.ase_files import DataError
from atomeq.data.oc20_download import ARCHIVES, Archive, fetch, unpack


def tar_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


CONTENT = tar_bytes({"set/0.txt": b"x" * 300_000, "set/README": b"hello"})


class Server(ThreadingHTTPServer):
    """Serves one file; ``cut`` bytes at a time where that is set."""

    daemon_threads = True

    def __init__(self) -> None:
        self.content, self.tag, self.cut = CONTENT, '"v1"', None
        self.ranges: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def archive(self) -> Archive:
        md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
        return Archive(f"http://127.0.0.1:{self.server_port}/set.tar", md5, "small")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.ranges.append(self.headers.get("Range"))
        if self.path != "/set.tar":
            self.send_error(404)
            return
        start = 0
        if self.headers.get("Range") and self.headers.get("If-Range") in (None, server.tag):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        stop = len(server.content) if server.cut is None else start + server.cut
        self.wfile.write(server.content[start:stop])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_and_unpacked(server: Server, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    file = fetch(server.archive, tmp_path, report=lambda *counts: seen.append(counts))
    assert file.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.tar"]
    folder = unpack(file, tmp_path / "set")
    assert (folder / "set" / "README").read_bytes() == b"hello"
    assert fetch(server.archive, tmp_path) == file
    assert len(server.ranges) == 1  # a file that is there is checked and kept


def test_a_connection_that_breaks_is_taken_up_again(server: Server, tmp_path: Path):
    server.cut = 100_000
    assert fetch(server.archive, tmp_path).read_bytes() == CONTENT
    assert server.ranges[:3] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_download_goes_on_where_an_earlier_process_left_it(server: Server, tmp_path: Path):
    (tmp_path / "set.tar.part").write_bytes(CONTENT[:1234])
    assert fetch(server.archive, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1234-"]


def test_a_file_that_changed_on_the_server_is_fetched_anew(server: Server, tmp_path: Path):
    (tmp_path / "set.tar.part").write_bytes(b"old" * 100)
    (tmp_path / "set.tar.part.etag").write_text('"v0"')
    assert fetch(server.archive, tmp_path).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_fetched_anew(server: Server, tmp_path: Path):
    (tmp_path / "set.tar.part").write_bytes(CONTENT + b"more")
    assert fetch(server.archive, tmp_path).read_bytes() == CONTENT


def test_a_server_that_gives_nothing_is_given_up(server: Server, tmp_path: Path):
    server.cut = 0
    with pytest.raises(DataError, match="breaks off at 0 bytes"):
        fetch(server.archive, tmp_path)


def test_a_file_with_another_sum_is_not_taken(server: Server, tmp_path: Path):
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(DataError, match="MD5"):
        fetch(server.archive, tmp_path)
    assert not (tmp_path / "set.tar").exists()
    assert not (tmp_path / "set.tar.part").exists()  # or the next call would begin with it
    server.content = CONTENT
    assert fetch(server.archive, tmp_path).read_bytes() == CONTENT


def test_errors_of_the_server_are_told(server: Server, tmp_path: Path):
    missing = Archive(server.archive.url.replace("set", "none"), "", "")
    with pytest.raises(DataError, match="answers 404"):
        fetch(missing, tmp_path)
    server.server_close()
    nowhere = Archive("http://127.0.0.1:9/set.tar", "", "")
    with pytest.raises(DataError, match="cannot be reached"):
        fetch(nowhere, tmp_path)


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path):
    for name in ("../outside", "/tmp/outside-of-it"):
        file = tmp_path / "evil.tar"
        file.write_bytes(tar_bytes({"fine": b"1", name: b"2"}))
        try:
            folder = unpack(file, tmp_path / "in" / "set")
        except DataError as error:
            assert "cannot be unpacked" in str(error)  # noqa: PT017
            assert not (tmp_path / "in" / "set").exists()
        else:  # the filter takes a leading slash away
            assert (folder / name.lstrip("/")).read_bytes() == b"2"
        assert not (tmp_path / "in" / "outside").exists()
        assert not Path("/tmp/outside-of-it").exists()


def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path: Path):
    file = tmp_path / "cut.tar"
    file.write_bytes(CONTENT[:200_000])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(file, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.tar"]
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match="exists already"):
        unpack(file, tmp_path / "set")


def test_the_command_fetches_by_name(
    server: Server, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(oc20_download.ARCHIVES, "oc20-s2ef-200k", server.archive)
    main(["data", "download", "oc20-s2ef-200k", "--folder", str(tmp_path)])
    folder = tmp_path / "oc20"
    assert (folder / "oc20-s2ef-200k" / "set" / "README").exists()
    assert not (folder / "set.tar").exists()
    assert "as published" in capsys.readouterr().out
    with pytest.raises(DataError, match="exists already"):
        main(["data", "download", "oc20-s2ef-200k", "--folder", str(tmp_path)])


def test_unknown_names_are_answered_with_the_known(tmp_path: Path):
    with pytest.raises(DataError, match=r"acac.*oc20-s2ef-200k, oc20-s2ef-2m"):
        main(["data", "download", "oc20-s2ef-3m", "--folder", str(tmp_path)])


def test_the_list_names_every_set(capsys: pytest.CaptureFixture[str]):
    main(["data", "list"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("acac", *ARCHIVES))


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_archive_has_an_address_and_a_sum(name: str):
    archive = ARCHIVES[name]
    assert archive.url.startswith("https://")
    assert len(archive.md5) == 32
    assert int(archive.md5, 16)
