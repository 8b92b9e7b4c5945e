"""``atomeq neb``: the path of least energy between two structures, and its barrier."""

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.mep.neb import NEB
from ase.optimize import BFGS, FIRE
from ase.utils.forcecurve import fit_images
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.elastic_band import BatchedNEB, path_lengths
from atomeq.cli.door import kept_path
from atomeq.cli.plots import plot_curve
from atomeq.cli.structures import structure_output, write_summary
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import prepare, relaxed, settings
from atomeq.files import write_atomically
from atomeq.graph.convert import StructureError
from atomeq.graph.files import read_structures

_OPTIMIZERS = {"fire": FIRE, "bfgs": BFGS}
_BEFORE_CLIMBING = 5.0  # times --fmax: a band that is nearly there knows which image is highest
_SAME = 1e-3  # Å, of cells that are the same


def neb(options: Namespace) -> int:
    """Find the path."""
    calculator, frames = prepare(options, index=":")
    _refuse_ends(options.input, frames)
    saved = kept_path("neb", options.out)
    restarting = options.restart and saved.exists()
    images = read_structures(saved) if restarting else _band(frames, calculator, options)
    if restarting:
        _refuse_ends(str(saved), [frames[0], *images, frames[-1]])
    meter = Meter("neb", options.max_steps, unit="steps")
    with meter.running():
        try:
            band, steps, converged = _optimize(images, calculator, options, meter, saved)
        except StructureError as error:
            raise ValueError(
                f"the band of {options.input} went astray: {error}; take more --images, or give a "
                "whole band to start from"
            ) from error
    with structure_output(options.out) as output:
        for image in band.images:
            output.write(image)
    results = {
        "steps": steps,
        "converged": converged,
        "batched_evaluations": band.n_evaluations,
        **_results(band),
    }
    return _finish(options, calculator, results, _draw(options, band), converged=converged)


def _refuse_ends(source: str, frames: list[Atoms]) -> None:
    if len(frames) < 2:
        raise ValueError(f"{source} holds one structure; a path needs its two ends")
    first = frames[0]
    for number, atoms in enumerate(frames[1:], start=1):
        if not np.array_equal(atoms.numbers, first.numbers):
            raise ValueError(
                f"{source}[0] is {first.symbols} and {source}[{number}] is {atoms.symbols}; the "
                "structures of a path hold the same atoms in the same order"
            )
        if not np.allclose(atoms.cell.array, first.cell.array, atol=_SAME):
            raise ValueError(
                f"{source}[0] and {source}[{number}] have different cells; a path keeps its cell"
            )
    if np.allclose(frames[0].positions, frames[-1].positions, atol=_SAME):
        raise ValueError(f"the first and the last structure of {source} are the same")


def _band(frames: list[Atoms], calculator: AtomeqCalculator, options: Namespace) -> list[Atoms]:
    ends = [frames[0], frames[-1]]
    if options.relax_ends:
        ends = relaxed(
            ends,
            calculator,
            fmax=options.fmax,
            max_steps=options.max_steps,
            cell=False,
            what=options.input,
        )
    if len(frames) > 2:
        return [ends[0], *frames[1:-1], ends[1]]
    images = [ends[0], *(ends[0].copy() for _ in range(options.images)), ends[1]]
    NEB(images, method="improvedtangent").interpolate(
        method="idpp", mic=bool(ends[0].pbc.any()) and not options.no_mic, apply_constraint=False
    )
    for image in images:
        image.calc = None  # the interpolation's own
    return images


def _optimize(
    images: list[Atoms],
    calculator: AtomeqCalculator,
    options: Namespace,
    meter: Meter,
    saved: Path,
) -> tuple[BatchedNEB, int, bool]:
    """Relax the band, at first without climbing; return it, its steps and whether it converged."""
    band = BatchedNEB(images, calculator, spring=options.spring)
    phases = [(False, options.fmax)]
    if not options.no_climb:
        phases = [(False, _BEFORE_CLIMBING * options.fmax), (True, options.fmax)]
    done, converged = 0, False
    for climb, fmax in phases:
        band.climb = climb
        optimizer = _OPTIMIZERS[options.optimizer](band, logfile=None)
        steps = 0
        for state in optimizer.irun(fmax=fmax, steps=options.max_steps - done):
            converged = bool(state)
            if optimizer.nsteps > steps:
                steps = optimizer.nsteps
                meter.advance(note=f"barrier {_barrier(band):.3f} eV")
            if (done + steps) % options.interval == 0:
                _save(saved, band)
        done += steps
    _save(saved, band)
    return band, done, converged


def _save(path: Path, band: BatchedNEB) -> None:
    with write_atomically(path) as partial:
        ase.io.write(partial, [image.copy() for image in band.images], format="traj")


def _barrier(band: BatchedNEB) -> float:
    energies = np.asarray(band.energies)
    return float(energies.max() - energies[0])


def _results(band: BatchedNEB) -> dict[str, Any]:
    energies = np.asarray(band.energies)
    ends = [
        float(np.linalg.norm(image.get_forces(), axis=1).max())
        for image in (band.images[0], band.images[-1])
    ]
    return {
        "formula": band.images[0].get_chemical_formula(),
        "n_images": len(band.images),
        "barrier_eV": float(energies.max() - energies[0]),
        "reverse_barrier_eV": float(energies.max() - energies[-1]),
        "reaction_energy_eV": float(energies[-1] - energies[0]),
        "saddle_image": int(energies.argmax()),
        "max_force_of_ends_eV_per_A": max(ends),
        "path": {
            "length_A": path_lengths(band.images).tolist(),
            "energy_eV": (energies - energies[0]).tolist(),
        },
    }


def _draw(options: Namespace, band: BatchedNEB) -> Path:
    fit = fit_images(band.images)
    return plot_curve(
        options.out,
        (fit.path, fit.energies),
        (fit.fit_path, fit.fit_energies),
        labels=("path / Å", "energy / eV"),
        title=f"barrier {_barrier(band):.3f} eV",
    )


def _finish(
    options: Namespace,
    calculator: AtomeqCalculator,
    results: dict[str, Any],
    picture: Path,
    *,
    converged: bool,
) -> int:
    summary = write_summary(
        "neb",
        options.out,
        source=options.input,
        calculator=calculator,
        settings=settings(options),
        results=results,
    )
    rows = [
        [key, f"{value:.6g}" if isinstance(value, float) else str(value)]
        for key, value in results.items()
        if key != "path"
    ]
    show_table(["quantity", "value"], rows)
    if results["max_force_of_ends_eV_per_A"] > options.fmax:
        say("the ends are not relaxed, so the barrier counts from no minimum; see --relax-ends")
    if not converged:
        say(f"not converged in {options.max_steps} steps; go on with --restart")
    say(f"wrote {options.out}, {picture} and {summary}")
    return 0 if converged else 1
