"""Computation: what an engine's worker does with structures, from relaxation to filter.

It takes candidates from a stream as the batch in flight has room, and yields their rows as they
end. It knows nothing of files and ledgers.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses

from atomeq.dynamics.evaluator import Evaluator, Failure
from atomeq.dynamics.in_flight import Outcome
from atomeq.dynamics.run import relax
from atomeq.graph.convert import StructureError, validate_structure
from atomeq.graph.occupation import partly_occupied_site
from atomeq.potential.potential import Potential
from atomeq.screening.filters import Filters, remarks
from atomeq.screening.identity import printable
from atomeq.screening.references import (
    AdsorptionReferences,
    HullReferences,
    MissingReference,
)
from atomeq.screening.rows import Row, structure_columns
from atomeq.screening.steps import (
    Committee,
    Properties,
    Relax,
    SinglePoint,
    Step,
    Validate,
)
from atomeq.screening.symmetry import space_group

#: What a potential, reader or comparison raises over a structure; all else is an error of the run.
OF_A_STRUCTURE = (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError)

_GROUP = 64  # structures that a committee looks at together, or that relax without their cells
_DENSITY = 1.66053906892  # g/cm³ of one amu/Å³


@dataclass(frozen=True)
class Candidate:
    """A structure on its way through the steps.

    Attributes:
        hash: Of its row.
        locator: Where it came from.
        atoms: The structure.
        labels: Columns of what its source says of it.
    """

    hash: str
    locator: str
    atoms: Atoms
    labels: Row = field(default_factory=dict)

    def row(self, **columns: Any) -> Row:
        """Return the row of this structure as it is now, with some columns."""
        names = {**self.labels, "hash": self.hash, "locator": self.locator}
        return {**names, **structure_columns(self.atoms), **columns}

    def failed(self, stage: str, kind: str, reason: str) -> Row:
        """Return the row that puts this structure into quarantine."""
        return self.row(status="failed", stage=stage, kind=kind, reason=printable(reason))


class Feed(Iterator[Candidate]):
    """Candidates that end where their source fails, so that what was taken is computed first.

    An error of the source raised within a computation would be taken for one of the potential.

    Args:
        candidates: The stream.
    """

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self._candidates = iter(candidates)
        self._error: Exception | None = None

    def __next__(self) -> Candidate:
        """Return the next candidate."""
        if self._error is not None:
            raise StopIteration
        try:
            return next(self._candidates)
        except StopIteration:
            raise
        except Exception as error:  # whatever it is, it is raised in the end
            self._error = error
            raise StopIteration from None

    def end(self) -> None:
        """Raise the error that ended the source, if one did."""
        if self._error is not None:
            raise self._error


class Computation:
    """The steps that need a potential, and those after them.

    Args:
        steps: All steps; those before are passed over.
        potential: Computes.
        members: Further potentials of a committee.
        hull: References of formation energies.
        max_edges: Edges computed at once, as :func:`~atomeq.dynamics.run.relax` takes it.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        potential: Potential,
        *,
        members: Sequence[Potential] = (),
        hull: HullReferences | None = None,
        max_edges: int | None = None,
    ) -> None:
        self._steps = {type(step): step for step in steps}
        self._filtered = Filters(steps)
        known = bool(potential.uncertainties)
        self._evaluate = Evaluator(potential, max_uncertainty=math.inf if known else None)
        self._members = [Evaluator(member) for member in members]
        self._hull, self._max_edges = hull, max_edges
        properties = self._steps.get(Properties)
        self._adsorption = None
        if isinstance(properties, Properties) and properties.slabs:
            self._adsorption = AdsorptionReferences(properties.slabs, properties.gas)

    def run(self, candidates: Iterable[Candidate]) -> Iterator[Row]:
        """Yield the row of every candidate, as they end, and raise what the stream raised."""
        feed = Feed(candidates)
        rows = self._energies(feed)
        if Committee in self._steps:
            rows = self._disagreements(rows)
        for candidate, row in rows:
            if row["status"] == "done":
                row = self._finish(candidate, row)
            yield row
        feed.end()

    def _energies(self, candidates: Iterator[Candidate]) -> Iterator[tuple[Candidate, Row]]:
        step = self._steps.get(Relax, self._steps.get(SinglePoint))
        if step is None:
            for candidate in candidates:
                yield candidate, candidate.row(status="done")
            return
        stage = "relax" if isinstance(step, Relax) else "single_point"
        for candidate, outcome in self._outcomes(candidates, step):
            if isinstance(outcome, Exception):
                kind, reason = "error", f"{type(outcome).__name__}: {outcome}"
                yield candidate, candidate.failed(stage, kind, reason)
            elif outcome.status in ("failed", "refused", "too_large"):
                yield candidate, candidate.failed(stage, _kind(outcome), outcome.reason)
            else:
                relaxed = replace(candidate, atoms=outcome.atoms)
                yield relaxed, _row_of(relaxed, outcome, step)

    def _outcomes(
        self, candidates: Iterator[Candidate], step: Step
    ) -> Iterator[tuple[Candidate, Outcome | Exception]]:
        """Relax with their cells those that have one, a group of others now and then without."""
        if not isinstance(step, Relax) or not step.cell:
            yield from self._fly(candidates, step)
            return
        while True:
            aside: list[Candidate] = []
            yield from self._fly(_with_cells(candidates, aside), step)
            yield from self._fly(iter(aside), replace(step, cell=False))
            if len(aside) < _GROUP:
                return

    def _fly(
        self, candidates: Iterator[Candidate], step: Step
    ) -> Iterator[tuple[Candidate, Outcome | Exception]]:
        """Relax what comes; where the potential raises, find out for whom, one by one."""
        while True:
            aboard: dict[int, Candidate] = {}
            try:
                for outcome in self._relax(_boarding(candidates, aboard), step):
                    yield aboard.pop(outcome.index), outcome
            except OF_A_STRUCTURE:
                for candidate in aboard.values():
                    yield candidate, self._alone(candidate, step)
                continue
            return

    def _alone(self, candidate: Candidate, step: Step) -> Outcome | Exception:
        try:
            return next(self._relax([candidate.atoms], step))
        except OF_A_STRUCTURE as error:
            return error

    def _relax(self, structures: Iterable[Atoms], step: Step) -> Iterator[Outcome]:
        if not isinstance(step, Relax):
            return relax(structures, self._evaluate, max_steps=0, max_edges=self._max_edges)
        return relax(
            structures,
            self._evaluate,
            optimizer=step.optimizer,
            cell=step.cell,
            fmax=step.fmax,
            max_steps=step.max_steps,
            max_edges=self._max_edges,
        )

    def _disagreements(
        self, rows: Iterator[tuple[Candidate, Row]]
    ) -> Iterator[tuple[Candidate, Row]]:
        while group := list(itertools.islice(rows, _GROUP)):
            asked = [candidate for candidate, row in group if row["status"] == "done"]
            found = self._ask_members(asked) if asked else {}
            for candidate, row in group:
                if candidate.hash in found:
                    row = {**row, **found[candidate.hash]}
                    if row["status"] == "failed":
                        row = candidate.failed("committee", row["kind"], row["reason"])
                yield candidate, row

    def _ask_members(self, candidates: Sequence[Candidate]) -> dict[str, Row]:
        energies = {c.hash: [c.atoms.get_potential_energy()] for c in candidates}
        forces = {c.hash: [c.atoms.get_forces(apply_constraint=False)] for c in candidates}
        found: dict[str, Row] = {}
        for number, member in enumerate(self._members, start=1):
            structures = [candidate.atoms for candidate in candidates]
            outcomes = relax(structures, member, max_steps=0, max_edges=self._max_edges)
            for outcome in outcomes:
                name = candidates[outcome.index].hash
                if outcome.graph is None or outcome.status == "failed":
                    reason = f"member {number}: {outcome.reason}"
                    found[name] = {"status": "failed", "kind": _kind(outcome), "reason": reason}
                    continue
                energies[name].append(outcome.energy)
                forces[name].append(outcome.graph.forces.cpu().numpy())
        for candidate in candidates:
            if candidate.hash not in found:
                found[candidate.hash] = _spread(
                    np.array(energies[candidate.hash]) / len(candidate.atoms),
                    np.array(forces[candidate.hash]),
                )
        return found

    def _finish(self, candidate: Candidate, row: Row) -> Row:
        step = self._steps.get(Properties)
        try:
            if isinstance(step, Properties):
                row = {**row, **_geometry(candidate.atoms, step.symprec), **self._relative(row)}
        except MissingReference as error:
            return {
                **row,
                "status": "failed",
                "stage": "properties",
                "kind": "no_reference",
                "reason": str(error),
            }
        return self._filtered(row)

    def _relative(self, row: Row) -> Row:
        """Return energies relative to references, for a row that has an energy."""
        columns: Row = {}
        if row.get("energy") is None:
            return columns
        formula, energy = row["formula"], row["energy"]
        if self._hull is not None:
            columns["formation_energy"] = self._hull.formation_energy(formula, energy)
            columns["energy_above_hull"] = self._hull.above_hull(formula, energy)
        if self._adsorption is not None:
            columns["adsorption_energy"] = self._adsorption.adsorption_energy(formula, energy)
        return columns


def refuse(atoms: Atoms, step: Validate, elements: Sequence[int]) -> tuple[str, str] | None:
    """Return kind and reason why a structure is refused, or None.

    Args:
        atoms: The structure.
        step: The settings.
        elements: Atomic numbers the potential knows.
    """
    if step.max_atoms is not None and len(atoms) > step.max_atoms:
        return "too_large", f"{len(atoms)} atoms are more than max_atoms {step.max_atoms}"
    try:
        validate_structure(
            atoms, name="structure", known_elements=elements, min_distance=step.min_distance
        )
    except StructureError as error:
        return _kind_of_refusal(atoms, elements), str(error)
    return None


def _kind_of_refusal(atoms: Atoms, elements: Sequence[int]) -> str:
    if len(atoms) == 0:
        return "empty"
    if partly_occupied_site(atoms.info):
        return "partly_occupied"
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return "not_finite"
    if not np.isin(atoms.numbers, list(elements)).all():
        return "unknown_element"
    if np.linalg.matrix_rank(atoms.cell.array[atoms.pbc]) < atoms.pbc.sum():
        return "bad_cell"
    return "overlap"


def _with_cells(candidates: Iterator[Candidate], aside: list[Candidate]) -> Iterator[Candidate]:
    """Yield what is periodic in three directions, and set others aside until they are a group."""
    for candidate in candidates:
        if candidate.atoms.pbc.all():
            yield candidate
            continue
        aside.append(candidate)
        if len(aside) == _GROUP:
            return


def _boarding(stream: Iterator[Candidate], aboard: dict[int, Candidate]) -> Iterator[Atoms]:
    for index, candidate in enumerate(stream):
        aboard[index] = candidate
        yield candidate.atoms


_KINDS = {failure.reason: failure.name.lower() for failure in Failure if failure}


def _kind(outcome: Outcome) -> str:
    if outcome.status == "failed":
        return next((kind for reason, kind in _KINDS.items() if reason in outcome.reason), "failed")
    return outcome.status


def _row_of(candidate: Candidate, outcome: Outcome, step: Step) -> Row:
    assert outcome.graph is not None
    energy = float(outcome.graph.energy)
    columns: Row = {
        "status": "done",
        "energy": energy,
        "energy_per_atom": energy / len(candidate.atoms),
        "max_force": float(outcome.graph.forces.norm(dim=1).max()),
    }
    if "energy_uncertainty" in outcome.graph:
        of_energy = float(outcome.graph["energy_uncertainty"][0])
        columns["energy_uncertainty"] = of_energy / len(candidate.atoms)
        columns["force_uncertainty"] = float(outcome.graph["forces_uncertainty"].max())
    if isinstance(step, Relax):
        columns["converged"] = outcome.converged
        columns["n_steps"] = outcome.n_steps
        if step.cell:
            columns["cell_kept"] = not candidate.atoms.pbc.all()
        columns |= remarks(columns)
    return candidate.row(**columns)


def _spread(energies: np.ndarray, forces: np.ndarray) -> Row:
    deviation = forces - forces.mean(axis=0)
    variance = (deviation**2).sum(axis=2).sum(axis=0) / (len(forces) - 1)
    return {
        "energy_std": float(energies.std(ddof=1)),
        "force_std": float(np.sqrt(variance.max())),
    }


def _geometry(atoms: Atoms, symprec: float) -> Row:
    """Return volume, density and space group of a structure that has them."""
    if not (atoms.pbc.all() and atoms.cell.rank == 3):
        return {}
    volume = float(atoms.get_volume())
    columns: Row = {
        "volume": volume,
        "density": float(_DENSITY * atomic_masses[atoms.numbers].sum() / volume),
    }
    symmetry = space_group(atoms, symprec)
    if symmetry is not None:
        columns["space_group"], columns["space_group_number"] = symmetry
    return columns
