"""Matbench Discovery's kappa task on a sample in its format: numbers, file, and on again."""

import gzip
import importlib.util
import json

import ase.io
import numpy as np
import pytest
from analytic_potentials import Pairs, of
from ase import Atoms
from ase.build import bulk

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.matbench_kappa import (
    KappaSettings,
    has_imaginary_modes,
    predict_matbench_kappa,
    read_crystals,
)
from atomeq.properties.relaxation import relaxed
from atomeq.properties.thermal_conductivity import thermal_conductivity

SUM_RULE = 1e-9  # of a sum of float64
SAME = 1e-9  # of kappa, from the same structure; on so coarse a mesh 1e-6 Å may change it by 1 %
OPERATOR = 0.05  # of kappa: velocity operator and group velocities on a mesh of 5³
QUICK = KappaSettings(fmax=1e-5)

if importlib.util.find_spec("phono3py") is None:
    pytest.skip("phono3py is not installed (atomeq[kappa])", allow_module_level=True)


@pytest.fixture(scope="module")
def calculator() -> AtomeqCalculator:
    return AtomeqCalculator(of(Pairs()))


def asking(atoms: Atoms, identifier: str, repeats: int = 2, mesh: int = 5) -> Atoms:
    named = atoms.copy()
    named.info = {
        "material_id": identifier,
        "name": f"name of {identifier}",
        "fc2_supercell": repeats * np.eye(3, dtype=int),
        "fc3_supercell": repeats * np.eye(3, dtype=int),
        "q_point_mesh": [mesh] * 3,
    }
    return named


@pytest.fixture(scope="module")
def sample(calculator, tmp_path_factory):
    """Relaxed copper, which conducts, and a simple cubic crystal of pairs, which shears."""
    path = tmp_path_factory.mktemp("kappa") / "2024-11-09-phononDB-PBE-103-structures.extxyz"
    unstable = Atoms("Cu", cell=[2.5, 2.5, 2.5], pbc=True)
    (copper,) = relaxed([bulk("Cu", a=3.2)], calculator, cell=True, fmax=1e-6, max_steps=500)
    crystals = [asking(copper, "mp-1", repeats=3), asking(unstable, "mp-2")]
    ase.io.write(path, crystals, format="extxyz")
    return path


@pytest.fixture(scope="module")
def predicted(sample, calculator, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    found = predict_matbench_kappa(sample, calculator, out=out, settings=QUICK)
    return found, json.loads(gzip.decompress(found.file.read_bytes()))


def test_the_conductivity_is_that_of_the_verb_divided_into_modes(predicted, sample, calculator):
    found, (copper, _) = predicted
    assert (found.done, found.missing, found.unstable, found.failed) == (2, 0, 1, 0)
    alone = thermal_conductivity(
        read_crystals(sample)["mp-1"],
        calculator,
        supercell=(3, 3, 3),
        displacement=0.01,
        mesh=(5, 5, 5),
    )
    total, particles = (np.array(copper[f"kappa_{name}_rta"]) for name in ("tot", "p"))
    assert total.shape == (1, 3, 3)
    np.testing.assert_allclose(particles, alone.kappa, rtol=0, atol=OPERATOR * total.max())
    phonon3 = alone.phonon3
    phonon3.run_thermal_conductivity(
        temperatures=[300.0], is_isotope=True, transport_type="SMM19", boundary_mfp=1e6
    )
    wigner = phonon3.thermal_conductivity.kappa[0, 0, 0]
    np.testing.assert_allclose(total[0], wigner * np.eye(3), rtol=0, atol=SAME * wigner)
    modes, weights = np.array(copper["mode_kappa_tot_rta"]), np.array(copper["mode_weights"])
    assert modes.shape == (1, len(weights), 3, 3, 3)
    assert np.shape(copper["q_points"]) == (len(weights), 3)
    assert np.shape(copper["ph_freqs"]) == (len(weights), 3)
    assert weights.sum() == 5**3
    np.testing.assert_allclose(modes.sum(axis=(1, 2)) / 5**3, total, atol=SUM_RULE * total.max())
    parts = np.array(copper["kappa_p_rta"]) + copper["kappa_c"]
    np.testing.assert_allclose(parts, total, atol=SUM_RULE * total.max())


def test_rows_have_what_the_project_reads(predicted):
    found, (copper, unstable) = predicted
    assert found.file.name.endswith("-phonons-kappa-103.json.gz")
    assert (copper["material_id"], copper["formula"]) == ("mp-1", "name of mp-1")
    assert (copper["init_spg_num"], copper["final_spg_num"]) == (225, 225)
    assert copper["has_imag_ph_modes"] is False
    assert copper["n_steps"] == 0 < unstable["n_steps"] < 300
    assert np.abs(copper["max_stress"]).max() < 1e-5
    assert unstable["has_imag_ph_modes"] is True
    assert unstable["conductivity_skipped"] is True
    assert "kappa_tot_rta" not in unstable
    assert np.min(unstable["ph_freqs"]) < -1


def test_a_second_call_computes_nothing_and_writes_the_same(
    predicted, sample, calculator, monkeypatch
):
    def computing(*_, **__):
        raise AssertionError("computed again")

    before = predicted[0].file.read_bytes()
    monkeypatch.setattr("atomeq.properties.matbench_kappa.kappa_row", computing)
    out = predicted[0].file.parent
    again = predict_matbench_kappa(sample, calculator, out=out, settings=QUICK)
    assert again.file.read_bytes() == before
    with pytest.raises(ValueError, match="is of another settings"):
        predict_matbench_kappa(sample, calculator, out=out)
    other = AtomeqCalculator(of(Pairs(depth=0.5)))
    with pytest.raises(ValueError, match="is of another potential"):
        predict_matbench_kappa(sample, other, out=out, settings=QUICK)


def test_shards_and_failures_that_are_tried_again(tmp_path, calculator, monkeypatch):
    path = tmp_path / "crystals.extxyz"
    ase.io.write(path, [asking(bulk("Cu", a=3.2), f"mp-{k}", mesh=2) for k in range(2)])
    ask = {"out": tmp_path, "settings": QUICK}
    with monkeypatch.context() as patch:
        patch.setattr(AtomeqCalculator, "evaluate", lambda *_: 1 / 0)
        first = predict_matbench_kappa(path, calculator, shard=(0, 2), **ask)
    assert (first.done, first.missing, first.file) == (1, 1, None)
    second = predict_matbench_kappa(path, calculator, shard=(1, 2), **ask)
    assert (second.done, second.missing, second.failed) == (2, 0, 1)
    rows = json.loads(gzip.decompress(second.file.read_bytes()))
    assert [row["material_id"] for row in rows] == ["mp-0", "mp-1"]
    assert rows[0]["errors"][0].startswith("ForceConstantError: ZeroDivisionError")
    third = predict_matbench_kappa(path, calculator, retry=True, **ask)
    assert (third.failed, third.file) == (0, second.file)


def test_what_is_not_the_projects_is_refused(tmp_path, calculator):
    def refused(*structures, match):
        ase.io.write(tmp_path / "x.extxyz", structures)
        with pytest.raises(ValueError, match=match):
            read_crystals(tmp_path / "x.extxyz")

    whole = asking(bulk("Cu"), "mp-1")
    refused(whole, whole, match="mp-1 stands twice")
    for key in ("material_id", "fc3_supercell", "q_point_mesh"):
        part = whole.copy()
        del part.info[key]
        refused(part, match=f"structure 0 .* has no {key}")
    with pytest.raises(ValueError, match=r"shard must be"):
        predict_matbench_kappa("nothing", calculator, out=tmp_path, shard=(2, 2))


@pytest.mark.parametrize(
    ("gamma", "other", "expected"),
    [
        ([-0.005, 0, 0, 3], [1, 1, 1, 3], False),
        ([-0.02, 0, 0, 3], [1, 1, 1, 3], True),
        ([-0.005, 0, 0, 3], [-0.001, 1, 1, 3], True),
        ([np.nan, 0, 0, 3], [1, 1, 1, 3], True),
    ],
)
def test_imaginary_modes_are_told_as_the_project_tells_them(gamma, other, expected):
    assert has_imaginary_modes(np.array([gamma, other])) is expected
