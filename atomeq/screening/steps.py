"""Steps: what happens to every structure, as a list in YAML or Python, checked before the work.

A step is a name with options: ``["validate", {"relax": {"fmax": 0.05, "cell": True}}]``. The list
with all defaults filled in is what the settings hash is taken of.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from atomeq.potential.untrusted import read_plain
from atomeq.screening.expressions import Expression
from atomeq.screening.references import energies_by_formula
from atomeq.screening.rows import NUMBERS


@dataclass(frozen=True)
class Validate:
    """Refuse what no potential should see: NaN, overlaps, unknown elements, impossible cells.

    Args:
        min_distance: Å; nearer atoms overlap.
        max_atoms: Larger structures are refused.
    """

    min_distance: float = 0.5
    max_atoms: int | None = None

    def __post_init__(self) -> None:
        _refuse_unless(self.min_distance > 0, "min_distance must be positive", self.min_distance)


@dataclass(frozen=True)
class Dedupe:
    """Leave copies out; the first of them stands for all.

    Args:
        match: ``exact``: same atoms in the same places, found by their hash. ``structure``: also
            other cells, other orders of atoms and small displacements. It is not the default: what
            is a copy in a pile from databases, is a point of its own in a series of strains.
        tolerance: Å; no atom of a copy is displaced by more.
        length: Largest relative difference of cell lengths.
        angle: Largest difference of cell angles, degrees.
    """

    match: Literal["exact", "structure"] = "exact"
    tolerance: float = 0.03
    length: float = 0.005
    angle: float = 0.5

    def __post_init__(self) -> None:
        _refuse_unless(
            self.match in ("exact", "structure"), "match is exact or structure", self.match
        )
        for name in ("tolerance", "length", "angle"):
            _refuse_unless(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))


@dataclass(frozen=True)
class Relax:
    """Move atoms, and the cell if asked, until forces vanish.

    Args:
        fmax: Largest force left, eV/Å.
        cell: Relax the cell too, of structures that are periodic in three directions; slabs and
            molecules keep theirs, and ``cell_kept`` says so.
        max_steps: After which a structure is left as it is, ``converged`` false.
        optimizer: ``fire`` or ``lbfgs``.
    """

    fmax: float = 0.03
    cell: bool = False
    max_steps: int = 500
    optimizer: Literal["fire", "lbfgs"] = "fire"

    def __post_init__(self) -> None:
        _refuse_unless(self.fmax > 0, "fmax must be positive", self.fmax)
        _refuse_unless(self.max_steps >= 1, "max_steps must be at least 1", self.max_steps)
        _refuse_unless(
            self.optimizer in ("fire", "lbfgs"), "optimizer is fire or lbfgs", self.optimizer
        )


@dataclass(frozen=True)
class SinglePoint:
    """Energy and forces where the structure is."""


@dataclass(frozen=True)
class Committee:
    """Ask other potentials as well; how far they disagree goes to energy_std and force_std.

    Args:
        potentials: Names or folders of the other members.
    """

    potentials: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _refuse_unless(bool(self.potentials), "committee needs potentials", self.potentials)
        object.__setattr__(self, "potentials", tuple(map(str, self.potentials)))


@dataclass(frozen=True)
class Properties:
    """Volume, density and space group, and energies relative to references.

    Args:
        symprec: Å, for the space group.
        hull: Folder of a screening with the same potential, or eV per atom by formula; gives
            formation_energy and energy_above_hull.
        slabs: eV by formula of clean slabs; with ``gas`` gives adsorption_energy.
        gas: eV by formula of gas molecules.
    """

    symprec: float = 0.01
    hull: str | dict[str, float] | None = None
    slabs: dict[str, float] = field(default_factory=dict)
    gas: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_unless(self.symprec > 0, "symprec must be positive", self.symprec)
        if self.hull is not None and not isinstance(self.hull, str):
            energies_by_formula(self.hull, "hull")
        _refuse_unless(bool(self.slabs) == bool(self.gas), "give slabs and gas together", self.gas)
        for name in ("slabs", "gas"):
            if getattr(self, name):
                energies_by_formula(getattr(self, name), name)


@dataclass(frozen=True)
class Filter:
    """Mark rows that do not meet a condition as filtered.

    Args:
        where: As :class:`~atomeq.screening.expressions.Expression` reads it.
    """

    where: str = ""

    def __post_init__(self) -> None:
        Expression(self.where, NUMBERS)


@dataclass(frozen=True)
class Rank:
    """Order the rows that are done.

    Args:
        by: A column with numbers.
        descending: The largest first.
        top: How many the ranking and the report show.
        distinct: Leave out what is the same structure as a better one, within the tolerances of
            dedupe; by default where a relaxation could have made it so.
    """

    by: str = "energy_per_atom"
    descending: bool = False
    top: int = 100
    distinct: bool | None = None

    def __post_init__(self) -> None:
        _refuse_unless(self.by in NUMBERS, f"rank by one of {', '.join(NUMBERS)}", self.by)
        _refuse_unless(self.top >= 1, "top must be at least 1", self.top)


Step: TypeAlias = Validate | Dedupe | Relax | SinglePoint | Committee | Properties | Filter | Rank

STEPS: dict[str, type[Step]] = {
    "validate": Validate,
    "dedupe": Dedupe,
    "relax": Relax,
    "single_point": SinglePoint,
    "committee": Committee,
    "properties": Properties,
    "filter": Filter,
    "rank": Rank,
}
_NAMES = {kind: name for name, kind in STEPS.items()}
_REPEATABLE = ("filter",)
_FIRST_OPTION = ("dedupe", "filter", "rank")  # dedupe: structure is short for {match: structure}

DEFAULT_STEPS: tuple[str, ...] = ("validate", "dedupe", "relax", "properties", "rank")


def parse_steps(given: Sequence[Any] | None) -> list[Step]:
    """Turn a list of steps as a user writes it into checked steps in their order.

    Args:
        given: Names, ``{name: options}``, or steps; None for the default list.

    Returns:
        Steps that can be run.

    Raises:
        ValueError: There is no such step or option, a value is not allowed, or the order is wrong.
    """
    steps = [_parse(item) for item in (DEFAULT_STEPS if given is None else given)]
    _refuse_order([_NAMES[type(step)] for step in steps])
    return steps


def read_steps(path: str | Path) -> list[Any]:
    """Return the list of steps in a YAML file, plain or under the key ``steps``.

    Args:
        path: Of the YAML file.

    Raises:
        ValueError: It is not readable, or no list.
    """
    document = read_plain(Path(path))
    steps = document.get("steps") if isinstance(document, dict) else document
    if not isinstance(steps, list):
        raise ValueError(f"{path} must hold a list of steps, such as: steps: [validate, relax]")
    return steps


def describe_steps(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return steps as plain values with every default, as :func:`parse_steps` reads them."""
    return [{_NAMES[type(step)]: _plain(dataclasses.asdict(step))} for step in steps]


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Return the hash of settings that are plain values."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse(item: Any) -> Step:
    if isinstance(item, tuple(_NAMES)):
        return item
    if isinstance(item, str):
        name, options = item, {}
    elif isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        options = {} if options is None else options
    else:
        raise ValueError(f"a step is a name or {{name: options}}, not {item!r}")
    if name not in STEPS:
        raise ValueError(f"there is no step {name!r}; steps are {', '.join(STEPS)}")
    kind = STEPS[name]
    known = [part.name for part in dataclasses.fields(kind)]
    if not isinstance(options, Mapping) and len(known) and name in _FIRST_OPTION:
        options = {known[0]: options}
    if not isinstance(options, Mapping):
        raise ValueError(f"options of {name} must be a mapping, not {options!r}")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(known) or 'none'}"
        )
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _refuse_order(names: list[str]) -> None:
    repeated = sorted({n for n in names if names.count(n) > 1} - set(_REPEATABLE))
    if repeated:
        raise ValueError(f"the step {repeated[0]} stands twice in {names}")
    order = [name for name in STEPS if name in names]
    once = list(dict.fromkeys(names))
    if once != order:
        raise ValueError(f"steps must stand in the order {order}, not {once}")
    if "relax" in names and "single_point" in names:
        raise ValueError("relax already gives energies: leave single_point out")
    if "committee" in names and not {"relax", "single_point"} & set(names):
        raise ValueError("committee needs relax or single_point before it")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _refuse_unless(holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{rule}, not {value!r}")
