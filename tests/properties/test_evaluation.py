"""Errors on labels, and textbook properties of a crystal whose pairs can be counted."""

import json

import analytic_potentials
import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.optimize import minimize_scalar
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.cli.card import card_of
from atomeq.potential.checkpoint import save_potential
from atomeq.potential.uncertainty import calibrated
from atomeq.properties.evaluation import Evaluation
from atomeq.properties.reference_values import CrystalProperties, crystals_of
from atomeq.units import GPA

# So narrow a well that at rest the second neighbours of fcc are beyond the cutoff.
NEIGHBOURS = analytic_potentials.of(analytic_potentials.Pairs(3.4, width=6.0))
COPPER = {"name": "Cu", "crystalstructure": "fcc", "a": 3.6, "cubic": True}


def off_by(energy: float, force: float, *, kind: str, seed: int, stress: float = 0.0) -> Atoms:
    """A structure whose labels are off what the small potential gives by so much."""
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Al"
    atoms.rattle(0.05, seed=seed)
    results = AtomeqCalculator(small_potential()).evaluate([atoms], ["energy", "forces", "stress"])
    signs = np.where(atoms.numbers == 13, 2.0, -1.0)[:, None]
    labels = {
        "energy": results[0]["energy"] + 4 * energy,
        "forces": results[0]["forces"] + force * signs,
        "stress": results[0]["stress"] + stress * GPA,
    }
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info["config_type"] = kind
    return atoms


def test_errors_are_those_that_were_put_in():
    structures = [off_by(0.01, 0.1, kind="a", seed=0), off_by(-0.03, 0.1, kind="b", seed=1)]
    structures.append(off_by(0.03, 0.3, kind="b", seed=2, stress=2.0))
    del structures[0].calc.results["stress"]
    calculator = AtomeqCalculator(small_potential())
    found = Evaluation(structures, calculator, kind=lambda atoms: atoms.info["config_type"])
    assert found.n_structures == {"all": 3, "a": 1, "b": 2}
    errors = found.errors()
    assert errors["a"]["energy_meV_per_atom"]["mae"] == pytest.approx(10)
    assert errors["b"]["energy_meV_per_atom"]["rmse"] == pytest.approx(30)
    assert errors["all"]["energy_meV_per_atom"]["mae"] == pytest.approx(70 / 3)
    assert errors["b"]["forces_meV_per_A"]["mae"] == pytest.approx((100 + 300) / 2 * 5 / 4)
    assert errors["all"]["forces_meV_per_A"]["count"] == 36
    elements = found.by_element()
    assert elements["Al"]["mae"] == pytest.approx(2 * elements["Cu"]["mae"])
    assert found.coverage() == {}


def test_uncertainties_are_judged_by_what_they_hold():
    potential = small_potential()
    structures = [off_by(0.01 * k, 0.1 * (k % 3), kind="a", seed=k) for k in range(8)]
    batch = [potential.build_graph(structures)]
    potential.uncertainty, promised = calibrated(potential, batch, batch)
    found = Evaluation(structures, AtomeqCalculator(potential)).coverage()
    for name in ("energy_68", "energy_95", "forces_68", "forces_95"):
        assert found[name] == pytest.approx(promised[name], abs=0.05)
    assert found["atoms_beyond_training"] == 0


def test_a_kind_of_structures_has_a_coverage_of_its_own():
    potential = small_potential()
    known = [off_by(0.01 * (k % 3), 0.1 * (k % 3), kind="a", seed=k) for k in range(8)]
    batch = [potential.build_graph(known)]
    potential.uncertainty, _ = calibrated(potential, batch, batch)
    worse = [off_by(1.0, 10.0, kind="b", seed=k) for k in range(8)]
    evaluation = Evaluation(
        [*known, *worse], AtomeqCalculator(potential), kind=lambda atoms: atoms.info["config_type"]
    )
    every, a, b = (evaluation.coverage(kind) for kind in ("all", "a", "b"))
    assert a == pytest.approx(
        {
            k: v
            for k, v in Evaluation(known, AtomeqCalculator(potential)).coverage().items()
            if k in a
        }
    )
    assert b["forces_95"] < every["forces_95"] < a["forces_95"]
    assert b["energy_95"] == 0
    assert evaluation.coverage("c") == {}


def test_forces_that_symmetry_forbids_do_not_count_as_well_doubted():
    potential = small_potential()
    structures = [off_by(0.01 * k, 0.1 * (k % 3), kind="a", seed=k) for k in range(8)]
    batch = [potential.build_graph(structures)]
    potential.uncertainty, _ = calibrated(potential, batch, batch)
    calculator = AtomeqCalculator(potential)
    perfect = bulk("Cu", cubic=True)
    (found,) = calculator.evaluate([perfect], ["energy", "forces"])
    perfect.calc = SinglePointCalculator(perfect, energy=found["energy"], forces=np.zeros((4, 3)))
    one, other = (
        Evaluation(s, calculator).coverage() for s in (structures, [*structures, perfect])
    )
    assert other["forces_68"] == one["forces_68"]
    assert other["energy_68"] > one["energy_68"]


def test_structures_without_labels_are_refused():
    with pytest.raises(ValueError, match="no structure has a label"):
        Evaluation([bulk("Cu")], AtomeqCalculator(small_potential()))


def well() -> tuple[float, float]:
    """Return depth (eV) and distance (Å) of a pair at rest."""

    def energy(distance: float) -> float:
        pair = Atoms("Cu2", [[0, 0, 0], [0, 0, distance]])
        return AtomeqCalculator(NEIGHBOURS).evaluate([pair], ["energy"])[0]["energy"]

    rest = minimize_scalar(energy, bounds=(2.2, 2.8), method="bounded", options={"xatol": 1e-7})
    return -float(rest.fun), float(rest.x)


def test_properties_of_counted_pairs():
    names = ("lattice_constant_A", "cohesive_energy_eV", "vacancy_formation_energy_eV")
    names += ("surface_energy_111_J_per_m2", "surface_energy_100_J_per_m2", "dimer_core_eV")
    names += ("C12_GPa", "C44_GPa")
    references = {name: {} for name in names} | {"C11_GPa": {"value": 3.0, "source": "a book"}}
    document = {"crystal": COPPER, "references": references}
    found = CrystalProperties(document, AtomeqCalculator(NEIGHBOURS))()
    value = {name: node["value"] for name, node in found.items()}
    depth, bond = well()
    a = np.sqrt(2) * bond
    assert value["lattice_constant_A"] == pytest.approx(a, abs=1e-3)
    assert value["cohesive_energy_eV"] == pytest.approx(6 * depth, rel=1e-4)  # 12 halves of pairs
    assert value["vacancy_formation_energy_eV"] == pytest.approx(6 * depth, rel=1e-3)
    joule = 1.602176634e-19 * 1e20
    broken = {"111": 3 / (np.sqrt(3) / 4), "100": 4 / (1 / 2)}  # pairs, of an atom's area in a²
    for face, per_area in broken.items():
        expected = per_area / a**2 * depth / 2 * joule
        assert value[f"surface_energy_{face}_J_per_m2"] == pytest.approx(expected, rel=2e-3)
    assert value["C12_GPa"] == pytest.approx(value["C44_GPa"], rel=5e-3)  # Cauchy
    assert value["dimer_core_eV"] > 0
    assert found["C11_GPa"]["reference"] == 3.0
    assert found["C11_GPa"]["source"] == "a book"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"references": {}}, "need 'crystal'"),
        ({"crystal": COPPER, "references": {"hardness": {}}}, "no property 'hardness'"),
        (
            {"crystal": COPPER, "references": {"hcp_minus_crystal_meV_per_atom": {}}},
            "under 'others'",
        ),
        (
            {"crystal": COPPER, "references": {"C11_GPa": {"value": "170"}}},
            "is a number, not '170'",
        ),
        ({"crystal": {"name": "Cu", "lattice": 3}, "references": {}}, "ase.build.bulk refuses"),
        ({"crystal": "Cu", "references": {}}, "arguments of ase.build.bulk, not 'Cu'"),
    ],
)
def test_reference_files_with_faults_are_refused_before_anything_is_computed(document, message):
    with pytest.raises(ValueError, match=message):
        CrystalProperties(document, AtomeqCalculator(NEIGHBOURS))


def test_command_writes_tables_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_potential(small_potential(), "small")
    few = [off_by(0.01, 0.1, kind=kind, seed=seed) for seed, kind in enumerate("aab")]
    ase.io.write("few.extxyz", few)
    words = ["evaluate", "small", "few.extxyz", "--kind", "config_type", "--out", "out.json"]
    main(words)
    assert "Al" in capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["errors"]["b"]["energy_meV_per_atom"]["mae"] == pytest.approx(10, rel=1e-4)
    assert document["structures"] == {"all": 3, "a": 2, "b": 1}
    assert (tmp_path / "out.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(words)
    assert "overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "small", "--out", "other.json"])
    assert "nothing to evaluate" in capsys.readouterr().err


def test_calibration_counts_errors_within_sigma():
    potential = small_potential()
    structures = [off_by(0.01 * k, 0.1 * (k % 3), kind="a", seed=k) for k in range(8)]
    assert Evaluation(structures, AtomeqCalculator(potential)).calibration() == {}
    batch = [potential.build_graph(structures)]
    potential.uncertainty, promised = calibrated(potential, batch, batch)
    found = Evaluation(structures, AtomeqCalculator(potential)).calibration()
    assert found["promised"][1] == pytest.approx(0.6827, abs=1e-4)
    assert found["promised"][3] == pytest.approx(0.9545, abs=1e-4)
    assert found["forces"][1] == pytest.approx(promised["forces_68"], abs=0.05)
    assert found["forces"] == sorted(found["forces"])


def test_scans_are_compared_from_their_lowest_structure_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_potential(small_potential(), "small")
    path = [off_by(energy, 0.0, kind="a", seed=0) for energy in (0.0, 0.01, 0.03)]
    for k, atoms in enumerate(path):  # the same structure, so the predicted curve is flat
        atoms.calc.results["energy"] += 1.0 * (k == 1)
    ase.io.write("turn.extxyz", path)
    (tmp_path / "small" / "about.md").write_text("# small\n\nFor tests.\n")
    main(["evaluate", "small", "--scans", "turn.extxyz", "--out", "small/metrics.json", "--card"])
    found = json.loads((tmp_path / "small" / "metrics.json").read_text())["scans"]["turn"]
    assert found["labelled_eV"] == pytest.approx([0.0, 1.04, 0.12], abs=1e-5)
    assert found["predicted_eV"] == pytest.approx([0.0, 0.0, 0.0], abs=1e-5)
    assert found["range_labelled_eV"] == pytest.approx(1.04, abs=1e-5)
    assert (tmp_path / "small" / "scans.png").stat().st_size > 10_000
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| turn | 3 | 604.4 | 1040.0 | 0.0 |" in card
    assert "--scans turn.extxyz" in card
    unlabelled = bulk("Cu")
    ase.io.write("bare.extxyz", unlabelled)
    with pytest.raises(SystemExit):
        main(["evaluate", "small", "--scans", "bare.extxyz", "--out", "bare.json"])
    assert "one has none" in capsys.readouterr().err


def test_several_crystals_have_their_parts_by_name():
    one = {"crystal": COPPER, "references": {}}
    assert crystals_of(one) == {"": one}
    assert crystals_of({"crystals": {"Cu": one}}) == {"Cu": one}
    with pytest.raises(ValueError, match="parts by name"):
        crystals_of({"crystals": [one]})


def test_card_is_made_of_the_evaluation_of_an_experiments_test_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_potential(small_potential(), "small")
    offset = 2.0 * GPA
    few = [off_by(0.01, 0.1, kind="set=a", seed=seed, stress=2.0) for seed in range(3)]
    for atoms in few:  # a pressure alone, as of plane waves
        atoms.calc.results["stress"] = atoms.calc.results["stress"] * np.array([1, 1, 1, 0, 0, 0])
    ase.io.write("few.extxyz", few)
    (tmp_path / "configs").mkdir()
    split = {"train": [0], "val": [1], "test": [2]}
    (tmp_path / "configs" / "split.json").write_text(json.dumps(split))
    data = {"train": "../few.extxyz", "split": {"file": "split.json"}, "supercells": "reduce"}
    node = {"class_path": "atomeq.data.datamodule.AtomisticDataModule", "init_args": data}
    (tmp_path / "configs" / "small.yaml").write_text(
        yaml.safe_dump({"data": node, "model": {"stress_offset": offset}})
    )
    (tmp_path / "small" / "about.md").write_text("# small\n\nFor tests.\n\n## Failures\n\nAll.\n")
    words = ["evaluate", "small", "configs/small.yaml", "--out", "small/metrics.json", "--card"]
    main(words)
    document = json.loads((tmp_path / "small" / "metrics.json").read_text())
    assert document["structures"] == {"all": 1, "a": 1}
    assert document["errors"]["a"]["energy_meV_per_atom"]["mae"] == pytest.approx(10, rel=1e-3)
    card = (tmp_path / "small" / "README.md").read_text()
    assert card == card_of(tmp_path / "small")
    assert card.startswith("# small\n\nFor tests.")
    assert "| a | 1 | 10 (10) |" in card
    assert "## Failures\n\nAll." in card
    assert document["command"] in card
    with pytest.raises(SystemExit):
        main(["evaluate", "small", "small.yaml", "--out", "other.json", "--card"])
    assert "about.md" in capsys.readouterr().err
