"""A molecule's trajectory becomes pairs of frames: velocities, splits, bonds, refusals."""

import os
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet

from atomeq.data.ase_files import DataError
from atomeq.propagation.molecule import motion_of, read_motion
from atomeq.propagation.particles import ParticleView, formula

TIME_STEP = 0.5  # fs


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    """A copper trimer in its own motion, with momenta and forces."""
    atoms = Atoms("Cu3", [[0, 0, 0], [2.4, 0, 0], [1.1, 2.2, 0]], calculator=EMT())
    atoms.set_velocities(0.02 * np.random.default_rng(1).normal(size=(3, 3)))
    dynamics = VelocityVerlet(atoms, timestep=TIME_STEP * units.fs)
    found = []
    for k in range(40):
        frame = atoms.copy()
        frame.info["time_fs"] = TIME_STEP * k
        forces = atoms.get_forces()
        frame.calc = SinglePointCalculator(frame, forces=forces, energy=0.0)
        found.append(frame)
        dynamics.run(1)
    return found


def without(frames: list[Atoms], *, momenta: bool = False, forces: bool = False) -> list[Atoms]:
    copies = []
    for atoms in frames:
        copy = atoms.copy()
        copy.calc = None if forces else atoms.calc
        if momenta:
            del copy.arrays["momenta"]
        copies.append(copy)
    return copies


def test_velocities_of_a_file_are_angstrom_per_femtosecond(frames, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "md.extxyz", frames)
    motion = read_motion(tmp_path / "md.extxyz")
    assert (motion.source, motion.frame_time) == ("file", TIME_STEP)
    moved = (motion.pos[2] - motion.pos[0]) / (2 * TIME_STEP)
    np.testing.assert_allclose(motion.velocities[1], moved, atol=1e-4)


def test_velocities_follow_from_positions_and_with_forces_to_higher_order(frames) -> None:
    true = motion_of(frames, name="md").velocities
    with_forces = motion_of(without(frames, momenta=True), name="md")
    bare = motion_of(without(frames, momenta=True, forces=True), name="md")
    assert (with_forces.source, bare.source) == ("forces", "differences")
    assert len(bare.pos) == len(frames) - 1  # no frame follows the last
    # Velocity Verlet made them, and Δx/Δt - a Δt/2 is its own velocity.
    np.testing.assert_allclose(with_forces.velocities, true[:-1], atol=1e-12)
    assert (bare.velocities - true[:-1]).abs().max() > 1e-6


def test_windows_stay_in_their_stretch_and_are_spread_over_it(frames) -> None:
    motion = motion_of(frames, name="md")
    stride = motion.stride(2.0)
    assert stride == 4
    part = motion.windows(10, 30, stride, None)
    assert len(part.pos) == 16
    torch.testing.assert_close(part.pos[:, 1], motion.pos[14:30].float())
    few = motion.windows(10, 30, stride, 4)
    torch.testing.assert_close(few.pos[:, 0], motion.pos[[10, 15, 20, 25]].float())
    with pytest.raises(DataError, match="too short for its split"):
        motion.windows(10, 14, stride, None)
    with pytest.raises(ValueError, match="no multiple of the"):
        motion.stride(0.7)


def test_bonds_are_those_of_the_first_frame(frames) -> None:
    motion = motion_of(frames, name="md")
    assert motion.bonds(2.5) == ((0, 1), (0, 2))  # 2.40, 2.46 and 2.56 Å
    assert motion.bonds(2.6) == ((0, 1), (0, 2), (1, 2))
    with pytest.raises(DataError, match="atom 0 has no other atom within 1 Å"):
        motion.bonds(1.0)


def test_a_view_joins_bonded_atoms_both_ways(frames) -> None:
    view = ParticleView("molecule", 2.0, (29, 29, 6), ((0, 1), (1, 2)))
    source, target = view.pairs(3)
    assert target.tolist() == [0, 1, 1, 2]
    assert source.tolist() == [1, 2, 0, 1]
    pos, velocities = torch.randn(2, 4, 3, 3)
    numbers = torch.tensor([[29.0, 29.0, 6.0]]).expand(4, -1)
    nodes, edges = view.features(pos, velocities, numbers, view.pairs(3))
    torch.testing.assert_close(nodes[..., 0], velocities.norm(dim=-1))
    torch.testing.assert_close(nodes[0, :, 1], torch.tensor([1.0, 1.0, 6 / 29]))
    assert edges[0, 1, :4].tolist() == [29, 6, 1, 0]
    squared = ((pos[:, target] - pos[:, source]) ** 2).sum(-1)
    torch.testing.assert_close(edges[..., 4], squared)
    assert ParticleView.from_config(view.config()) == view


def shuffled(frames: list[Atoms]) -> list[Atoms]:
    chosen = np.random.default_rng(0).permutation(len(frames))
    return [without(frames, momenta=True)[k] for k in chosen]


def another_molecule(frames: list[Atoms]) -> list[Atoms]:
    return [*frames[:3], Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])]


def periodic(frames: list[Atoms]) -> list[Atoms]:
    copies = without(frames)
    for atoms in copies:
        atoms.set_cell(np.eye(3) * 20)
        atoms.pbc = True
    return copies


@pytest.mark.parametrize(
    ("change", "frame_time", "message"),
    [
        (shuffled, TIME_STEP, "in no order of time"),
        (shuffled, None, "not at equal distances in time"),
        (another_molecule, None, "frame 3 is not the molecule"),
        (periodic, None, "frame 0 is periodic"),
        (lambda frames: [Atoms("Cu2", [[0, 0, 0], [2, 0, 0]])] * 3, None, "give it, in fs"),
        (lambda frames: without(frames[:1], momenta=True), 1.0, "single frame"),
    ],
)
def test_what_is_no_trajectory_is_refused(
    frames, change: Callable[[list[Atoms]], list[Atoms]], frame_time: float | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        motion_of(change(frames), name="md", frame_time=frame_time)


@pytest.mark.skipif("ATOMEQ_DATA" not in os.environ, reason="ATOMEQ_DATA is not set")
def test_frames_of_rmd17_are_a_sample_and_no_trajectory() -> None:
    path = Path(os.environ["ATOMEQ_DATA"]) / "ethanol_rmd17_pbe" / "test_MD.extxyz.gz"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    with pytest.raises(DataError, match="in no order of time"):
        read_motion(path, frame_time=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "magnetic"}, "kind 'magnetic' is unknown"),
        ({"time": 0.0}, "must be > 0"),
        ({"kind": "molecule"}, "belong to molecules"),
        ({"atomic_numbers": (1, 1)}, "belong to molecules"),
        (
            {"kind": "molecule", "atomic_numbers": (1, 1), "bonds": ((0, 2),)},
            "pairs i < j of the 2 atoms",
        ),
    ],
)
def test_bad_views_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParticleView(**arguments)
    with pytest.raises(ValueError, match="no view of particles"):
        ParticleView.from_config({"colour": "red"})


def test_formula_keeps_the_order_of_atoms() -> None:
    assert formula((6, 6, 1, 1, 8, 1)) == "C2H2OH"
