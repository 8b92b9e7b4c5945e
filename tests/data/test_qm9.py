"""QM9 in each of its published forms gives the same molecules, in our units, without the excluded.

The files are made here in exactly those forms; the public sample of 100 molecules is read as well.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.build import molecule
from qm9 import EXCLUDED, NAMES, VALUES, raw_text, write_archive, write_excluded
from torch_geometric.data import Data, InMemoryDataset

from atomeq.data.ase_files import DataError, LabelKeys, read_structures
from atomeq.data.molecule_files import reader_of
from atomeq.data.qm9 import TARGET_NAMES, parse_raw, read_excluded
from atomeq.data.splits import Split, split_indices
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


ATOM_REFERENCES = {
    "U0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "U": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "H": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "G": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
    "Cv": (2.981,) * 5,
}


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


#: Of methane, gdb 1, in the raw file's units, and what one of them is here.
IN_OUR_UNITS = {
    **dict.fromkeys(("homo", "lumo", "gap", "zpve", "U0", "U", "H", "G"), ("eV", HARTREE)),
    "mu": ("D", 1.0),
    "alpha": ("bohr³", 1.0),
    "r2": ("bohr²", 1.0),
    "Cv": ("cal/mol/K", 1.0),
}


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_each_of_the_twelve_targets_has_its_unit(name: str):
    columns = METHANE.splitlines()[1].split()[2:]
    order = ["A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G"]
    raw = float(columns[[*order, "Cv"].index(name)])
    unit, factor = IN_OUR_UNITS[name]
    _, methane = parse_raw(METHANE, name="methane")
    assert TARGETS[name].unit == unit
    assert methane.info[name] == pytest.approx(raw * factor, rel=1e-12)


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_what_grows_with_the_molecule_is_summed(name: str):
    summed = name in ("alpha", "r2", "zpve", "U0", "U", "H", "G", "Cv")
    assert TARGETS[name].readout == ("sum" if summed else "mean")


@pytest.mark.parametrize(("name", "atoms"), ATOM_REFERENCES.items())
def test_references_are_those_of_the_published_atoms(name: str, atoms: tuple[float, ...]):
    """atomref.txt of QM9, in Hartree, H C N O F; the heat capacity is 3/2 R of a free atom."""
    factor = 1.0 if name == "Cv" else HARTREE
    found = [TARGETS[name].atoms[symbol] for symbol in "HCNOF"]
    np.testing.assert_allclose(found, np.array(atoms) * factor, rtol=1e-9)
    assert all(not TARGETS[other].atoms for other in TARGET_NAMES if other not in ATOM_REFERENCES)


def test_thermal_terms_of_the_free_atoms_are_those_of_an_ideal_gas():
    """U - U0 = 3/2 kT and H - U = kT at 298.15 K, to the digits of the file."""
    kt = 8.617333262e-5 * 298.15
    for symbol in "HCNOF":
        u0, u, h = (TARGETS[name].atoms[symbol] for name in ("U0", "U", "H"))
        assert u - u0 == pytest.approx(1.5 * kt, abs=1e-6 * HARTREE)
        assert h - u == pytest.approx(kt, abs=1e-6 * HARTREE)


@pytest.mark.parametrize("model", ["egnn", "faenet", "equihgnn", "equiformer_v2"])
def test_the_experiments_have_the_standard_split(model: str):
    """Of 133,885 molecules less 3,054: 110,000 to train, 10,000 to validate, the rest to test."""
    path = Path(__file__).parents[2] / "configs" / "experiment" / f"qm9_{model}.yaml"
    data = yaml.safe_load(path.read_text())["data"]
    if isinstance(data, str):
        data = yaml.safe_load((path.parent / data).read_text())
    split = data["init_args"]["split"]
    parts = split_indices(133_885 - 3_054, Split(**split))
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 110_000,
        "val": 10_000,
        "test": 10_831,
    }
    assert sorted(i for part in parts.values() for i in part) == list(range(130_831))


def test_unknown_targets_are_refused():
    with pytest.raises(DataError, match=r"no target 'gab'.*known are mu, alpha"):
        known_target("gab")
