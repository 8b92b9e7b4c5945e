"""What ships under potentials/: small, described by its evaluation, sane where nothing was seen."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.card import card_of
from atomeq.cli.data_stats import data_module
from atomeq.data.ase_files import read_structures
from atomeq.data.copies import RADIUS, fingerprint, groups_of_copies, kind_of
from atomeq.graph.builders import RadiusGraph
from atomeq.potential.folders import find_potential, shipped_potentials
from atomeq.properties.evaluation import Evaluation, scan
from atomeq.properties.reference_values import crystals_of

ROOT = Path(__file__).resolve().parents[2]
MAX_WEIGHTS = 5_000_000  # bytes
#: eV over the free atoms; chemistry ends long before 6 Å
FREE = 0.15
# Torn apart a crystal climbs to free atoms; its curve may ripple by so much, eV per atom.
RIPPLE = 0.1
CRYSTALS = [n for n in shipped_potentials() if (find_potential(n) / "references.yaml").is_file()]


@pytest.mark.parametrize("name", shipped_potentials())
def test_card_is_made_of_what_lies_in_the_folder(name: str):
    folder = find_potential(name)
    assert (folder / "README.md").read_text(encoding="utf-8") == card_of(folder)
    weights = (folder / "weights.safetensors").read_bytes()
    assert len(weights) <= MAX_WEIGHTS
    document = yaml.safe_load((folder / "model.yaml").read_text())
    assert document["sha256"] == hashlib.sha256(weights).hexdigest()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["potential"]["sha256"] == document["sha256"]


@pytest.mark.parametrize("name", shipped_potentials())
def test_table_of_the_documentation_says_what_the_card_says(name: str):
    folder = find_potential(name)
    metrics, speed = (
        json.loads((folder / f"{of}.json").read_text()) for of in ("metrics", "speed")
    )
    largest = max(speed["rows"], key=lambda row: row["atoms"] * row["structures"])
    errors = [
        metrics["errors"]["all"][of]["mae"] for of in ("energy_meV_per_atom", "forces_meV_per_A")
    ]
    told = [str(metrics["structures"]["all"]), *(f"{mae:.3g}" for mae in errors)]
    lines = (ROOT / "docs" / "potentials.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| [{name}](../potentials/{name}/"))
    assert row.split(" | ")[2:] == [*told, f"{largest['us_per_atom']:.0f} |"]


@pytest.mark.parametrize("name", CRYSTALS)
def test_atoms_that_part_end_as_free_atoms(name: str):
    document = yaml.safe_load((find_potential(name) / "references.yaml").read_text())
    for part in crystals_of(document).values():
        cohesive = part["references"]["cohesive_energy_eV"]["value"]
        part_with(AtomeqCalculator(name, dtype="float64"), part["crystal"], cohesive)


def part_with(calculator: AtomeqCalculator, crystal: dict, cohesive: float) -> None:
    symbol = crystal["name"]

    def energy(atoms: Atoms) -> float:
        return calculator.evaluate([atoms], ["energy"])[0]["energy"] / len(atoms)

    free = energy(Atoms(symbol))
    distances = np.arange(0.5, 6.01, 0.1)
    dimers = np.array([energy(Atoms([symbol] * 2, [[0, 0, 0], [0, 0, d]])) for d in distances])
    bound = 2 * (dimers - free)
    assert bound.min() > -cohesive  # two atoms hold each other less than a crystal does
    assert bound[distances < 1.25].min() > bound[np.isclose(distances, 2.2)].item()
    assert abs(bound[-1]) < FREE
    stretches = np.arange(1.0, 2.3, 0.05)
    torn = np.array([energy(bulk(**crystal | {"a": s * crystal["a"]})) for s in stretches]) - free
    assert (np.diff(torn) > -RIPPLE).all()
    assert abs(torn[-1]) < FREE


def test_no_validation_structure_is_a_copy_of_one_trained_on(data_folder: Path):
    sets = data_module(ROOT / "configs" / "data" / "cu_published.yaml").structures()
    build, kinds, prints = RadiusGraph(RADIUS), [], []
    for atoms in (*sets["val"], *sets["train"]):
        graph = build(atoms)
        kinds.append(kind_of(graph))
        prints.append(fingerprint(graph))
    groups, n_val = groups_of_copies(kinds, prints), len(sets["val"])
    assert set(groups[:n_val]).isdisjoint(groups[n_val:])
    assert len(sets["test/held_out"]) == 31


@pytest.mark.parametrize("name", CRYSTALS)
def test_errors_of_the_card_are_those_of_today(
    name: str, data_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ELEMENT", name.partition("-")[0].capitalize())
    folder = find_potential(name)
    metrics = json.loads((folder / "metrics.json").read_text())
    data = data_module(ROOT / metrics["files"][0])
    data.reduce_supercells = False
    # The kind with the fewest structures, for it costs least.
    kind = min(metrics["structures"], key=metrics["structures"].__getitem__)
    chosen = [a for a in data.structures()["test/held_out"] if a.info["tag"].endswith(kind)]
    found = Evaluation(chosen, AtomeqCalculator(folder)).errors()["all"]
    for quantity in ("energy_meV_per_atom", "forces_meV_per_A"):
        told = metrics["errors"][kind][quantity]["mae"]
        assert found[quantity]["mae"] == pytest.approx(told, rel=1e-2)


@pytest.mark.parametrize("name", shipped_potentials())
def test_scans_of_the_card_are_those_of_today(name: str, data_folder: Path):
    folder = find_potential(name)
    metrics = json.loads((folder / "metrics.json").read_text())
    if "scans" not in metrics:
        pytest.skip(f"the card of {name} tells of no path")
    words = metrics["command"].partition("--scans ")[2].split()
    for file in words[: len(metrics["scans"])]:
        found = scan(list(read_structures(file)), AtomeqCalculator(folder))
        told = metrics["scans"][Path(file).name.partition(".")[0]]
        assert found["rmse_eV"] == pytest.approx(told["rmse_eV"], rel=1e-2)
