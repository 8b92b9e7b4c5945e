"""QM9 in each of its published forms gives the same molecules, in our units, without the excluded.

The files are made here in exactly those forms; the public sample of 100 molecules is read as well.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from qm9 import EXCLUDED, NAMES, VALUES, raw_text, write_archive, write_excluded
from torch_geometric.data import Data, InMemoryDataset

from atomeq.data.ase_files import DataError, LabelKeys, read_structures
from atomeq.data.molecule_files import reader_of
from atomeq.data.qm9 import TARGET_NAMES, parse_raw, read_excluded
from atomeq.data.targets import TARGETS, known_target
from atomeq.graph.hyperedges import INFO_KEY
from atomeq.units import HARTREE

pytest.importorskip("rdkit", reason="SDF files are read by RDKit, of the extra chemistry")

FLOAT32 = 1e-6  # relative: PyG's labels are float32

_METHANE = """5
@LABELS@
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 2.15041*^-3\t-0.0060313176\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 0.0002765748\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""
_LABELS = (
    "157.7118 157.70997 157.70699 0. 13.21 -0.3877 0.1171 0.5048 35.3641 0.044749 -40.47893 "
    "-40.476062 -40.475117 -40.498597 6.469"
)
METHANE = _METHANE.replace("@LABELS@", "gdb 1\t" + _LABELS.replace(" ", "\t") + "\t")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path)


@pytest.fixture
def sdf(tmp_path: Path) -> Path:
    from rdkit import Chem
    from rdkit.Geometry import Point3D

    from atomeq.graph.perception import molecule_from_coordinates

    blocks, table = [], ["mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv,u0_atom"]
    for k, name in enumerate(NAMES):
        atoms = molecule(name)
        mol = molecule_from_coordinates(atoms.numbers.tolist(), atoms.positions)
        conformer = Chem.Conformer(len(atoms))
        for i, position in enumerate(atoms.positions):
            conformer.SetAtomPosition(i, Point3D(*position))
        mol.AddConformer(conformer)
        mol.SetProp("_Name", f"gdb_{k + 1}")
        blocks.append(Chem.MolToMolBlock(mol) + "$$$$\n")
        table.append(f"gdb_{k + 1}," + ",".join(f"{x:.6f}" for x in VALUES[k]) + ",-1.0")
    (tmp_path / "gdb9.sdf").write_text("".join(blocks))
    (tmp_path / "gdb9.sdf.csv").write_text("\n".join(table) + "\n")
    write_excluded(tmp_path)
    return tmp_path / "gdb9.sdf"


def pyg_molecules() -> list[Data]:
    in_ev = {"homo", "lumo", "gap", "zpve", "U0", "U", "H", "G"}
    factors = [HARTREE if name in in_ev else 1.0 for name in TARGET_NAMES]
    kept = [k for k in range(len(NAMES)) if k + 1 != EXCLUDED]
    found = []
    for k in kept:
        atoms = molecule(NAMES[k])
        y = np.concatenate([VALUES[k, 3:] * factors, np.zeros(4), VALUES[k, :3]])
        found.append(
            Data(
                x=torch.zeros(len(atoms), 11),
                z=torch.tensor(atoms.numbers, dtype=torch.int64),
                pos=torch.tensor(atoms.positions, dtype=torch.float32),
                edge_index=torch.zeros(2, 0, dtype=torch.int64),
                y=torch.tensor(y, dtype=torch.float32)[None],
                name=f"gdb_{k + 1}",
                idx=k,
            )
        )
    return found


@pytest.fixture(params=["qm9_v3.pt", "data_v3.pt"])
def pyg(request, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if request.param == "qm9_v3.pt":
        torch.save([data.to_dict() for data in pyg_molecules()], path)
    else:
        InMemoryDataset.save(pyg_molecules(), str(path))
    return path


def read(path: Path, scalar: str = "U0"):
    return list(
        read_structures(path, labels=LabelKeys(scalar=scalar), reader=reader_of(path)),
    )


def check(path: Path, *, rtol: float = 1e-12) -> None:
    found = read(path)
    kept = [k for k in range(len(NAMES)) if k + 1 != EXCLUDED]
    assert [atoms.get_chemical_formula() for atoms in found] == [
        molecule(NAMES[k]).get_chemical_formula() for k in kept
    ]
    for atoms, k in zip(found, kept, strict=True):
        expected = dict(zip(TARGET_NAMES, VALUES[k, 3:], strict=True))
        assert atoms.info["scalar"] == pytest.approx(expected["U0"] * HARTREE, rel=rtol)
        assert atoms.info["gap"] == pytest.approx(expected["gap"] * HARTREE, rel=rtol)
        assert atoms.info["Cv"] == pytest.approx(expected["Cv"], rel=rtol)
        np.testing.assert_allclose(atoms.positions, molecule(NAMES[k]).positions, atol=1e-4)


def test_raw_archive(archive: Path):
    check(archive)


def test_sdf_and_table(sdf: Path):
    check(sdf)
    assert all(INFO_KEY in atoms.info for atoms in read(sdf))


def test_pyg(pyg: Path):
    check(pyg, rtol=FLOAT32)


def test_mathematica_wrote_some_of_the_numbers():
    number, atoms = parse_raw(METHANE, name="methane")
    assert number == 1
    assert atoms.positions[1, 0] == pytest.approx(2.15041e-3)
    assert atoms.info["U0"] == pytest.approx(-40.47893 * HARTREE)
    assert atoms.info["alpha"] == 13.21


def test_pyg_files_execute_nothing(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "data_v3.pt"
    torch.save(({"z": Trap()}, {}, Data), path)
    with pytest.raises(DataError, match="is not a file of PyG's QM9"):
        read(path)
    assert not (tmp_path / "executed").exists()


def test_errors_name_file_and_way_out(archive: Path, sdf: Path):
    text = raw_text(0)
    with pytest.raises(DataError, match="broken is not in the form of QM9"):
        parse_raw(text.replace("gdb 1", "gdb"), name="broken")
    listed = archive.with_name("uncharacterized.txt")
    listed.write_text(listed.read_text().replace("1 compounds", "2 compounds"))
    with pytest.raises(DataError, match="lists 1 molecules"):
        read_excluded(archive.parent)
    listed.unlink()
    with pytest.raises(DataError, match="atomeq data download qm9"):
        read(archive)
    write_excluded(archive.parent)
    table = sdf.with_name("gdb9.sdf.csv")
    table.write_text(table.read_text().replace("gdb_2", "gdb_9"))
    with pytest.raises(DataError, match=r"molecule 1 is 'gdb_2'.*'gdb_9'"):
        read(sdf)


def test_the_public_sample_has_all_targets(data_folder: Path):
    path = data_folder / "qm9" / "qm9_first100.extxyz.gz"
    found = read(path, "gap")
    assert len(found) == 100
    for name in TARGET_NAMES:
        assert all(np.isfinite(atoms.info.get(name, atoms.info["scalar"])) for atoms in found)
    # Its methane is that of the raw files, whose numbers are above.
    _, methane = parse_raw(METHANE, name="methane")
    first = read(path, "U0")[0]
    np.testing.assert_allclose(first.info["scalar"], methane.info["U0"], rtol=1e-9)
    assert read(path, "gap")[0].info["scalar"] == pytest.approx(methane.info["gap"], rel=1e-9)


def test_atomization_is_what_the_published_atoms_leave(data_folder: Path):
    """Bound molecules: every one lies below its published atoms, by a few eV per atom."""
    for name in ("U0", "U", "H", "G"):
        atoms = TARGETS[name].atoms
        for structure in read(data_folder / "qm9" / "qm9_first100.extxyz.gz", name):
            left = structure.info["scalar"] - sum(atoms[s] for s in structure.symbols)
            assert -7.0 < left / len(structure) < -1.5


def test_unknown_targets_are_refused():
    with pytest.raises(DataError, match=r"no target 'gab'.*known are mu, alpha"):
        known_target("gab")
