"""Which reader reads which published file of molecules; whatever has none here is ASE's to read."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ase import Atoms

from atomeq.data.ase_files import DataError
from atomeq.data.md_archives import read_md_archive
from atomeq.data.molecules import (
    atoms_of_block,
    numbers_in,
    read_sdf,
    read_table,
    rows_of,
)
from atomeq.data.qm9 import read_moleculenet, read_pyg, read_raw

Reader = Callable[[Path], Iterator[Atoms]]

#: Of sets that stay on disk, by suffix.
STORED_FORMATS = {".h5": "hdf5", ".hdf5": "hdf5", ".zarr": "zarr"}


def reader_of(path: Path) -> Reader | None:
    """Return the reader of a published file by its name, or None where ASE reads it.

    * ``*.h5``, ``*.hdf5``, ``*.zarr``: what ``atomeq data convert`` writes
    * ``dsgdb9nsd*``, ``gdb9.sdf``, ``qm9_v3.pt``, ``data_v3.pt``: QM9
    * ``pcqm4m-v2*.sdf[.tar.gz]``: the geometries of PCQM4Mv2
    * ``*.npz``: frames of MD17, rMD17 and MD22
    * ``*.csv[.gz]``: SMILES or MOL blocks with labels, as OPV and PCQM4Mv2 have them
    """
    name = path.name
    if path.suffix in STORED_FORMATS:
        from atomeq.data.stored_files import read_stored  # brings h5py

        return read_stored
    if path.suffix == ".npz":
        return read_md_archive
    if name.startswith("dsgdb9nsd"):
        return read_raw
    if name == "gdb9.sdf":
        return read_moleculenet
    if name in ("qm9_v3.pt", "data_v3.pt"):
        return read_pyg
    if name.startswith("pcqm4m-v2") and ".sdf" in path.suffixes:
        return read_pcqm4mv2
    if name.endswith((".csv", ".csv.gz")):
        return read_table
    return None


def read_pcqm4mv2(path: Path) -> Iterator[Atoms]:
    """Yield the training molecules of PCQM4Mv2 with geometry; labels are in ``data.csv.gz``.

    The SDF holds the molecules of the table's first rows, in its order; those behind, to validate
    and to test, have SMILES only.

    Raises:
        DataError: The table is missing or shorter, or a molecule makes no sense.
    """
    folders = (path.parent, path.parent / "pcqm4m-v2" / "raw", path.parent / "raw")
    tables = [folder / "data.csv.gz" for folder in folders if (folder / "data.csv.gz").is_file()]
    if not tables:
        raise DataError(f"{path.parent} has no data.csv.gz, the table with the labels of {path}")
    rows = rows_of(tables[0])
    for k, (_, block) in enumerate(read_sdf(path)):
        row = next(rows, None)
        if row is None:
            raise DataError(f"{tables[0]} ends before molecule {k} of {path}")
        name = f"{path}, molecule {k}"
        labels = numbers_in({key: text for key, text in row.items() if key != "idx"})
        yield atoms_of_block(block, labels, name=name)
