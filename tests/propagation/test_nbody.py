"""The n-body simulations against a plain loop over pairs, and conserved quantities."""

from pathlib import Path

import numpy as np
import pytest
import torch

from atomeq.propagation.nbody import (
    SOFTENING,
    NBodyRecipe,
    Trajectories,
    load_nbody,
    run_gravity,
    simulate,
)
from atomeq.propagation.particles import fully_connected

CHAOS = 1e-9  # rounding, grown over some hundred steps


def forces_of(charges: np.ndarray, pos: np.ndarray) -> np.ndarray:
    forces = np.zeros_like(pos)
    for i in range(len(pos)):
        for j in range(len(pos)):
            if i != j:
                r = pos[i] - pos[j]
                forces[i] += charges[i] * charges[j] * r / np.linalg.norm(r) ** 3
    return np.clip(forces, -100, 100)


def slow_charged(rng: np.random.RandomState, frames: list[int]) -> tuple[np.ndarray, ...]:
    """One trajectory by semi-implicit Euler, step 1e-3; frame k is step 100 (k + 1)."""
    charges = rng.choice([-1.0, 0.0, 1.0], size=(5, 1), p=[0.5, 0, 0.5])[:, 0]
    pos = rng.randn(3, 5).T
    v = rng.randn(3, 5).T
    rng.randn(49, 3, 5), rng.randn(49, 3, 5)
    v = 0.5 * v / np.linalg.norm(v, axis=1, keepdims=True)
    kept = []
    v = v + 1e-3 * forces_of(charges, pos)
    for step in range(1, 100 * (max(frames) + 1) + 1):
        pos = pos + 1e-3 * v
        if step % 100 == 0 and step // 100 - 1 in frames:
            kept.append((pos, v))
        v = v + 1e-3 * forces_of(charges, pos)
    return charges, np.array([p for p, _ in kept]), np.array([w for _, w in kept])


def test_charged_trajectories_are_those_of_the_plain_loop() -> None:
    recipe = NBodyRecipe(num_train=2, num_val=1, num_test=1, seed=5, frames=(0, 2))
    parts = simulate(recipe)
    rng = np.random.RandomState(5)
    for name, count in recipe.counts().items():
        for k in range(count):
            charges, pos, velocities = slow_charged(rng, [0, 2])
            np.testing.assert_array_equal(parts[name].charges[k], charges)
            np.testing.assert_allclose(parts[name].pos[k], pos, rtol=0, atol=CHAOS)
            np.testing.assert_allclose(parts[name].velocities[k], velocities, rtol=0, atol=CHAOS)


def slow_gravity(rng: np.random.RandomState, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """One trajectory of five unit masses by leapfrog, step 1e-3; frame k is step 100 k."""
    pos, v = rng.randn(5, 3), rng.randn(5, 3)
    rng.randn(50, 5, 3), rng.randn(50, 5, 3), rng.randn(50, 5, 3)
    v = v - v.mean(axis=0)

    def acceleration(x: np.ndarray) -> np.ndarray:
        r = x[None] - x[:, None]  # from each to the others
        return (r / ((r**2).sum(-1, keepdims=True) + SOFTENING**2) ** 1.5).sum(axis=1)

    for _ in range(100 * frame):
        v = v + 0.5e-3 * acceleration(pos)
        pos = pos + 1e-3 * v
        v = v + 0.5e-3 * acceleration(pos)
    return pos, v


def test_gravity_trajectories_are_those_of_the_plain_loop() -> None:
    recipe = NBodyRecipe("gravity", num_train=2, num_val=1, num_test=0, seed=5, frames=(2,))
    parts = simulate(recipe)
    rng = np.random.RandomState(5)
    for part, k in ((parts["train"], 0), (parts["train"], 1), (parts["val"], 0)):
        pos, velocities = slow_gravity(rng, 2)
        np.testing.assert_allclose(part.pos[k, 0], pos, rtol=0, atol=CHAOS)
        np.testing.assert_allclose(part.velocities[k, 0], velocities, rtol=0, atol=CHAOS)


def energy_of(part: Trajectories, frame: int, *, softening: float, sign: float) -> torch.Tensor:
    pos, velocities = part.at(frame)
    first, second = torch.triu_indices(pos.shape[1], pos.shape[1], offset=1)
    r2 = ((pos[:, first] - pos[:, second]) ** 2).sum(-1) + softening**2
    q = part.charges
    potential = sign * (q[:, first] * q[:, second] / r2.sqrt()).sum(1)
    return potential + 0.5 * (velocities**2).sum((1, 2))


def test_charges_conserve_energy_where_none_come_close() -> None:
    recipe = NBodyRecipe(num_train=40, num_val=0, num_test=0, seed=1, frames=(0, 5, 10))
    part = simulate(recipe)["train"]
    energies = torch.stack([energy_of(part, f, softening=0.0, sign=1.0) for f in part.frames])
    drift = (energies - energies[0]).abs().max(dim=0).values
    # First order in the step; close pairs, whose forces are clipped, exceed it.
    assert drift.median() < 5e-3


def test_gravity_conserves_energy_momentum_and_angular_momentum() -> None:
    recipe = NBodyRecipe("gravity", num_train=20, num_val=0, num_test=0, seed=1)
    part = simulate(recipe)["train"]
    assert part.frames == (0, 10, 15, 20)
    energies = torch.stack(
        [energy_of(part, f, softening=SOFTENING, sign=-1.0) for f in part.frames]
    )
    assert (energies - energies[0]).abs().max() < 5e-2
    assert (energies - energies[0]).abs().median() < 1e-4
    assert part.velocities.sum(dim=2).abs().max() < 1e-11
    angular = torch.linalg.cross(part.pos, part.velocities, dim=-1).sum(dim=2)
    assert (angular - angular[:, :1]).abs().max() < 1e-10


def test_gravity_is_reversible_in_time() -> None:
    rng = np.random.RandomState(0)
    masses, pos, v = np.ones((3, 5)), rng.randn(3, 5, 3), rng.randn(3, 5, 3)
    there, speed = run_gravity(masses, pos, v, (2,))
    back, _ = run_gravity(masses, there[:, 0], -speed[:, 0], (2,))
    np.testing.assert_allclose(back[:, 0], pos, rtol=0, atol=CHAOS)


def test_sets_are_simulated_once_and_read_again(tmp_path: Path) -> None:
    recipe = NBodyRecipe(num_train=3, num_val=2, num_test=1, frames=(1, 0))
    first = load_nbody(recipe, tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = load_nbody(recipe, tmp_path)
    assert file.stat().st_mtime_ns == written
    for name, count in recipe.counts().items():
        assert first[name].pos.shape == (count, 2, 5, 3)
        assert first[name].frames == (0, 1)
        assert torch.equal(first[name].pos, again[name].pos)
    load_nbody(NBodyRecipe(num_train=3, num_val=2, num_test=1, frames=(1, 0), seed=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="system 'magnetic' is unknown"):
        simulate(NBodyRecipe("magnetic", frames=(1,)))  # pyright: ignore
    with pytest.raises(ValueError, match="nothing to simulate"):
        simulate(NBodyRecipe(n_bodies=1))
    part = simulate(NBodyRecipe(num_train=1, num_val=0, num_test=0, frames=(0,)))["train"]
    with pytest.raises(ValueError, match="frame 7 was not kept"):
        part.at(7)


def test_edges_join_all_pairs_within_a_system() -> None:
    source, target = fully_connected(2, 3)
    assert target.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert source.tolist() == [1, 2, 0, 2, 0, 1, 4, 5, 3, 5, 3, 4]
