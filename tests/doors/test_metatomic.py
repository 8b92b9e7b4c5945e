"""A metatomic model as engines use it; skipped where metatomic is not installed."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from small_potential import small_potential
from structures import RATTLED

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.metatomic import export_metatomic
from atomeq.cli import main
from atomeq.models.escn import ESCN
from atomeq.potential.checkpoint import save_potential, scatter_weights
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

NEEDED = "metatomic is not installed: pip install atomeq[metatomic]"
api = pytest.importorskip("metatomic.torch", reason=NEEDED)
Labels = pytest.importorskip("metatensor.torch", reason=NEEDED).Labels
metatomic_ase = pytest.importorskip("metatomic_ase", reason=NEEDED)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

ROUNDING = 1e-11  # eV, eV/Å, eV/Å³


def escn() -> Potential:
    torch.manual_seed(0)
    model = ESCN(cutoff=4.0, num_layers=1, sphere_channels=4, hidden_channels=4, edge_channels=4)
    references = AtomicReferences(dict.fromkeys((1, 6, 8, 12, 29), -10.0), scale=3.0)
    potential = Potential(model, references)
    scatter_weights(potential)
    return potential.double().eval()


@pytest.fixture(scope="module")
def potential() -> Potential:
    return escn()


@pytest.fixture(scope="module")
def path(potential: Potential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_metatomic(potential, tmp_path_factory.mktemp("metatomic") / "escn.pt")


def wire() -> Atoms:
    atoms = RATTLED["molecule"]()
    atoms.cell, atoms.pbc = np.diag([6.0, 0.0, 0.0]), (True, False, False)
    return atoms


@pytest.mark.parametrize("make", [*RATTLED.values(), wire])
def test_ases_door_of_metatomic_gives_what_ours_does(path, potential, make):
    atoms, reference = make(), make()
    atoms.calc = metatomic_ase.MetatomicCalculator(str(path), check_consistency=True)
    reference.calc = AtomeqCalculator(potential)
    assert atoms.get_potential_energy() == pytest.approx(
        reference.get_potential_energy(), abs=ROUNDING
    )
    for ask in (Atoms.get_potential_energies, Atoms.get_forces):
        np.testing.assert_allclose(ask(atoms), ask(reference), atol=ROUNDING, rtol=0)
    if atoms.pbc.all():
        np.testing.assert_allclose(
            atoms.get_stress(), reference.get_stress(), atol=ROUNDING, rtol=0
        )


def computed(
    model: Any,
    structures: Sequence[Atoms],
    *,
    kind: str = "system",
    selected: list[list[int]] | None = None,
    unit: str = "eV",
) -> Any:
    """The block of energies that an engine gets of these structures."""
    systems = api.systems_to_torch(structures, dtype=torch.float64)
    metatomic_ase._neighbors.AllNeighborsCalculator(model.requested_neighbor_lists()).compute(
        systems
    )
    labels = None
    if selected is not None:
        labels = Labels(["system", "atom"], torch.tensor(selected, dtype=torch.int32))
    options = api.ModelEvaluationOptions(
        length_unit="angstrom",
        outputs={"energy": api.ModelOutput(unit=unit, sample_kind=kind)},
        selected_atoms=labels,
    )
    return model(systems, options, check_consistency=True)["energy"].block()


def test_selected_atoms_of_several_systems(path, potential):
    structures = [RATTLED["crystal"](), RATTLED["molecule"]()]
    model = api.load_atomistic_model(str(path))
    energies = potential(potential.build_graph(structures), ("energies",))["energies"].detach()
    first = len(structures[0])
    chosen = [[0, 2], [0, 5], [1, 0]]
    of_chosen = energies[[2, 5, first]]
    block = computed(model, structures, kind="atom", selected=chosen)
    assert block.samples.values.tolist() == chosen
    torch.testing.assert_close(block.values[:, 0], of_chosen, atol=ROUNDING, rtol=0)
    totals = computed(model, structures, selected=chosen).values[:, 0]
    expected = torch.stack([of_chosen[:2].sum(), of_chosen[2]])
    torch.testing.assert_close(totals, expected, atol=ROUNDING, rtol=0)
    everything = computed(model, structures, kind="atom").values[:, 0]
    torch.testing.assert_close(everything, energies, atol=ROUNDING, rtol=0)


def test_a_part_with_the_atoms_that_its_range_names_has_its_energies(path, potential):
    """A domain of an engine that divides its box; a shell one cutoff thinner is not enough."""
    crystal = bulk("Cu", cubic=True, a=3.6).repeat(7)
    crystal.rattle(0.05, seed=0)
    model = api.load_atomistic_model(str(path))
    span = model.capabilities().interaction_range
    assert span == pytest.approx(2 * potential.cutoff)
    centre = int(np.argmin(np.linalg.norm(crystal.positions - crystal.cell.sum(0) / 2, axis=1)))
    distances = np.linalg.norm(crystal.positions - crystal.positions[centre], axis=1)
    energies = []
    for reach in (span + 0.1, span, span - potential.cutoff):
        part = crystal[distances <= reach]
        part.pbc = False
        mine = int(np.flatnonzero(np.flatnonzero(distances <= reach) == centre)[0])
        block = computed(model, [part], kind="atom", selected=[[0, mine]])
        energies.append(float(block.values[0, 0]))
    assert energies[1] == pytest.approx(energies[0], abs=ROUNDING)
    assert abs(energies[2] - energies[0]) > 1e-6


def test_units_are_the_engines_and_capabilities_say_what_it_is(path, potential):
    model = api.load_atomistic_model(str(path))
    capabilities = model.capabilities()
    assert sorted(capabilities.atomic_types) == list(potential.elements)
    assert (capabilities.dtype, capabilities.length_unit) == ("float64", "angstrom")
    assert model.metadata().extra["weights"] == potential.fingerprint()
    structures = [RATTLED["molecule"]()]
    in_ev, in_kj = (computed(model, structures, unit=unit).values for unit in ("eV", "kJ/mol"))
    torch.testing.assert_close(in_kj / in_ev, torch.full_like(in_ev, 96.485332), rtol=1e-7, atol=0)
    with pytest.raises(Exception, match="does not support the atomic type"):
        computed(model, [bulk("Fe")])


def test_an_engine_needs_nothing_of_this_package(path):
    code = f"""
import sys
sys.modules["atomeq"] = None
from ase.build import bulk
from metatomic_ase import MetatomicCalculator
atoms = bulk("Cu", cubic=True)
atoms.calc = MetatomicCalculator({str(path)!r})
print(atoms.get_forces().shape)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert run.stdout.split(b"\n")[-2:] == [b"(4, 3)", b""], run.stderr.decode()


def test_the_verb_writes_a_float32_network_whose_numbers_are_float64(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    potential = small_potential(torch.float32)
    save_potential(potential, "small")
    main(["export", "small", "--format", "metatomic", "--out", "small.pt"])
    assert "small.pt: energies of structures and atoms" in capsys.readouterr().out
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.05, seed=0)
    expected = potential(potential.build_graph(crystal), ("energy",))["energy"].detach()
    found = computed(api.load_atomistic_model("small.pt"), [crystal]).values[:, 0]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
