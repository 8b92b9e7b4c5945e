"""From direct to conservative: what is carried of a network with heads, and what its forces are."""

from pathlib import Path

import ase.io
import pytest
import torch
import yaml
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.esen import ESEN
from atomeq.potential.checkpoint import load_potential, save_potential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.training.normalisation import take_weights

SMALL = {
    "cutoff": 3.5, "lmax": 2, "mmax": 1, "num_layers": 1, "sphere_channels": 4, "edge_channels": 4,
}  # fmt: skip
ATTENTION = {
    "attn_hidden_channels": 4, "num_heads": 1, "attn_alpha_channels": 4, "attn_value_channels": 4,
    "ffn_hidden_channels": 4,
}  # fmt: skip
HEADS = {"direct_forces": True, "stress_head": "equivariant"}
DIRECT = {
    "ESEN": lambda: ESEN(**SMALL, hidden_channels=4, **HEADS),
    "EquiformerV2": lambda: EquiformerV2(**SMALL, **ATTENTION, direct_forces=True),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_data(calculator: AtomeqCalculator) -> None:
    structures = [molecule(name) for name in ("CH4", "H2O", "CH3OH", "H2CO") for _ in "abc"]
    for k, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=k)
        (results,) = calculator.evaluate([atoms])
        values = {"energy": results["energy"] + 0.3 * len(atoms), "forces": results["forces"]}
        atoms.calc = SinglePointCalculator(atoms, **values)
    ase.io.write("data.extxyz", structures)


def experiment(**model) -> list[str]:
    """Write one that keeps the weights, and return its words."""
    document = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0},
        "model": {
            "start_from": "small",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0}},
            "loss": {"energy": 1.0, "forces": 1.0},
            **model,
        },
        "data": {
            "class_path": "atomeq.data.datamodule.AtomisticDataModule",
            "init_args": {"train": "data.extxyz", "split": {"val": 4}, "max_structures": 4},
        },
    }
    Path("tune.yaml").write_text(yaml.safe_dump(document))
    return ["fit", "-c", "tune.yaml"]


def direct_potential(name: str, folder: Path) -> Potential:
    """A direct potential with the scales of its heads, as a published one has them."""
    model = DIRECT[name]()
    table = dict.fromkeys((1, 6, 8), -1.0)
    references = AtomicReferences(table, scale=2.0, force_scale=0.7, stress_scale=(0.1, 0.2))
    potential = Potential(model, references)
    save_potential(potential, folder)
    return potential


@pytest.mark.parametrize("name", DIRECT)
def test_direct_weights_are_carried_into_the_conservative_form(caplog, name):
    before = direct_potential(name, Path("small"))
    write_data(AtomeqCalculator(before))
    with caplog.at_level("INFO"):
        main(experiment(conservative=True))
    after = load_potential("runs/tune/potential")
    given, carried = before.model.state_dict(), after.model.state_dict()
    heads = {key for key in given if key.split(".")[0] in ("forces", "stress")}
    assert heads
    assert set(carried) == set(given) - heads
    assert all(torch.equal(carried[key], given[key]) for key in carried)  # the rate is zero
    kept, left = (sum(given[key].numel() for key in keys) for keys in (carried, heads))
    assert f"small: {kept:,} weights" in caplog.text
    assert f"left behind: {left:,} weights (forces" in caplog.text
    assert "new: nothing" in caplog.text
    # Forces are the derivative of the energy, not in the scale of the head that stayed behind.
    assert after.conservative
    assert not after.references.rescales_derivatives
    atoms, step = molecule("CH3OH"), 1e-4
    calculator = AtomeqCalculator(after, dtype="float64")
    moved = [atoms.copy(), atoms.copy()]
    for sign, one in zip((1, -1), moved, strict=True):
        one.positions[0, 0] += sign * step
    up, down = (one["energy"] for one in calculator.evaluate(moved, ("energy",)))
    (found,) = calculator.evaluate([atoms], ("forces",))
    assert found["forces"][0, 0] == pytest.approx(-(up - down) / (2 * step), rel=1e-5)


def test_a_head_that_is_added_is_new_and_told(caplog):
    start, target = Potential(ESEN(**SMALL, hidden_channels=4)), Potential(DIRECT["ESEN"]())
    own = {key: weight.clone() for key, weight in target.model.state_dict().items()}
    with caplog.at_level("INFO"):
        take_weights(target, start)
    for key, weight in target.model.state_dict().items():
        is_head = key.split(".")[0] in ("forces", "stress")
        assert torch.equal(weight, own[key] if is_head else start.model.state_dict()[key])
    assert "left behind: nothing; new: " in caplog.text
    assert "(forces, stress)" in caplog.text


def test_moved_references_keep_the_scales_of_heads():
    before = direct_potential("ESEN", Path("small"))
    write_data(AtomeqCalculator(before))
    main(experiment())
    after = load_potential("runs/tune/potential").references
    assert float(after.force_scale) == 0.7
    torch.testing.assert_close(after.stress_scale, before.references.stress_scale)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, "is conservative already"),
        (
            {"start_from": None, "model": {"class_path": "atomeq.models.esen.ESEN"}},
            "leave model out",
        ),
    ],
)
def test_what_has_no_conservative_form_is_refused(capsys, model, said):
    plain = Potential(ESEN(**SMALL, hidden_channels=4), AtomicReferences({1: 0, 6: 0, 8: 0}))
    save_potential(plain, Path("small"))
    write_data(AtomeqCalculator(plain))
    with pytest.raises(SystemExit) as exit_:
        main(experiment(conservative=True, **model))
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
