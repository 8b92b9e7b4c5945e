"""OPV and PCQM4Mv2 in exactly their published forms: tables of SMILES and MOL blocks, SDF files."""

import csv
import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from atomeq.data import molecule_download
from atomeq.data.ase_files import DataError, LabelKeys, read_structures
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.molecule_download import MOLECULE_SETS, MoleculeSet, download_molecules
from atomeq.data.molecule_files import reader_of
from atomeq.data.molecules import NO_GEOMETRY
from atomeq.data.oc20_download import Archive
from atomeq.data.splits import Split, split_indices
from atomeq.data.targets import known_target
from atomeq.graph.builders import HyperGraph
from atomeq.graph.hyperedges import CONJUGATED, INFO_KEY, RING
from atomeq.models.egnn import EGNN
from atomeq.models.equihgnn import EquiHGNN
from atomeq.potential.scalar import ScalarPredictor

chem = pytest.importorskip("rdkit.Chem", reason="RDKit is of the extra chemistry")

SMILES = ("c1ccsc1", "CC=O", "O")
OPV_COLUMNS = (
    "gap",
    "homo",
    "lumo",
    "spectral_overlap",
    "gap_extrapolated",
    "homo_extrapolated",
    "lumo_extrapolated",
    "optical_lumo_extrapolated",
)


def mol_block(smiles: str) -> str:
    from rdkit.Chem import AllChem

    mol = chem.AddHs(chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    return chem.MolToMolBlock(mol)


@pytest.fixture
def opv(tmp_path: Path) -> Path:
    """mol_train.csv.gz: SMILES, MOL block and eight targets, half of them not always there."""
    path = tmp_path / "mol_train.csv.gz"
    with gzip.open(path, "wt", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["smile", *OPV_COLUMNS, "mol"])
        for k, smiles in enumerate(SMILES):
            polymer = [0.1 * k] * 4 if k else [""] * 4
            table.writerow([smiles, 3.0 + k, -6.0, -3.0, 100.0, *polymer, mol_block(smiles)])
    return path


@pytest.fixture
def pcqm(tmp_path: Path) -> Path:
    """data.csv.gz of all molecules, and the geometries of the first two in a tar file."""
    rows = ["idx,smiles,homolumogap", *(f"{k},{s},{4.0 + k}" for k, s in enumerate(SMILES[:2]))]
    rows.append(f"2,{SMILES[2]},")  # of test molecules the gap is not published
    with gzip.open(tmp_path / "data.csv.gz", "wt") as stream:
        stream.write("\n".join(rows) + "\n")
    content = "".join(mol_block(smiles) + "$$$$\n" for smiles in SMILES[:2]).encode()
    path = tmp_path / "pcqm4m-v2-train.sdf.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("pcqm4m-v2-train.sdf")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return path


def read(path: Path, scalar: str = "gap") -> list[Atoms]:
    return list(read_structures(path, labels=LabelKeys(scalar=scalar), reader=reader_of(path)))


def test_opv_has_geometry_hypergraph_and_targets(opv: Path):
    thiophene, acetaldehyde, water = read(opv)
    assert [len(a) for a in (thiophene, acetaldehyde, water)] == [9, 7, 3]
    assert [a.info["scalar"] for a in (thiophene, acetaldehyde, water)] == [3.0, 4.0, 5.0]
    types = thiophene.info[INFO_KEY]["types"]
    assert RING in types
    assert CONJUGATED in types
    assert np.linalg.norm(thiophene.positions[0] - thiophene.positions[1]) == pytest.approx(
        1.37, abs=0.1
    )


def test_targets_of_the_polymer_are_unknown_where_they_are_not_given(opv: Path):
    found = read(opv, "gap_extrapolated")
    assert ["scalar" in atoms.info for atoms in found] == [False, True, True]


def test_pcqm4mv2_joins_geometries_and_table(pcqm: Path):
    thiophene, acetaldehyde = read(pcqm)
    assert thiophene.get_chemical_formula() == "C4H4S"
    assert [thiophene.info["scalar"], acetaldehyde.info["scalar"]] == [4.0, 5.0]
    assert INFO_KEY in thiophene.info


def split_dict(path: Path, parts: dict[str, list[int]], *, old: bool = True) -> Path:
    """Write OGB's file: NumPy arrays, pickled when NumPy's core had no underscore."""
    arrays = {name: np.array(rows) for name, rows in parts.items()}
    torch.save(arrays, path, pickle_protocol=2)
    if old:
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, stored in content.items():
                archive.writestr(name, stored.replace(b"numpy._core.", b"numpy.core."))
    return path


PARTS = {"train": [0, 3], "valid": [1], "test-dev": [2], "test-challenge": [4]}


@pytest.mark.parametrize("old", [True, False])
def test_pcqm4mv2_is_divided_as_published(pcqm: Path, old: bool):
    table = pcqm.with_name("data.csv.gz")
    with gzip.open(table, "at") as stream:
        stream.write("3,CCO,7.5\n4,C,\n")
    path = split_dict(table.with_name("split_dict.pt"), PARTS, old=old)
    data = AtomisticDataModule(
        str(table), split=Split(file=str(path)), labels=LabelKeys(scalar="gap")
    )
    data.use_builder(HyperGraph(0.5))
    data.setup("fit")
    assert data.train_set is not None
    assert data.val_set is not None
    assert [float(graph.scalar) for graph in data.train_set.graphs] == [4.0, 7.5]
    assert [graph.n_atoms for graph in data.val_set.graphs] == [7]
    with pytest.raises(DataError, match="nothing to test"):
        data.setup("test")


def test_split_files_execute_nothing(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"train": Trap(), "valid": Trap()}, tmp_path / "split_dict.pt")
    with pytest.raises(DataError, match=r"split_dict\.pt is not"):
        split_indices(3, Split(file=str(tmp_path / "split_dict.pt")))
    assert not (tmp_path / "executed").exists()


def test_smiles_alone_have_a_hypergraph_and_no_geometry(pcqm: Path):
    structures = read(pcqm.with_name("data.csv.gz"))
    assert [len(atoms) for atoms in structures] == [9, 7, 3]
    assert "scalar" not in structures[2].info
    assert np.diff(structures[0].positions[:, 0]) == pytest.approx(NO_GEOMETRY)
    graph = HyperGraph(5.0)(structures)
    assert graph.n_edges == 0
    scalar = EquiHGNN(None, num_layers=1, hidden_channels=8)(graph)["energies"]
    assert scalar.shape == (19,)


def test_published_hypergraphs_reach_the_model(opv: Path):
    data = AtomisticDataModule(str(opv), labels=LabelKeys(scalar="gap"))
    data.use_builder(HyperGraph(5.0, perceive=False))
    data.setup("fit")
    assert data.train_set is not None
    batch = data.train_set.__getitems__([0, 1, 2])
    assert batch.scalar.tolist() == [3.0, 4.0, 5.0]
    assert (batch.num_hyperedges >= torch.tensor([9, 6, 2])).all()  # at least all bonds
    encoder = EGNN(5.0, num_layers=1, hidden_channels=8)
    target = known_target("gap")
    predictor = ScalarPredictor(EquiHGNN(encoder, num_layers=1, hidden_channels=8), target)
    assert predictor(batch)["scalar"].shape == (3,)


def test_bonds_without_sense_are_perceived_anew(tmp_path: Path, caplog):
    """Five bonds on a carbon: the coordinates still say what molecule it is."""
    lines = mol_block("CC=O").splitlines()
    first = next(k for k, line in enumerate(lines) if "V2000" in line) + 8
    lines[first] = lines[first][:6] + "  3" + lines[first][9:]
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["mol", "gap"], ["\n".join(lines) + "\n", 1.0]])
    with caplog.at_level("INFO", logger="atomeq"):
        (atoms,) = read(path)
    assert INFO_KEY not in atoms.info
    assert "perceived from the coordinates" in caplog.text
    assert int(HyperGraph(4.0)(atoms).num_hyperedges) > 0


def test_errors_name_file_and_molecule(pcqm: Path, tmp_path: Path):
    table = tmp_path / "bad.csv"
    table.write_text("smiles,gap\nC1CC,1.0\n")
    with pytest.raises(DataError, match=r"bad\.csv, row 0: RDKit cannot read"):
        read(table)
    table.write_text("name,gap\nmethane,1.0\n")
    with pytest.raises(DataError, match="neither a column 'smiles' nor 'mol'"):
        read(table)
    pcqm.with_name("data.csv.gz").unlink()
    with pytest.raises(DataError, match=r"no data\.csv\.gz"):
        read(pcqm)


def test_downloads_are_checked_and_the_table_is_taken_out(tmp_path: Path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    with zipfile.ZipFile(source / "set.zip", "w") as archive:
        archive.writestr("pcqm4m-v2/raw/data.csv.gz", b"table")
        archive.writestr("pcqm4m-v2/split_dict.pt", b"split")
    (source / "known.txt").write_bytes(b"abc")
    known = Archive("nowhere/1", "900150983cd24fb0d6963f7d28e17f72", "3 B", name="known.txt")
    toy = MoleculeSet("CC0", (Archive("nowhere/set.zip", None, "1 kB"), known))
    monkeypatch.setitem(molecule_download.MOLECULE_SETS, "toy", toy)
    folder = tmp_path / "data"
    first, second = download_molecules("toy", folder, source=source.as_uri())
    assert (folder / "toy" / "data.csv.gz").read_bytes() == b"table"
    assert (folder / "toy" / "split_dict.pt").read_bytes() == b"split"
    assert second.read_bytes() == b"abc"
    # The sum of the first download is kept, and holds later ones.
    first.write_bytes(b"something else")
    with pytest.raises(DataError, match="MD5 sum"):
        download_molecules("toy", folder, source=source.as_uri())


def test_published_sums_are_complete():
    for known in MOLECULE_SETS.values():
        for file in known.files:
            assert file.md5 is None or len(file.md5) == 32
            assert file.file_name
