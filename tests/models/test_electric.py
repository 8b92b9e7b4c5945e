"""Electric moments and polarizabilities: symmetry, origins, derivatives, refusals."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation
from small_models import SMALL_MODELS

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.models.base import AtomisticModel
from atomeq.models.charged import Charged
from atomeq.models.electric import Electric
from atomeq.potential.checkpoint import (
    build_model,
    load_potential,
    save_potential,
    scatter_weights,
)
from atomeq.potential.potential import ELECTRIC, Potential

#: Of features by degree, of scalars alone, and those that a frame turns.
NAMES = ["escn", "equiformer_v2", "equiformer_v3", "esen", "egnn", "segno", "mace", "nequip"]


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=1)
    return atoms


def made(name: str = "escn", wrap=lambda model: model, **options) -> Potential:
    node = SMALL_MODELS[name]
    if "lmax" in node["init_args"]:
        own = {"lmax": 2, "mmax": 2} if name == "escn" else {}
        node = {**node, "init_args": {**node["init_args"], **own}}
    options.setdefault("properties", ELECTRIC[:3])
    potential = Potential(Electric(wrap(build_model(node)), **options)).double()
    scatter_weights(potential)
    return potential.eval()


@pytest.mark.parametrize("name", NAMES)
def test_they_turn_with_the_structure_and_stay_where_it_moves(name: str) -> None:
    calculator = AtomeqCalculator(made(name))
    atoms = ethanol()
    turn = -Rotation.random(random_state=0).as_matrix()  # a mirror too: none is a pseudotensor
    moved = Atoms(atoms.numbers, atoms.positions @ turn.T + [1.0, 2.0, 3.0])
    before, after = calculator.evaluate([atoms, moved], ELECTRIC)
    assert np.abs(before["dipole"]).max() > 1e-3
    np.testing.assert_allclose(after["dipole"], turn @ before["dipole"], atol=1e-12)
    for key in ("quadrupole", "polarizability", "born_effective_charges"):
        assert np.abs(before[key]).max() > 1e-3, key
        np.testing.assert_allclose(after[key], turn @ before[key] @ turn.T, atol=1e-11)
    assert abs(np.trace(before["quadrupole"])) < 1e-12
    np.testing.assert_allclose(before["polarizability"], before["polarizability"].T, atol=1e-12)


def test_born_charges_are_derivatives_and_add_up_to_none() -> None:
    calculator = AtomeqCalculator(made())
    atoms = ethanol()
    charges = calculator.get_property("born_effective_charges", atoms)
    np.testing.assert_allclose(charges.sum(axis=0), 0, atol=1e-10)
    h = 1e-4
    for i, b in ((2, 1), (5, 0)):
        found = []
        for sign in (1, -1):
            near = atoms.copy()
            near.positions[i, b] += sign * h
            found.append(calculator.get_property("dipole", near))
        np.testing.assert_allclose((found[0] - found[1]) / (2 * h), charges[i, :, b], atol=1e-7)


def test_a_total_charge_is_shared_out_among_the_atoms() -> None:
    """What only the quadrupole sees, about the mean position: Q/N Σ r r, less its trace."""
    inner = Charged(build_model(SMALL_MODELS["egnn"]), multiplicities=())  # whose vectors are zero
    calculator = AtomeqCalculator(Potential(Electric(inner, properties=ELECTRIC[:2])).double())
    atoms, found = ethanol(), []
    for charge in (0, 1):
        atoms.info["charge"] = charge
        found.append(calculator.evaluate(atoms, ELECTRIC[:2])[0])
    r = atoms.positions - atoms.positions.mean(axis=0)
    second = r.T @ r / len(atoms)
    expected = second - np.trace(second) / 3 * np.eye(3)
    np.testing.assert_allclose(
        found[1]["quadrupole"] - found[0]["quadrupole"], expected, atol=1e-12
    )
    np.testing.assert_allclose(found[1]["dipole"], found[0]["dipole"], atol=1e-12)


def test_far_fragments_add_up_without_charges() -> None:
    """Of neutral fragments with charges the sum of each is shared out; without it is exact."""
    calculator = AtomeqCalculator(made(charges=False))
    one, two = molecule("H2O"), molecule("CH3OH")
    far = two.copy()
    far.positions += [30.0, 0, 0]
    apart = calculator.evaluate([one, two, one + far], ["dipole", "polarizability"])
    for key in ("dipole", "polarizability"):
        np.testing.assert_allclose(apart[0][key] + apart[1][key], apart[2][key], atol=1e-12)


def test_moments_of_a_crystal_are_refused_where_atoms_have_charges() -> None:
    with pytest.raises(ValueError, match=r"structure 0 .* periodic.* charges: false"):
        AtomeqCalculator(made()).get_property("dipole", bulk("Cu"))
    dipole = AtomeqCalculator(made(charges=False)).get_property("dipole", bulk("Cu"))
    np.testing.assert_allclose(dipole, 0, atol=1e-12)


def test_energies_stay_what_they_are_without_it() -> None:
    inner = build_model(SMALL_MODELS["escn"]).double()
    scatter_weights(inner)
    plain, electric = Potential(inner), Potential(Electric(inner).double())
    graph = plain.build_graph(ethanol())
    for key, value in plain(graph, ("energy", "forces")).items():
        torch.testing.assert_close(electric(graph, (key,))[key], value)


def test_one_made_for_moments_alone_gives_no_energy() -> None:
    calculator = AtomeqCalculator(made(energies=False))
    assert calculator.implemented_properties == list(ELECTRIC)
    assert calculator.get_property("dipole", ethanol()).shape == (3,)
    with pytest.raises(NotImplementedError):
        calculator.get_potential_energy(ethanol())
    with pytest.raises(ValueError, match="no energy and so no energy"):
        calculator.potential(calculator.potential.build_graph(ethanol()), ("energy",))


def test_a_model_without_moments_says_so() -> None:
    potential = Potential(build_model(SMALL_MODELS["egnn"]))
    with pytest.raises(ValueError, match=r"gives no dipole.*Electric\(model"):
        potential(potential.build_graph(ethanol()), ("dipole",))


def test_it_is_saved_and_loaded(tmp_path) -> None:
    potential = made("egnn")
    save_potential(potential, tmp_path / "p")
    loaded, graph = load_potential(tmp_path / "p"), potential.build_graph(ethanol())
    for key in ELECTRIC:
        torch.testing.assert_close(loaded(graph, (key,))[key], potential(graph, (key,))[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"properties": []}, "properties are of dipole"), ({"properties": ["mu"]}, "got .'mu'.")],
)
def test_unknown_properties_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Electric(build_model(SMALL_MODELS["egnn"]), **options)


def test_a_model_without_features_is_refused() -> None:
    class Bare(AtomisticModel):
        cutoff = 3.0

    with pytest.raises(NotImplementedError, match="node_features"):
        Electric(Bare())


@pytest.mark.parametrize("name", ["escn", "egnn"])
def test_the_network_is_run_once_where_nothing_else_is_wanted(name: str) -> None:
    potential, n_runs = made(name, energies=False), []
    embedding = potential.model.get_submodule("model.embedding")
    embedding.register_forward_hook(lambda *_: n_runs.append(1))
    potential(potential.build_graph(ethanol()), ("dipole", "born_effective_charges"))
    assert len(n_runs) == 1
