"""``atomeq rollout``: a trained propagator carries particles on, long step after long step."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from atomeq.cli.door import output_format
from atomeq.cli.plots import Panel, plot_lines
from atomeq.cli.structures import structure_output, write_summary
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import settings
from atomeq.files import refuse_unwritable
from atomeq.potential.checkpoint import resolve_dtype, sha256
from atomeq.potential.folders import WEIGHTS_FILE
from atomeq.propagation.checkpoint import load_propagator
from atomeq.propagation.long_step import LongStep
from atomeq.propagation.recordings import Recording, read_recording, structures_of, write_systems
from atomeq.propagation.rollout import errors_of, roll_out


@dataclass(frozen=True)
class LoadedStep:
    """A propagator and where it came from."""

    step: LongStep
    provenance: dict[str, str | None]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return self.step.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.step.device


def rollout(options: Namespace) -> int:
    """Carry particles on, write them and tell how far they are from a reference."""
    _refuse_output(options.out)
    loaded = _load(options)
    start = read_recording(options.input, frame_time=options.frame_time).frame(options.frame)
    _refuse_others(loaded.step, start, options)
    reference = None
    if options.reference is not None:
        reference = read_recording(options.reference, frame_time=options.frame_time)
        _refuse_reference(reference, start, loaded.step.view.time, options)
    started = time.perf_counter()
    meter = Meter("rollout", options.steps, unit="long steps")
    with meter.running():
        rolled = roll_out(loaded.step, start, options.steps, observe=meter.advance)
    seconds = time.perf_counter() - started
    _write(options.out, rolled)
    errors = [] if reference is None else errors_of(rolled, reference, loaded.step.view.time)
    _report(options, loaded, rolled, errors, seconds)
    return 0


def _refuse_output(out: str) -> None:
    if Path(out).suffix == ".npz":
        refuse_unwritable(out)
    else:
        output_format(out)


def _load(options: Namespace) -> LoadedStep:
    dtype = resolve_dtype(options.dtype)
    step = load_propagator(options.propagator, device=options.device, dtype=dtype)
    folder = Path(options.propagator)
    provenance: dict[str, str | None] = {
        "name": options.propagator,
        "folder": str(folder.resolve()),
        "sha256": sha256(folder / WEIGHTS_FILE),
    }
    return LoadedStep(step, provenance)


def _refuse_others(step: LongStep, start: Recording, options: Namespace) -> None:
    """Refuse systems of another kind than the propagator's, and outputs that cannot hold them."""
    if start.kind != step.view.kind:
        raise ValueError(
            f"{options.input} holds {_NOUNS[start.kind]}, but {options.propagator} was trained on "
            f"{_NOUNS[step.view.kind]}"
        )
    if (Path(options.out).suffix == ".npz") == (start.kind == "molecule"):
        allowed = "OUT.extxyz or OUT.traj" if start.kind == "molecule" else "OUT.npz"
        raise ValueError(f"{_NOUNS[start.kind]} are written as {allowed}, not to {options.out}")
    step.view.refuse_others(start.numbers)


_NOUNS = {
    "charged": "systems of charges",
    "gravity": "systems of masses",
    "molecule": "the atoms of a molecule",
}


def _refuse_reference(
    reference: Recording, start: Recording, step_time: float, options: Namespace
) -> None:
    same = reference.kind == start.kind and reference.numbers.shape == start.numbers.shape
    if not same or not torch.equal(reference.numbers, start.numbers):
        raise ValueError(f"{options.reference} holds other particles than {options.input}")
    moments = [start.times[0] + k * step_time for k in range(1, options.steps + 1)]
    if all(reference.index_at(moment, step_time) is None for moment in moments):
        raise ValueError(
            f"{options.reference} has times {reference.times[0]:g} to {reference.times[-1]:g}, but "
            f"none that is a long step of {step_time:g} or more after {start.times[0]:g}"
        )


def _write(out: str, rolled: Recording) -> None:
    if rolled.kind != "molecule":
        write_systems(out, rolled)
        return
    with structure_output(out) as output:
        for atoms in structures_of(rolled):
            output.write(atoms)


def _report(
    options: Namespace,
    loaded: LoadedStep,
    rolled: Recording,
    errors: list[dict[str, float]],
    seconds: float,
) -> None:
    results: dict[str, Any] = {
        "n_systems": len(rolled.pos),
        "n_particles": rolled.pos.shape[2],
        "steps": options.steps,
        "step_time": loaded.step.view.time,
        "steps_per_second": options.steps / seconds,
        "velocities": "network" if loaded.step.propagator.gives_velocities else "trapezoidal rule",
        "errors": errors,
    }
    summary = write_summary(
        "rollout",
        options.out,
        source=options.input,
        calculator=loaded,
        settings=settings(options),
        results=results,
        role="propagator",
    )
    if errors:
        columns = ["step", "time", "position_mse", "velocity_mse", "static_position_mse"]
        show_table(
            ["long step", "time", "position MSE", "velocity MSE", "position MSE at rest"],
            [[f"{row[name]:.6g}" for name in columns] for row in errors],
        )
    say(f"wrote {options.out}, {_draw(options.out, rolled, errors)} and {summary}")


def _draw(out: str, rolled: Recording, errors: list[dict[str, float]]) -> Path:
    """Draw how far the particles came and, with a reference, how far they are from it."""
    moved = (rolled.pos - rolled.pos[:, :1]).square().sum(dim=-1).mean(dim=(0, 2)).sqrt()
    times = list(rolled.times)
    panels = [Panel("time", "root mean square displacement", [(times, moved.tolist())])]
    if errors:
        ours, still = (
            ([row["time"] for row in errors], [row[name] for row in errors])
            for name in ("position_mse", "static_position_mse")
        )
        panels.append(Panel("time", "position MSE; at rest above", [ours, still], log=True))
    return plot_lines(out, panels)
