"""Sets whose sources are in forms of their own: their published layouts, with few structures."""

import hashlib
import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from atomeq.data import download as module
from atomeq.data.ase_files import DataError
from atomeq.data.download import DATA_SETS, content_digest, download
from atomeq.data.molecule_download import MOLECULE_SETS
from atomeq.data.oc20_download import ARCHIVES
from atomeq.data.source_files import convert_qm7, convert_snap
from atomeq.units import KCAL_PER_MOL, KILOBAR

KINDS = ("AIMD", "Elastic", "Surface", "Vacancy")
KBAR = [-17.2381, -17.43636, -2.2529, -0.23058, 0.5, 0.25]  # xx yy zz xy yz zx, as VASP prints


def entry(atoms: Atoms, energy: float) -> dict:
    """One structure as the source has it: pymatgen's dictionary and VASP's results."""
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "abc": abc.tolist(), "label": symbol}
        for symbol, abc in zip(atoms.symbols, atoms.get_scaled_positions(), strict=True)
    ]
    return {
        "_id": "59b4ba43ffc31d171c78afb8",
        "params": {"pp": {"Cu": "Cu_pv"}, "e_cut": 520},
        "group": "Cu",
        "tags": ["some"],
        "structure": {"lattice": {"matrix": atoms.cell.tolist()}, "sites": sites},
        "num_atoms": len(atoms),
        "outputs": {
            "energy": energy,
            "forces": np.arange(3.0 * len(atoms)).reshape(-1, 3).tolist(),
            "stress": KBAR,
        },
    }


@pytest.fixture
def snap(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for k, kind in enumerate(KINDS):
        cells = [bulk("Cu", cubic=True, a=3.6 + 0.01 * k + 0.001 * n) for n in range(2)]
        entries = [entry(atoms, -15.0 - k) for atoms in cells]
        (folder / f"{kind}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def qm7(tmp_path: Path) -> Path:
    """An archive of two molecules, one more without energy and one more energy without file."""
    path = tmp_path / "source" / "0123456789abcdef"
    path.parent.mkdir(exist_ok=True)
    files = {
        "hof_qm7.txt": "qm7/0001.xyz -417.031 -431.7\nqm7/0002.xyz -711.117 -7\nqm7/9.xyz 1 2\n"
    }
    for name, formula in {"0002": "C2H6", "0001": "CH4", "0003": "H2O"}.items():
        text = io.StringIO()
        ase.io.write(text, molecule(formula), format="xyz")
        files[f"qm7/{name}.xyz"] = text.getvalue()
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"tutorial-0123/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_snap_becomes_what_the_configuration_reads(tmp_path: Path, snap: Path):
    convert_snap([snap / f"{kind}.json" for kind in KINDS], tmp_path / "Cu.extxyz")
    frames = ase.io.read(tmp_path / "Cu.extxyz", index=":")
    assert [atoms.info["tag"] for atoms in frames[::2]] == [f"set={kind}" for kind in KINDS]
    expected = bulk("Cu", cubic=True, a=3.611)
    np.testing.assert_allclose(frames[3].positions, expected.positions, atol=1e-8)
    assert frames[3].pbc.all()
    assert frames[3].get_potential_energy() == -16.0
    np.testing.assert_array_equal(frames[3].get_forces()[1], [3.0, 4.0, 5.0])
    # A pressure of VASP's is a stress of the other sign in ASE; the shear is x y first.
    stress = frames[3].get_stress(voigt=False) / KILOBAR
    np.testing.assert_allclose(np.diag(stress), [17.2381, 17.43636, 2.2529], rtol=1e-12)
    np.testing.assert_allclose(stress[[0, 1, 0], [1, 2, 2]], [0.23058, -0.5, -0.25], rtol=1e-12)


def test_qm7_becomes_what_the_configuration_reads(tmp_path: Path, qm7: Path):
    convert_qm7([qm7], tmp_path / "qm7.extxyz")
    methane, ethane = ase.io.read(tmp_path / "qm7.extxyz", index=":")
    assert [methane.get_chemical_formula(), ethane.get_chemical_formula()] == ["CH4", "C2H6"]
    assert methane.get_potential_energy() == round(-417.031 * KCAL_PER_MOL, 6)
    np.testing.assert_allclose(ethane.positions, molecule("C2H6").positions, atol=1e-8)


@pytest.mark.parametrize("name", ["mvl_snap", "qm7"])
def test_downloads_are_converted_and_checked(tmp_path, monkeypatch, request, name: str):
    fixture = request.getfixturevalue("snap" if name == "mvl_snap" else "qm7")
    folder = fixture if name == "mvl_snap" else fixture.parent
    known = DATA_SETS[name]
    ((file, (there, _)),) = known.files.items()
    there = there if name == "mvl_snap" else fixture.name
    names = (there,) if isinstance(there, str) else there
    known.convert([folder / n for n in names], tmp_path / "expected.xyz")
    digest = content_digest(tmp_path / "expected.xyz", decimals=known.decimals)
    monkeypatch.setitem(module.DATA_SETS, name, replace(known, files={file: (there, digest)}))
    (path,) = download(name, tmp_path, source=folder.as_uri())
    assert path == tmp_path / name / file
    assert content_digest(path, decimals=known.decimals) == digest
    assert [one.name for one in path.parent.iterdir()] == [file]
    before = path.stat().st_mtime_ns
    download(name, tmp_path, source=folder.as_uri())  # it is there and right
    assert path.stat().st_mtime_ns == before
    path.unlink()
    wrong = replace(known, files={file: (there, hashlib.sha256().hexdigest())})
    monkeypatch.setitem(module.DATA_SETS, name, wrong)
    with pytest.raises(DataError, match="has SHA-256"):
        download(name, tmp_path, source=folder.as_uri())
    assert not list(path.parent.iterdir())


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "AIMD.json").write_text('[{"structure": {}}]')
    with pytest.raises(DataError, match=r"AIMD\.json is not a list of mvl_snap"):
        convert_snap([tmp_path / "AIMD.json"], tmp_path / "out.xyz")
    with pytest.raises(DataError, match="cannot be read as the archive of QM7"):
        convert_qm7([tmp_path / "AIMD.json"], tmp_path / "out.xyz")


def test_the_public_copper_is_the_published_one(tmp_path: Path, data_folder: Path):
    """With the right content in place nothing is fetched."""
    (tmp_path / "mvl_snap").mkdir()
    source = data_folder / "mvl_snap" / "Cu.extxyz.gz"
    (tmp_path / "mvl_snap" / "Cu.extxyz.gz").symlink_to(source)
    assert download("mvl_snap", tmp_path, source="file:///nonexistent")


RMD17 = {"ethanol_rmd17_pbe"}
#: Whose configuration says in its first lines where they are, or what makes them.
BY_HAND = {
    "rmd17": "figshare",
    "md22": "sgdml.org",
    "mlearn": "github.com",
    "gfn2_qm7": "label_gfn2",
    "gfn2_acac": "sample_gfn2",
    "gfn2_ethanol": "sample_gfn2",
    "high_pressure": "high_pressure_frames",
}


def test_every_set_that_a_configuration_names_can_be_downloaded():
    configs = Path(__file__).parents[2] / "configs"
    named = {
        re.split(r"[/.]", part)[0]
        for path in configs.rglob("*.yaml")
        for part in path.read_text().split("${ATOMEQ_DATA}/")[1:]
    }
    assert {
        "acac",
        "mattersim_benchmarks",
        "mvl_snap",
        "qm7",
        "qm9",
        "opv",
        "pcqm4mv2",
        "oc20",
        "3bpa",
        *RMD17,
        *BY_HAND,
    } == named
    assert named - {"oc20", *BY_HAND} <= {*DATA_SETS, *MOLECULE_SETS}
    for name, source in BY_HAND.items():
        head = (configs / "data" / f"{name}.yaml").read_text().partition("class_path")[0]
        assert source in head, name
    parts = ("is2re", "s2ef-2m", "s2ef-all", "s2ef-md", "s2ef-val-id", "s2ef-val-ood-ads")
    assert {f"oc20-{part}" for part in parts} <= set(ARCHIVES)
