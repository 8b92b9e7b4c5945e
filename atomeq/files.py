"""Whole files or none: outputs are written under a temporary name in their folder, then renamed.

Everything that writes a result (calculators' logs, trajectories, summaries) goes through here.
"""

import gzip
import io
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def write_atomically(
    path: str | Path, *, keep_on: tuple[type[BaseException], ...] = ()
) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well.

    The temporary file keeps the suffix (``cu.part-4242.extxyz``), so that readers recognise the
    format of what a killed process left. It is removed when the block raises; SIGKILL leaves it.

    Args:
        path: The file to write or replace; its folder must exist.
        keep_on: Exceptions after which the temporary file is left for the user, such as
            ``KeyboardInterrupt`` in a long trajectory.

    Yields:
        The path to write to.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: ``path`` is a folder.

    Example:
        >>> with write_atomically("result.json") as partial:  # doctest: +SKIP
        ...     partial.write_text("{}")
    """
    path = Path(path)
    refuse_unwritable(path)
    partial = path.with_name(f"{path.stem}.part-{os.getpid()}{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as stream:  # on disk before it takes the name, or a crash of the
            os.fsync(stream.fileno())  # machine could leave an empty file under the final name
        os.replace(partial, path)
    except keep_on:
        logger.warning("what was written so far is in %s", partial)
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def write_folder_atomically(path: str | Path) -> Iterator[Path]:
    """Yield the path of a folder to make, which replaces ``path`` when the block ends well.

    Raises:
        FileNotFoundError: The folder above does not exist.
    """
    path = Path(path)
    partial = path.with_name(f"{path.stem}.part-{os.getpid()}{path.suffix}")
    refuse_unwritable(partial)
    try:
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        if path.exists():
            path.rename(old := partial.with_suffix(".old"))
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def write_gzip(path: str | Path) -> Iterator[io.TextIOWrapper]:
    """Yield a text stream that becomes a gzip file; the same text is the same bytes.

    Args:
        path: As :func:`write_atomically` takes it.
    """
    with (
        write_atomically(path) as partial,
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,  # no name and time in the header
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        yield text


def dated(folder: Path, name: str) -> Path:
    """Return ``folder/YYYY-MM-DD-name``: that of an earlier run, or one with today's date."""
    earlier = sorted(folder.glob(f"????-??-??-{name}"))
    return earlier[-1] if earlier else folder / f"{date.today().isoformat()}-{name}"


def refuse_existing(*paths: str | Path, overwrite: bool, way: str = "") -> None:
    """Refuse to replace what is there: the one door of every command that writes.

    Args:
        *paths: What would be written.
        overwrite: Whether the user asked for it to be replaced.
        way: What else the user may do, with a comma after it.

    Raises:
        FileExistsError: One of them exists.
    """
    for path in paths:
        if not overwrite and Path(path).exists():
            raise FileExistsError(
                f"{path} exists already; {way}name another output, or replace it with --overwrite"
            )


def refuse_unwritable(path: str | Path) -> None:
    """Raise before the work begins where :func:`write_atomically` would fail after it.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: ``path`` is a folder.
        PermissionError: The folder cannot be written to.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission in {path.parent}")
