"""What verbs with a potential share: options, loading, relaxing and evaluating structures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator, has_volume
from atomeq.cli.restart import Journal
from atomeq.cli.structures import structure_output
from atomeq.cli.terminal import Meter
from atomeq.dynamics.in_flight import Outcome
from atomeq.dynamics.run import relax
from atomeq.graph.convert import validate_structure
from atomeq.graph.files import read_structures

_CHUNK = 8  # structures between two reports of progress, and what a kill may cost of them


def prepare(options: Namespace, *, index: str) -> tuple[AtomeqCalculator, list[Atoms]]:
    """Read the structures, load the potential and refuse what it cannot compute."""
    structures = read_structures(options.input, index=index)
    calculator = AtomeqCalculator(options.potential, device=options.device, dtype=options.dtype)
    for number, atoms in enumerate(structures):
        validate_structure(
            atoms, name=f"{options.input}[{number}]", known_elements=calculator.elements
        )
    return calculator, structures


def prepare_crystal(verb: str, options: Namespace) -> tuple[AtomeqCalculator, Atoms]:
    """Read the last structure of a file for a verb that needs a volume and its stress."""
    calculator, structures = prepare(options, index="-1:")
    atoms = structures[-1]
    if not has_volume(atoms):
        raise ValueError(
            f"{verb} needs a crystal: {options.input} is not periodic in three directions (pbc "
            f"{atoms.pbc.tolist()}) or has no volume; give it a cell"
        )
    if "stress" not in calculator.implemented_properties:
        raise ValueError(
            f"{verb} needs a stress, and {options.potential} has a force head, whose forces are no "
            "derivative of an energy; take a conservative potential"
        )
    if atoms.constraints:
        raise ValueError(
            f"{verb} moves every atom and the cell, but {options.input} has fixed atoms; free them"
        )
    return calculator, atoms


def settings(options: Namespace) -> dict[str, Any]:
    """Return the options of a run as a summary tells them."""
    hidden = ("input", "out", "overwrite")
    return {key: value for key, value in options.as_dict().items() if key not in hidden}


def relaxed(
    structures: Sequence[Atoms],
    calculator: AtomeqCalculator,
    *,
    fmax: float,
    max_steps: int,
    cell: bool,
    what: str,
) -> list[Atoms]:
    """Relax structures together; return them in the same order, without calculators.

    Args:
        structures: What to relax.
        calculator: Its potential is used.
        fmax: Largest force left, eV/Å.
        max_steps: Steps after which one has failed.
        cell: Relax the cells as well.
        what: Names them in the error.

    Raises:
        ValueError: A structure does not relax.
    """
    outcomes: dict[int, Outcome] = {}
    meter = Meter(f"relaxing {what}", len(structures), unit="structures")
    with meter.running():
        for outcome in relax(
            structures, calculator.potential, cell=cell, fmax=fmax, max_steps=max_steps
        ):
            outcomes[outcome.index] = outcome
            meter.advance()
    found = []
    for index, start in enumerate(structures):
        outcome = outcomes[index]
        if outcome.atoms is None or not outcome.converged:
            reason = outcome.reason or f"largest force above {fmax:g} eV/Å after {max_steps} steps"
            raise ValueError(
                f"{what} {index} does not relax: {reason}; raise --max-steps or --fmax, or keep "
                "the structure as it is with --no-relax"
            )
        end = start.copy()
        end.set_cell(outcome.atoms.cell)
        end.positions = outcome.atoms.positions
        found.append(end)
    return found


def evaluated(
    structures: Sequence[Atoms],
    calculator: AtomeqCalculator,
    properties: Sequence[str],
    *,
    label: str,
    out: str,
    journal: Journal | None = None,
) -> list[dict[str, Any]]:
    """Compute structures in batches, write them with their results, return the results.

    Args:
        structures: What to compute.
        calculator: Computes them.
        properties: Names of ASE properties.
        label: Of the progress.
        out: The file of structures.
        journal: Keeps results as they come; those it holds are not computed again.
    """
    entries = [] if journal is None else [e for e in journal.entries if "results" in e]
    found = [{name: np.array(x) for name, x in entry["results"].items()} for entry in entries]
    meter = Meter(label, len(structures), unit="structures", done=len(found))
    with meter.running():
        for start in range(len(found), len(structures), _CHUNK):
            for result in calculator.evaluate(structures[start : start + _CHUNK], properties):
                if journal is not None:
                    values = {name: np.asarray(x).tolist() for name, x in result.items()}
                    journal.append({"results": values})
                found.append(result)
                meter.advance()
    with structure_output(out) as output:
        for atoms, result in zip(structures, found, strict=True):
            output.write(with_values(atoms, result))
    return found


def with_values(atoms: Atoms, results: dict[str, Any]) -> Atoms:
    """Return a copy of a structure that holds results."""
    names = ("energy", "free_energy", "forces", "stress")
    frozen = atoms.copy()
    values = {name: np.copy(results[name]) for name in names if name in results}
    frozen.calc = SinglePointCalculator(frozen, **values)
    return frozen
