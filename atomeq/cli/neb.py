"""``atomeq neb``: the path of least energy between two structures, and its barrier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.utils.forcecurve import fit_images
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.door import kept_path
from atomeq.cli.plots import plot_curve
from atomeq.cli.structures import structure_output
from atomeq.cli.terminal import Meter, say
from atomeq.cli.verbs import finish, prepare, stages
from atomeq.files import write_atomically
from atomeq.graph.files import read_structures
from atomeq.properties import elastic_band
from atomeq.properties.elastic_band import BatchedNEB, EnergyPath, interpolated, refuse_no_band
from atomeq.properties.relaxation import relaxed


def neb(options: Namespace) -> int:
    """Find the path."""
    calculator, frames = prepare(options, index=":")
    refuse_no_band(frames)
    saved = kept_path("neb", options.out)
    restarting = options.restart and saved.exists()
    images = read_structures(saved) if restarting else _band(frames, calculator, options)
    if restarting:
        refuse_no_band([frames[0], *images, frames[-1]])
    meter = Meter("neb", options.max_steps, unit="steps")

    def observe(band: BatchedNEB, n_steps: int) -> None:
        energies = np.asarray(band.energies)
        note = f"barrier {energies.max() - energies[0]:.3f} eV"
        meter.advance(n_steps - meter.done, note=note)
        if n_steps % options.interval == 0:
            _save(saved, band.images)

    with meter.running():
        path = elastic_band.neb(
            images,
            calculator,
            spring=options.spring,
            climb=not options.no_climb,
            optimizer=options.optimizer,
            fmax=options.fmax,
            max_steps=options.max_steps,
            observe=observe,
        )
    _save(saved, path.images)
    with structure_output(options.out) as output:
        for image in path.images:
            output.write(image)
    results = _results(path)
    finish("neb", options, calculator, results, [_draw(options, path)])
    if results["max_force_of_ends_eV_per_A"] > options.fmax:
        say("the ends are not relaxed, so the barrier counts from no minimum; see --relax-ends")
    if not path.converged:
        say(f"not converged in {options.max_steps} steps; go on with --restart")
    return 0 if path.converged else 1


def _band(frames: list[Atoms], calculator: AtomeqCalculator, options: Namespace) -> list[Atoms]:
    ends = [frames[0], frames[-1]]
    if options.relax_ends:
        budget = {"fmax": options.fmax, "max_steps": options.max_steps}
        with stages() as report:
            ends = relaxed(ends, calculator, cell=False, what="end", report=report, **budget)
    if len(frames) > 2:
        return [ends[0], *frames[1:-1], ends[1]]
    return interpolated(ends[0], ends[1], options.images, mic=not options.no_mic)


def _save(saved: Path, images: Sequence[Atoms]) -> None:
    with write_atomically(saved) as partial:
        ase.io.write(partial, [image.copy() for image in images], format="traj")


def _results(path: EnergyPath) -> dict[str, Any]:
    energies = path.energies
    ends = (path.images[0], path.images[-1])
    return {
        "steps": path.n_steps,
        "converged": path.converged,
        "batched_evaluations": path.n_evaluations,
        "formula": path.images[0].get_chemical_formula(),
        "n_images": len(path.images),
        "barrier_eV": path.barrier,
        "reverse_barrier_eV": float(energies.max() - energies[-1]),
        "reaction_energy_eV": float(energies[-1] - energies[0]),
        "saddle_image": int(energies.argmax()),
        "max_force_of_ends_eV_per_A": max(
            float(np.linalg.norm(end.get_forces(), axis=1).max()) for end in ends
        ),
        "path": {
            "length_A": path.lengths.tolist(),
            "energy_eV": (energies - energies[0]).tolist(),
        },
    }


def _draw(options: Namespace, path: EnergyPath) -> Path:
    fit = fit_images(path.images)
    return plot_curve(
        options.out,
        (fit.path, fit.energies),
        (fit.fit_path, fit.fit_energies),
        labels=("path / Å", "energy / eV"),
        title=f"barrier {path.barrier:.3f} eV",
    )
