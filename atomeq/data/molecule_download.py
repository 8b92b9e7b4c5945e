"""Public sets of molecules as files on servers, checked by their published MD5 sums.

Sums of QM9 are figshare's, that of the geometries of PCQM4Mv2 is OGB's. Where none is known for
sure the sum of the first download is kept beside the file, and later ones are held to it.
"""

import os
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from atomeq.data.ase_files import DataError
from atomeq.data.oc20_download import Archive, Report, fetch
from atomeq.files import write_atomically

_FIGSHARE = "https://ndownloader.figshare.com/files"
_NREL = "https://data.nrel.gov/system/files/236/1712697052-"


# Of PCQM4Mv2's archive: the table of SMILES and gaps, and the published split of its rows.
_TAKEN_OUT = ("data.csv.gz", "split_dict.pt")


@dataclass(frozen=True)
class MoleculeSet:
    """A public set of molecules.

    Attributes:
        licence: Under which it is published.
        files: What is fetched.
    """

    licence: str
    files: tuple[Archive, ...]


MOLECULE_SETS: dict[str, MoleculeSet] = {
    "qm9": MoleculeSet(
        "CC0-1.0",
        (
            Archive(
                f"{_FIGSHARE}/3195404",
                "a361887bacb427b8a0ce7903d92a53b4",
                "0.5 MB",
                name="uncharacterized.txt",
            ),
            Archive(
                f"{_FIGSHARE}/3195389",
                "ad1ebd51ee7f5b3a6e32e974e5d54012",
                "86 MB",
                name="dsgdb9nsd.xyz.tar.bz2",
            ),
        ),
    ),
    "opv": MoleculeSet(
        "see data.nrel.gov",
        tuple(
            Archive(f"{_NREL}mol_{part}.csv.gz", None, "size unknown", name=f"mol_{part}.csv.gz")
            for part in ("train", "valid", "test")
        ),
    ),
    "pcqm4mv2": MoleculeSet(
        "CC-BY-4.0",
        (
            Archive(
                "https://dgl-data.s3-accelerate.amazonaws.com/dataset/OGB-LSC/pcqm4m-v2.zip",
                None,
                "60 MB",
            ),
            Archive(
                "http://ogb-data.stanford.edu/data/lsc/pcqm4m-v2-train.sdf.tar.gz",
                "fd72bce606e7ddf36c2a832badeec6ab",
                "1.5 GB",
            ),
        ),
    ),
}


def download_molecules(
    name: str,
    folder: str | os.PathLike[str],
    *,
    source: str | None = None,
    report: Report | None = None,
) -> list[Path]:
    """Fetch a set into ``folder/name``; files that are there and right are left alone.

    Args:
        name: One of :data:`MOLECULE_SETS`.
        folder: What ``ATOMEQ_DATA`` names.
        source: Another address of the same files, a mirror.
        report: Called after each block.

    Returns:
        The files.

    Raises:
        DataError: A server does not give a file, or it is not what was published.
    """
    target = Path(folder) / name
    paths = []
    for file in MOLECULE_SETS[name].files:
        if source is not None:
            file = replace(file, url=f"{source.rstrip('/')}/{file.file_name}", name=file.file_name)
        paths.append(fetch(file, target, report=report))
        if paths[-1].suffix == ".zip":
            for member in _TAKEN_OUT:
                _take_out(paths[-1], member)
    return paths


def _take_out(archive: Path, name: str) -> None:
    """Write one file of a zip archive beside it, from whatever folder it is in."""
    try:
        with zipfile.ZipFile(archive) as packed:
            member = next((m for m in packed.namelist() if m.rpartition("/")[2] == name), None)
            if member is None:
                raise DataError(f"{archive} holds no {name}; it is not what was published")
            with (
                write_atomically(archive.with_name(name)) as partial,
                packed.open(member) as source,
                partial.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is damaged: {error}; remove it and fetch it anew") from error
