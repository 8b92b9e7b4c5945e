"""Public data sets from their original sources, pinned to a commit and checked by content.

What is checked is the SHA-256 of the structures and labels themselves, so it holds for the source's
file, for a compressed copy of it and for one that another tool has written.
"""

import gzip
import hashlib
import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atomeq.data.ase_files import DataError, read_structures
from atomeq.data.source_files import convert_qm7, convert_snap
from atomeq.files import write_atomically

logger = logging.getLogger(__name__)

_BOTNET = (
    "https://raw.githubusercontent.com/davkovacs/BOTNet-datasets/"
    "29e6d467317e4b5967b7ea5cbee54de953fa0d45"
)
_TIMEOUT = 60.0  # s without a byte
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DataSet:
    """A public data set.

    Attributes:
        source: Address of the folder the files come from, pinned to a commit.
        licence: Under which the source publishes it.
        files: Name here -> (name or names at the source, SHA-256 of the content).
        convert: Writes what came from the source as extended XYZ, where it is of another form.
        decimals: Of positions that count. Sources in fractions of the cell say no more than four
            for sure, whoever multiplies.
    """

    source: str
    licence: str
    files: dict[str, tuple[str | tuple[str, ...], str]]
    convert: Callable[[Sequence[Path], Path], None] | None = None
    decimals: int = 8


DATA_SETS: dict[str, DataSet] = {
    "acac": DataSet(
        source=f"{_BOTNET}/dataset_acac",
        licence="MIT",
        files={
            "isolated_atoms.extxyz": (
                "isolated_atoms.xyz",
                "f84c11cb9bc9f2c3d56fcd90b15068c7e60be5cb192dd285ff8b65fea2a01329",
            ),
            "test_H_transfer.extxyz": (
                "test_H_transfer.xyz",
                "2c8c95c7a5ff62bec3f69f79087908707f1490b93d4bff62c24660f4b2b142da",
            ),
            "test_MD_300K.extxyz.gz": (
                "test_MD_300K.xyz",
                "bb6bc792d1df79f03062ca30d10a6deda9e76ae9e783507c16b1cf919f056b13",
            ),
            "test_MD_600K.extxyz.gz": (
                "test_MD_600K.xyz",
                "f3d43bd0e99804d91bfe66a7d7c9e230e046f2f21befeff2178c039e3453d676",
            ),
            "test_dihedral.extxyz": (
                "test_dihedral.xyz",
                "a45be2b55080e1715d91b3cada5eb05c5c1b47c1e3da46c604a2be30ef80fe26",
            ),
            "train_300K.extxyz.gz": (
                "train_300K.xyz",
                "fff466cc875f25816328d37c99e0cde44c8b52091624f1fbe55ac01f42e7a6cd",
            ),
            "train_600K.extxyz.gz": (
                "train_600K.xyz",
                "692e220093cec5845def9814a106ffc626f9d74cd679b4212780459f5fde067b",
            ),
        },
    ),
    "3bpa": DataSet(
        source=f"{_BOTNET}/dataset_3BPA",
        licence="MIT",
        files={
            "iso_atoms.extxyz": (
                "iso_atoms.xyz",
                "c3d4ae560a95d7176b772981c66663b67a97f8cec5b711148ce00f56df4fc623",
            ),
            "train_300K.extxyz.gz": (
                "train_300K.xyz",
                "7b497bc6ba5ee1bed0aa0a59822a544e28f2d43d07f50b072a4a505a64533767",
            ),
            "train_mixedT.extxyz.gz": (
                "train_mixedT.xyz",
                "614c44ede0031724519c0f7919c147343aab3947a5a2ac7168b289789e6670f3",
            ),
        },
    ),
    "ethanol_rmd17_pbe": DataSet(
        source=f"{_BOTNET}/dataset_ethanol",
        licence="MIT",
        files={
            "isolated_atoms.extxyz": (
                "isolated_atoms.xyz",
                "908c180344c9d8db6ebf1d514d5ba1c52a561fc38b9d5d0817487a2b51819559",
            ),
            "test_H_removal.extxyz": (
                "test_H_removal.xyz",
                "b1fbc29783e0552d256928715b60269e4cdfc9d704e0dde99ee9718a8198a015",
            ),
            "test_MD.extxyz.gz": (
                "test_MD.xyz",
                "735176035938cf2425841454029e3f269188e85eef457e62bf0c59526ab5b572",
            ),
            "test_dimers.extxyz.gz": (
                "test_dimers.xyz",
                "e4aaac1f1129fbfadc526a775c5328b10815aeee81961af551b3226cc964e8e1",
            ),
            "test_eth_meth.extxyz.gz": (
                "test_eth_meth.xyz",
                "1fe51d54c3cc34994f8346f1f74ca330f699355f01675f31a937dc4b5c977ef8",
            ),
            "test_norm_mode_3005.extxyz": (
                "test_norm_mode_3005.xyz",
                "4b2f340ebcee3b94fdd9c312c9ba1c54ea5647c764421ab9d20fd7693ba2ea55",
            ),
            "test_norm_mode_874.extxyz": (
                "test_norm_mode_874.xyz",
                "cceac7c6e84c0a3dbc0778ccd1f3cde8cd76924b80abcc217644f62b09effcfb",
            ),
            "train.extxyz.gz": (
                "train.xyz",
                "44317ea5c426386e7c902196293ec224c362aebc336e191e5f342b5df6f43eff",
            ),
            "train_eth_meth.extxyz.gz": (
                "train_eth_meth.xyz",
                "49af7a0e3fb25f1a14be429f125da6b8d5ccf0b51818127162d49ab2717ddf13",
            ),
        },
    ),
    "mattersim_benchmarks": DataSet(  # parts are of the Materials Project and of Alexandria
        source="https://raw.githubusercontent.com/microsoft/mattersim/"
        "296630372948fd35613939d14d3f97daa27cefda/data/benchmarks",
        licence="MIT",
        files={
            "alexandria-random-1k.extxyz.gz": (
                "alexandria-random-1k.xyz",
                "2d407d2a3e3a5a12aee3c20e3b853fc875c64cca33c5d852f45f0bc4daac9950",
            ),
            "mpf-TP.extxyz.gz": (
                "mpf-TP.xyz",
                "1a5b6947252d74f1b1d51578dde346c97c0cb959699471d3f3165624e672ae7a",
            ),
            "mpf-alkali-TP.extxyz.gz": (
                "mpf-alkali-TP.xyz",
                "8c2fd02748b7619fca4845af43ebbc3316daa068214ca1f4da121a305091a24f",
            ),
            "mptrj-highest-stress-1k.extxyz.gz": (
                "mptrj-highest-stress-1k.xyz",
                "e90b8740a40b797fde6e6cc2e2cdae351b19d5bc6d0d8f3e493730221a9cea11",
            ),
            "mptrj-random-1k.extxyz.gz": (
                "mptrj-random-1k.xyz",
                "7a10c90710842452ccc30d58094c9031802e8366dd488ac2c592d4f4fef12aac",
            ),
            "random-TP.extxyz.gz": (
                "random-TP.xyz",
                "4cbf4e037547243f3e9f6257bcb74ff5daeb17e59be8385552e64ab0de87056c",
            ),
        },
    ),
    "mvl_snap": DataSet(
        source="https://raw.githubusercontent.com/materialsvirtuallab/snap/"
        "5fc2251b45c72dea0c9799d7aad3e3261a077a5b/Cu/training",
        licence="BSD-3-Clause",
        files={
            "Cu.extxyz.gz": (
                ("AIMD.json", "Elastic.json", "Surface.json", "Vacancy.json"),
                "ae21fafb12cf5e5f3d50eb804109de54ec50f91440c4be81a5e46ed634c2a615",
            ),
        },
        convert=convert_snap,
        decimals=4,
    ),
    "qm7": DataSet(
        source="https://codeload.github.com/qmlcode/tutorial/tar.gz",
        licence="MIT",
        files={
            "qm7.extxyz.gz": (
                "da714b16201955b9d5ce2efaab824da55a0c2807",
                "270d379cb74553aeb60b1f370cbbbac9a239e8e1e45a698f1dab47e2c014c954",
            ),
        },
        convert=convert_qm7,
    ),
}


def download(name: str, folder: str | Path, *, source: str | None = None) -> list[Path]:
    """Fetch a data set into ``folder/name``; files that are there and right are left alone.

    A download that broke off goes on where it stopped. A file takes its name only when it is
    complete and its content is right.

    Args:
        name: One of :data:`DATA_SETS`.
        folder: What ``ATOMEQ_DATA`` names.
        source: Another address of the same files, for example a mirror.

    Returns:
        The files.

    Raises:
        DataError: An unknown name, a source that cannot be reached, or content that is not that of
            the data set.

    Example:
        >>> download("acac", "data")  # doctest: +SKIP
    """
    if name not in DATA_SETS:
        raise DataError(f"there is no data set {name!r} to download; known: {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    target = Path(folder) / name
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for here, (there, digest) in data_set.files.items():
        path = target / here
        if path.is_file() and content_digest(path, decimals=data_set.decimals) == digest:
            logger.info("%s is there", path)
        else:
            names = (there,) if isinstance(there, str) else there
            urls = [f"{source or data_set.source}/{name}" for name in names]
            _fetch_checked(urls, path, digest, data_set)
        paths.append(path)
    return paths


def content_digest(path: str | Path, *, decimals: int = 8) -> str:
    """Return the SHA-256 of what a file says: elements, positions, cells and labels.

    Numbers count to 8 decimals, which is what the sources give. Cells count along periodic
    directions only, for a box around a molecule means nothing.

    Args:
        path: The file.
        decimals: Of positions.

    Raises:
        DataError: The file cannot be read.
    """
    digest = hashlib.sha256()
    for atoms in read_structures(path):
        results = atoms.calc.results if atoms.calc is not None else {}
        digest.update(atoms.numbers.astype("<i4").tobytes())
        digest.update(_decimals(atoms.positions, decimals))
        digest.update(_decimals(atoms.cell.array[atoms.pbc]))
        for label in ("energy", "forces", "stress"):
            if label in results:
                digest.update(label.encode() + _decimals(np.asarray(results[label])))
    return digest.hexdigest()


def _decimals(values: np.ndarray, decimals: int = 8) -> bytes:
    rounded = np.round(values, decimals) + 0.0  # -0.0 + 0.0 is 0.0
    return ",".join(f"{value:.8f}" for value in rounded.flatten()).encode()


def _fetch_checked(urls: Sequence[str], path: Path, digest: str, data_set: DataSet) -> None:
    stem = path.name.removesuffix(".gz")
    partial = path.with_name(f".{stem}.part.xyz")
    fetched = [partial]
    if data_set.convert is not None:
        fetched = [path.with_name(f".{stem}.part.{url.rpartition('/')[2]}") for url in urls]
    for url, file in zip(urls, fetched, strict=True):
        logger.info("fetching %s", url)
        _fetch(url, file)
    where = urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"
    try:
        if data_set.convert is not None:
            data_set.convert(fetched, partial)
        found = content_digest(partial, decimals=data_set.decimals)
        if found != digest:
            raise DataError(
                f"the content of {where} has SHA-256 {found[:12]}…, the data set has "
                f"{digest[:12]}…; it was damaged on the way or is not the published file; try again"
            )
        _install(partial, path)
    except DataError as error:
        known = str(error).startswith("the content")
        message = str(error) if known else f"what {where} sent is not a file of structures: {error}"
        raise DataError(message) from error
    finally:  # whole files that turned out wrong are of no use either
        for file in {partial, *fetched}:
            file.unlink(missing_ok=True)


def _install(partial: Path, path: Path) -> None:
    with write_atomically(path) as temporary, partial.open("rb") as stream:
        if path.suffix == ".gz":
            # mtime 0 makes the same content the same file.
            with temporary.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as out:
                shutil.copyfileobj(stream, out)
        else:
            with temporary.open("wb") as out:
                shutil.copyfileobj(stream, out)


def _fetch(url: str, partial: Path) -> None:
    """Complete a partial file from a source, from the start where it does not serve parts."""
    start = partial.stat().st_size if partial.is_file() else 0
    try:
        for mode, chunk in _chunks(url, start):
            with partial.open(mode) as stream:
                stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"cannot fetch {url}: {error}; run the command again to go on where it stopped"
        ) from error


def _chunks(url: str, start: int) -> Iterator[tuple[str, bytes]]:
    """Yield (mode to open the file with, bytes to write)."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # nothing after `start`: the file was complete
            return
        raise
    with response:
        mode = "ab" if start and response.status == 206 else "wb"
        received, expected = 0, response.headers.get("Content-Length")
        while chunk := response.read(_CHUNK):
            yield mode, chunk
            mode = "ab"
            received += len(chunk)
        if expected is not None and received != int(expected):
            raise OSError(f"the connection broke off after {received} of {expected} bytes")
