"""Fetches the public archives of OC20: goes on where it was cut, and checks what it got.

Addresses and MD5 sums are those of the dataset's own documentation (DATASET.md of the Open Catalyst
Project, version of February 2021).
"""

import contextlib
import hashlib
import http
import http.client
import logging
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from atomeq.data.ase_files import DataError

logger = logging.getLogger(__name__)

_BASE = "https://dl.fbaipublicfiles.com/opencatalystproject/data"
_BLOCK = 2**20
_TIMEOUT = 60.0  # s without a byte
_ATTEMPTS = 5

#: Called with the number of bytes present and the number there will be.
Report: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Archive:
    """A file on a server.

    Attributes:
        url: Where it is.
        md5: Its published MD5 sum; None where there is none: the first download's is kept.
        size: Roughly how large it is, and unpacked, for people.
        name: Of the file here; by default the one at the end of the address.
    """

    url: str
    md5: str | None
    size: str
    name: str | None = None

    @property
    def file_name(self) -> str:
        """The name of the file here."""
        return self.name or self.url.rpartition("/")[2]


ARCHIVES: dict[str, Archive] = {
    f"oc20-{name}": Archive(f"{_BASE}/{file}", md5, size)
    for name, file, md5, size in (
        ("s2ef-200k", "s2ef_train_200K.tar", "f8d0909c2623a393148435dede7d3a46", "344 MB, 1.7 GB"),
        ("s2ef-2m", "s2ef_train_2M.tar", "953474cb93f0b08cdc523399f03f7c36", "3.4 GB, 17 GB"),
        ("s2ef-20m", "s2ef_train_20M.tar", "863bc983245ffc0285305a1850e19cf7", "34 GB, 165 GB"),
        ("s2ef-all", "s2ef_train_all.tar", "12a7087bfd189a06ccbec9bc7add2bcd", "225 GB, 1.1 TB"),
        ("s2ef-md", "s2ef_md.tar", "9fed845aaab8fb4bf85e3a8db57796e0", "42 GB, 306 GB"),
        ("s2ef-rattled", "s2ef_rattled.tar", "40431149b27b64ce1fb40cac4e2e064b", "29 GB, 136 GB"),
        ("s2ef-val-id", "s2ef_val_id.tar", "f57f7f5c1302637940f2cc858e789410", "1.7 GB, 8.3 GB"),
        (
            "s2ef-val-ood-ads",
            "s2ef_val_ood_ads.tar",
            "431ab0d7557a4639605ba8b67793f053",
            "1.7 GB, 8.2 GB",
        ),
        (
            "s2ef-val-ood-cat",
            "s2ef_val_ood_cat.tar",
            "532d6cd1fe541a0ddb0aa0f99962b7db",
            "1.7 GB, 8.3 GB",
        ),
        (
            "s2ef-val-ood-both",
            "s2ef_val_ood_both.tar",
            "5731862978d80502bbf7017d68c2c729",
            "1.9 GB, 9.5 GB",
        ),
        (
            "s2ef-test",
            "s2ef_test_lmdbs.tar.gz",
            "bcada432482f6e87b24e14b6b744992a",
            "30 GB, 415 GB",
        ),
        (
            "is2re",
            "is2res_train_val_test_lmdbs.tar.gz",
            "cfc04dd2f87b4102ab2f607240d25fb1",
            "8.1 GB, 97 GB",
        ),
    )
}


def fetch(
    archive: Archive, folder: str | os.PathLike[str], *, report: Report | None = None
) -> Path:
    """Download an archive into a folder and check it.

    What an earlier, interrupted call left (``<file>.part``) is completed if the server still has
    the same file. A file that is there already is checked and kept.

    Args:
        archive: What to fetch.
        folder: Where to; created.
        report: Called after each block.

    Returns:
        The file.

    Raises:
        DataError: The server does not give it, it is not what was published, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / archive.file_name
    if not file.is_file():
        partial = file.with_name(f"{file.name}.part")
        _complete(archive.url, partial, report)
        _check(partial, archive)
        os.replace(partial, file)
        _tag_file(partial).unlink(missing_ok=True)
    else:
        _check(file, archive)
    return file


def unpack(file: Path, folder: str | os.PathLike[str]) -> Path:
    """Unpack an archive; members that point outside the folder are refused.

    Args:
        file: The tar file.
        folder: Where its contents go; must not exist yet.

    Returns:
        The folder, which appears when all is unpacked.

    Raises:
        DataError: The folder exists, or the archive is damaged or unsafe.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; move it away, or give another folder")
    scratch = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        with tarfile.open(file) as archive:
            archive.extractall(scratch, filter="data")
        os.replace(scratch, folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{file} cannot be unpacked into {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _complete(url: str, partial: Path, report: Report | None) -> None:
    """Fetch what is missing of a file, in several attempts while each gets on."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            _append(url, partial, report)
            return
        except (TimeoutError, ConnectionError, http.client.HTTPException, _CutShort) as error:
            failures = 0 if _size(partial) > before else failures + 1
            if failures >= _ATTEMPTS:
                raise DataError(
                    f"{url} breaks off at {_size(partial)} bytes ({error}); call again to go on"
                ) from error
            logger.warning("%s: %s; going on", url, error)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and before:
                partial.unlink()  # longer than the file on the server: begin anew
                continue
            raise DataError(f"{url} answers {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise DataError(f"{url} cannot be reached: {error.reason}") from error


class _CutShort(Exception):
    pass


def _append(url: str, partial: Path, report: Report | None) -> None:
    present, tag_file = _size(partial), _tag_file(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "atomeq"})
    if present:
        request.add_header("Range", f"bytes={present}-")
        if tag_file.is_file():  # the server sends all of it if the file has changed since
            request.add_header("If-Range", tag_file.read_text(encoding="ascii"))
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            present = 0
        length = answer.headers.get("Content-Length")
        total = present + int(length or 0)
        if total - present > shutil.disk_usage(partial.parent).free:
            raise DataError(f"{partial.parent} has no room for the {total} bytes of {url}")
        tag = answer.headers.get("ETag")
        if tag and not tag.startswith("W/"):
            tag_file.write_text(tag, encoding="ascii")
        with partial.open("ab" if present else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                present += len(block)
                if report is not None:
                    report(present, total)
    if length is not None and present != total:
        raise _CutShort(f"{present} of {total} bytes")


def _check(file: Path, archive: Archive) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    record = file.with_name(f"{archive.file_name}.md5")
    expected = archive.md5
    if expected is None and record.is_file():
        expected = record.read_text(encoding="utf-8").strip()
    if expected is None:
        record.write_text(digest.hexdigest() + "\n", encoding="utf-8")
        logger.warning(
            "%s: no MD5 sum is published; that of this download, %s, is kept in %s",
            archive.url,
            digest.hexdigest(),
            record,
        )
    elif digest.hexdigest() != expected:
        kept = file.with_name(f"{file.name}.damaged")
        os.replace(file, kept)
        with contextlib.suppress(FileNotFoundError):
            _tag_file(file).unlink()
        raise DataError(
            f"{archive.url}: the MD5 sum of what came is {digest.hexdigest()}, published is "
            f"{expected}; it is kept as {kept}, call again to fetch it anew"
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _tag_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.etag")
