"""SevenNet's checkpoints of all ages become potentials, published ones by their names."""

import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ase import Atoms
from safetensors.torch import load_file

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.graph.convert import element_symbols
from atomeq.potential import catalogue
from atomeq.potential.catalogue import InstallError, install_potential
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.convert import convert_checkpoint
from atomeq.potential.folders import CheckpointError
from atomeq.potential.import_sevennet import sevennet_potential
from atomeq.potential.official_names import OfficialError

GOLDEN = Path(__file__).parents[1] / "golden" / "sevennet"
FAKE = GOLDEN / "checkpoint_fake"
RESULTS = json.loads((FAKE / "results.json").read_text())
CASE = json.loads((GOLDEN / "sevennet_p1_mol_L2_xplor" / "case.json").read_text())
STATE = load_file(GOLDEN / "sevennet_p1_mol_L2_xplor" / "weights.safetensors")
MODAL = json.loads((GOLDEN / "sevennet_p4_batch_modal" / "case.json").read_text())
MODAL_STATE = load_file(GOLDEN / "sevennet_p4_batch_modal" / "weights.safetensors")
EXACT = 1e-10  # eV and eV/Å; the same float32 weights, computed in float64


def molecule() -> Atoms:
    inputs = load_file(GOLDEN / "sevennet_p1_mol_L2_xplor" / "inputs.safetensors")
    return Atoms(numbers=inputs["atomic_numbers"].numpy(), positions=inputs["pos"].double().numpy())


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_files_of_every_age_give_what_their_own_code_gives(name, tmp_path):
    folder = convert_checkpoint(FAKE / name, tmp_path / "converted")
    potential = load_potential(folder, dtype=torch.float64)
    found = potential(potential.build_graph([molecule()]), ("energy", "forces"))
    expected = RESULTS[name]
    assert abs(float(found["energy"]) - expected["energy"][0]) < EXACT
    assert (found["forces"] - torch.tensor(expected["forces"]).double()).abs().max() < 1e-6
    forces = torch.tensor(expected["forces"], dtype=torch.float64)
    assert (found["forces"] - forces).abs().max() < EXACT
    card = (folder / "README.md").read_text()
    assert name in card
    assert "no parity" in card


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("interaction_type", "mace"),
        ("optimize_by_reduce", False),
        ("radial_basis", {"radial_basis_name": "gaussian"}),
        ("cutoff_function", {"cutoff_function_name": "cosine"}),
        ("self_connection_type", "none"),
        ("channel", 9),
    ],
)
def test_options_that_are_not_known_are_refused(option, value):
    config = CASE["config"] | {option: value}
    if option == "channel":
        config["irreps_manual"] = ["9x0e", *config["irreps_manual"][1:]]
    with pytest.raises((OfficialError, RuntimeError)):
        sevennet_potential(config, STATE)


def test_a_modality_has_to_be_chosen_and_to_exist():
    for modal in (None, "lda"):
        with pytest.raises(OfficialError, match="r2scan, pbe"):
            sevennet_potential(MODAL["config"], MODAL_STATE, modal=modal)
    with pytest.raises(OfficialError, match="none"):
        sevennet_potential(CASE["config"], STATE, modal="pbe")


def test_a_coupling_that_is_none_is_refused():
    name = "1_convolution.convolution._compiled_main_left_right._w3j_1_1_1"
    with pytest.raises(OfficialError, match="SO"):
        sevennet_potential(CASE["config"], STATE | {name: torch.eye(9)[:3].view(3, 3, 3)})


def test_nothing_in_a_file_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "evil.pth"
    torch.save({"config": {"_type_map": {}}, "model_state_dict": Evil()}, path)
    with pytest.raises(OfficialError, match="system"):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def fake_wheel(path: Path, monkeypatch) -> Path:
    """Put an example checkpoint into a wheel that the catalogue takes for the published one."""
    member = FAKE / "fake_old_0_9_1.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(member, "sevenn/checkpoint.pth")

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = replace(
        catalogue.CATALOGUE["sevennet-0"],
        source=catalogue.Wheel("sevenn/checkpoint.pth", sha256=digest),
        sha256=hashlib.sha256(member.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "sevennet-0", entry)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ATOMEQ_POTENTIALS", str(tmp_path / "potentials"))
    return tmp_path / "potentials"


def test_an_installed_potential_is_known_by_its_name(root, tmp_path, monkeypatch, capsys):
    wheel = fake_wheel(tmp_path / "sevenn.whl", monkeypatch)
    with pytest.raises(CheckpointError, match="potentials list"):
        load_potential("sevennet-0")
    main(["potentials", "install", "sevennet-0", "--from", str(wheel)])
    assert "cite" in capsys.readouterr().out
    atoms = molecule()
    atoms.calc = AtomeqCalculator("sevennet-0", dtype="float64")
    assert atoms.get_potential_energy() == pytest.approx(RESULTS["fake_old_0_9_1.pth"]["energy"][0])
    main(["potentials", "list"])
    main(["potentials", "show", "sevennet-0"])
    shown = capsys.readouterr().out
    assert "installed" in shown
    assert "MIT" in shown
    with pytest.raises(FileExistsError, match="overwrite"):
        install_potential("sevennet-0", file=wheel)
    install_potential("sevennet-0", file=wheel, overwrite=True)
    assert [path.name for path in root.iterdir()] == ["sevennet-0"]


def test_a_repulsion_is_installed_under_a_name_of_its_own(root, tmp_path, monkeypatch):
    """Published numbers stay where distances are those of its data."""
    wheel = fake_wheel(tmp_path / "sevenn.whl", monkeypatch)
    main(["potentials", "install", "sevennet-0", "--from", str(wheel)])
    main(["potentials", "install", "sevennet-0", "--zbl", "--from", str(wheel)])
    card = (root / "sevennet-0-zbl" / "README.md").read_text()
    assert "ZBL) is added" in card
    assert "--zbl" in (root / "sevennet-0" / "README.md").read_text()
    near = molecule()
    near.positions *= 0.55
    published, repelled = (
        AtomeqCalculator(name, dtype="float64").evaluate([molecule(), near])
        for name in ("sevennet-0", "sevennet-0-zbl")
    )
    assert repelled[0]["energy"] == published[0]["energy"]
    assert repelled[1]["energy"] > published[1]["energy"] + 1.0


def test_a_card_names_what_is_refused(tmp_path):
    folder = convert_checkpoint(FAKE / "fake_new_0_13_0.pth", tmp_path / "converted")
    card = (folder / "README.md").read_text()
    elements = load_potential(folder).elements
    missing = next(z for z in range(1, 119) if z not in elements)
    assert f" {element_symbols(torch.tensor([missing]))[0]}," in card
    assert "are refused" in card


def test_a_wheel_with_other_content_installs_nothing(root, tmp_path, monkeypatch):
    wheel = fake_wheel(tmp_path / "sevenn.whl", monkeypatch)
    damaged = tmp_path / "damaged.whl"
    damaged.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(InstallError, match="SHA-256"):
        install_potential("sevennet-0", file=damaged)
    monkeypatch.setitem(
        catalogue.CATALOGUE,
        "sevennet-0",
        replace(catalogue.CATALOGUE["sevennet-0"], sha256="0" * 64),
    )
    with pytest.raises(InstallError, match="SHA-256"):
        install_potential("sevennet-0", file=wheel)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["install", "sevennet-1"], "sevennet-0"),
        (["install", "sevennet-mf-0"], "PBE, R2SCAN"),
        (["install", "sevennet-0", "--modal", "PBE"], "none"),
        (["install", "sevennet-0", "--from", "not-there.whl"], "not-there.whl"),
        (["install"], "NAME"),
    ],
)
def test_bad_words_are_one_line(words, named, root, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["potentials", *words])
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err


# The published weights themselves, where the wheel is at hand.
WHEEL = Path(os.environ.get("ATOMEQ_SEVENNET_WHEEL", "sevenn-0.13.0-py3-none-any.whl"))
REAL = json.loads((GOLDEN / "real_potentials.json").read_text())
PUBLISHED = {
    "7net-0": ("sevennet-0", None),
    "7net-0-22May2024": ("sevennet-0-22may2024", None),
    "7net-l3i5": ("sevennet-l3i5", None),
    "7net-mf-0:PBE": ("sevennet-mf-0", "PBE"),
    "7net-mf-0:R2SCAN": ("sevennet-mf-0", "R2SCAN"),
}


@pytest.mark.skipif(
    not WHEEL.is_file(), reason="ATOMEQ_SEVENNET_WHEEL does not name the wheel sevenn 0.13.0"
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_potentials_give_what_their_own_code_gives(name, root):
    known, modal = PUBLISHED[name]
    folder = install_potential(known, file=WHEEL, modal=modal)
    calculator = AtomeqCalculator(folder, dtype="float64")
    for structure in REAL["structures"].values():
        expected = structure["results"][name]
        atoms = Atoms(
            numbers=structure["numbers"],
            positions=structure["positions"],
            cell=structure["cell"],
            pbc=structure["pbc"],
        )
        atoms.calc = calculator
        assert abs(atoms.get_potential_energy() - expected["energy"]) < 1e-8
        assert abs(atoms.get_forces() - expected["forces"]).max() < 1e-8
        if expected.get("stress") is not None and all(atoms.pbc):
            assert abs(atoms.get_stress() - expected["stress"]).max() < 1e-8
