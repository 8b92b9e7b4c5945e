"""Uncertainties of potentials: their formula, their calibration, and the doors they come out of."""

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from small_potential import small_potential
from torch import nn

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import Langevin
from atomeq.dynamics.run import relax, simulate
from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.potential.checkpoint import load_potential, save_potential
from atomeq.potential.potential import Potential
from atomeq.potential.uncertainty import UNCERTAINTIES, calibrated


def labelled(seed: int, rattle: float = 0.05, *, forces: bool = True) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[seed % 3] = "Al"
    atoms.rattle(rattle * (1 + seed % 4), seed=seed)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy()}
    if forces:
        results["forces"] = atoms.get_forces()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


TRAINING = [labelled(k) for k in range(12)]
HELD_OUT = [labelled(100 + k) for k in range(12)]


@pytest.fixture(scope="module")
def known() -> Potential:
    potential = small_potential()
    parts = [[potential.build_graph(few)] for few in (TRAINING, HELD_OUT)]
    potential.uncertainty, _ = calibrated(potential, *parts)
    return potential


class Linear(AtomisticModel):
    """Energies that are linear in features which the graph brings along."""

    def __init__(self, cutoff: float = 3.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.map = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, graph: AtomGraph) -> dict:
        bend = 0.0 * graph.pos.sum(dim=1)
        return {"energies": self.map(graph["f"])[:, 0] + bend, "features": graph["f"]}


def atoms_with(features: torch.Tensor, energies: torch.Tensor | None = None) -> AtomGraph:
    """One atom a structure, with features and a label."""
    n = len(features)
    return AtomGraph(
        torch.zeros(n, 3, dtype=torch.float64),
        torch.full((n,), 29),
        natoms=torch.ones(n, dtype=torch.int64),
        f=features,
        energy=energies,
        forces=torch.randn(n, 3, dtype=torch.float64),
        edge_index=torch.zeros(2, 0, dtype=torch.int64),
        cell_offsets=torch.zeros(0, 3, dtype=torch.int64),
    )


def test_linear_regression_gets_the_variance_of_its_weights():
    """Of a linear model fitted to noisy labels the formula is exact: σ² = s² fᵀ (Σ f fᵀ)⁻¹ f."""
    torch.manual_seed(0)
    spread = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    train, held_out = (torch.randn(n, 3, dtype=torch.float64) * spread for n in (40, 40_000))
    potential = Potential(Linear())
    exact = torch.linalg.cholesky(torch.linalg.inv(train.T @ train))
    true = potential.model.map
    deviations = exact @ torch.randn(3, len(held_out), dtype=torch.float64)  # fits to other noise
    energies = (true(held_out)[:, 0] + (held_out * deviations.T).sum(dim=1)).detach()
    found, coverage = calibrated(potential, [atoms_with(train)], [atoms_with(held_out, energies)])
    sigma = found(held_out, atoms_with(held_out))["energy_uncertainty"]
    expected = (held_out @ exact).norm(dim=1)
    assert torch.allclose(sigma, expected, rtol=0.03)
    assert coverage["energy_68"] == pytest.approx(0.683, abs=0.001)
    assert coverage["energy_95"] == pytest.approx(0.954, abs=0.005)


def test_what_training_has_not_shown_is_less_certain(known):
    near = known.build_graph(TRAINING)
    far = bulk("Cu", a=2.6, cubic=True)
    inside = known(near, UNCERTAINTIES)
    outside = known(known.build_graph(far), UNCERTAINTIES)
    assert float(inside["extrapolation"].max()) == pytest.approx(1.0)
    assert float(outside["extrapolation"].min()) > 1
    assert float(outside["forces_uncertainty"].min()) > float(inside["forces_uncertainty"].max())
    assert float(outside["energy_uncertainty"]) > float(inside["energy_uncertainty"].max())


def test_in_a_batch_as_alone_and_after_saving(known, tmp_path):
    known(known.build_graph(HELD_OUT[0]))
    plain = known(known.build_graph(HELD_OUT), ("energy", "forces"))
    together = known(known.build_graph(HELD_OUT), ("energy", "forces", *UNCERTAINTIES))
    assert torch.equal(plain["energy"], together["energy"])
    loaded = load_potential(save_potential(known, tmp_path / "known"))
    alone = [loaded(loaded.build_graph(one), UNCERTAINTIES) for one in HELD_OUT]
    for name in UNCERTAINTIES:
        assert torch.allclose(torch.cat([one[name] for one in alone]), together[name], rtol=1e-9)
    assert loaded.to(torch.float32).uncertainty.energy.dtype == torch.float64
    assert load_potential(save_potential(small_potential(), tmp_path / "not")).uncertainty is None


def test_weights_without_calibration_are_refused_by_name(tmp_path):
    potential = small_potential()
    graph = potential.build_graph(TRAINING[0])
    with pytest.raises(ValueError, match="does not know its uncertainty; calibrate it"):
        potential(graph, ("energy", "forces_uncertainty"))
    with pytest.raises(ValueError, match="atomeq calibrate"):
        Evaluator(potential, max_uncertainty=0.1)
    with pytest.raises(PropertyNotImplementedError, match="atomeq calibrate"):
        AtomeqCalculator(potential).get_property("forces_uncertainty", TRAINING[0])


def test_labels_that_are_missing_are_passed_over_and_too_few_refused():
    potential = small_potential()
    training = [potential.build_graph(TRAINING)]
    some = [labelled(100 + k, forces=k % 2 == 0) for k in range(12)]
    found, _ = calibrated(potential, training, [potential.build_graph(some)])
    fewer, _ = calibrated(
        potential, training, [potential.build_graph(some), potential.build_graph(some[1::2])]
    )
    assert torch.equal(found.forces, fewer.forces)
    with pytest.raises(ValueError, match="2 held-out energies are too few"):
        calibrated(potential, training, [potential.build_graph(HELD_OUT[:2])])
    without = potential.build_graph(HELD_OUT).replace(energy=None)
    with pytest.raises(ValueError, match="0 held-out energies are too few"):
        calibrated(potential, training, [without])
    bare = [labelled(k, forces=False) for k in range(8)]
    with pytest.raises(ValueError, match="no forces to calibrate by"):
        calibrated(potential, training, [potential.build_graph(bare)])
    with pytest.raises(ValueError, match="training set is empty"):
        calibrated(potential, [], training)


def test_forces_that_symmetry_forbids_calibrate_nothing():
    """They are right whatever was learned: perfect crystals held out leave σ as it is."""
    potential = small_potential()
    training = [potential.build_graph(TRAINING)]
    perfect = bulk("Cu", cubic=True).repeat(2)
    perfect.calc = SinglePointCalculator(perfect, energy=0.0, forces=np.zeros((32, 3)))
    some = [potential.build_graph(HELD_OUT)]
    found, _ = calibrated(potential, training, some)
    more, _ = calibrated(potential, training, [*some, potential.build_graph([perfect])])
    assert torch.equal(found.forces, more.forces)
    with pytest.raises(ValueError, match="no forces to calibrate by"):
        calibrated(potential, training, [potential.build_graph([perfect] * 8)])


def test_model_without_features_is_refused():
    class Silent(Linear):
        def forward(self, graph: AtomGraph) -> dict:
            return {"energies": super().forward(graph)["energies"]}

    graph = atoms_with(torch.randn(8, 3, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    with pytest.raises(ValueError, match="Silent returns no features"):
        calibrated(Potential(Silent()), [graph], [graph])


def test_file_with_an_absurd_size_is_refused(known, tmp_path):
    import safetensors.torch
    import yaml

    from atomeq.potential.checkpoint import CheckpointError, sha256

    folder = save_potential(known, tmp_path / "known")
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    weights["uncertainty.forces"] = torch.zeros(2, 2, dtype=torch.float64)
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    document = yaml.safe_load((folder / "model.yaml").read_text())
    document["sha256"] = sha256(folder / "weights.safetensors")
    (folder / "model.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(CheckpointError, match=r"uncertainty\.forces"):
        load_potential(folder)


def test_calculator_gives_it(known):
    calculator = AtomeqCalculator(known)
    atoms = HELD_OUT[0].copy()
    atoms.calc = calculator
    expected = known(known.build_graph(atoms), UNCERTAINTIES)
    assert calculator.get_property("energy_uncertainty", atoms) == pytest.approx(
        float(expected["energy_uncertainty"])
    )
    of_forces = calculator.get_property("forces_uncertainty", atoms)
    assert np.allclose(of_forces, expected["forces_uncertainty"])
    (row,) = calculator.evaluate([atoms], ["energy", "forces", "forces_uncertainty"])
    assert np.allclose(row["forces_uncertainty"], of_forces)
    with pytest.raises(PropertyNotImplementedError, match="of a committee ask for energy_std"):
        AtomeqCalculator([known, known]).get_property("energy_uncertainty", atoms)


def test_dynamics_and_relaxation_stop_where_forces_are_uncertain(known):
    start = bulk("Cu", cubic=True)
    sure = float(known(known.build_graph(start), UNCERTAINTIES)["forces_uncertainty"].max())
    hot = Langevin(timestep=4.0, temperature=3000.0, friction_time=20.0)
    limited = Evaluator(known, max_uncertainty=1.02 * sure)
    (stopped,) = simulate([start], limited, hot, n_steps=200)
    assert stopped.status == "failed"
    assert "less certain than asked for" in stopped.reason
    assert 0 < stopped.n_steps < 200
    assert float(stopped.graph["forces_uncertainty"].max()) <= 1.02 * sure  # as it was before
    unlimited = Evaluator(known, max_uncertainty=float("inf"))
    (done,) = simulate([start], unlimited, hot, n_steps=stopped.n_steps + 1)
    assert done.status == "completed"
    assert float(done.graph["forces_uncertainty"].max()) > 1.02 * sure
    assert done.atoms.arrays["forces_uncertainty"].shape == (4,)
    (refused,) = relax([start], Evaluator(known, max_uncertainty=sure / 2), max_steps=3)
    assert refused.status == "failed"


def test_command_calibrates_and_single_point_tells(tmp_path, monkeypatch, capsys):
    from atomeq.cli import main

    monkeypatch.chdir(tmp_path)
    ase.io.write("train.extxyz", TRAINING)
    ase.io.write("held_out.extxyz", HELD_OUT)
    save_potential(small_potential(), "small", metadata={"from": "here"})
    (tmp_path / "small" / "README.md").write_text("its card")
    main(
        [
            "calibrate",
            "small",
            "--train",
            "train.extxyz",
            "--held-out",
            "held_out.extxyz",
            "--out",
            "sure",
        ]
    )
    assert "within" in capsys.readouterr().out
    assert (tmp_path / "sure" / "README.md").read_text() == "its card"
    main("single-point held_out.extxyz --potential sure --out out.extxyz".split())  # noqa: SIM905
    written = ase.io.read("out.extxyz", index=0)
    assert written.info["energy_uncertainty"] > 0
    assert (written.arrays["forces_uncertainty"] > 0).all()
    before = ase.io.read("out.extxyz", index=0).get_potential_energy()
    assert before == pytest.approx(
        float(small_potential()(small_potential().build_graph(HELD_OUT[0]))["energy"])
    )
