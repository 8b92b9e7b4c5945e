"""Check any ASE calculator against the laws of physics and of good behaviour.

Each law is measured on small structures of the elements the calculator knows; the figures are what
``atomeq check`` prints.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import get_args

from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols

from atomeq.check.degenerate_structures import DEGENERATE_STRUCTURES
from atomeq.check.laws import CalculatorFactory, Depth, Law, LawResult, Subject, describe
from atomeq.check.physical_laws import PHYSICAL_LAWS
from atomeq.check.software_laws import SOFTWARE_LAWS
from atomeq.check.thread_laws import THREAD_LAWS

LAWS: tuple[Law, ...] = PHYSICAL_LAWS + THREAD_LAWS + SOFTWARE_LAWS + DEGENERATE_STRUCTURES

#: Tried in this order on calculators that do not say what they know, and first of those that know
#: more: in the order of atomic numbers the test structures would be of hydrogen and helium.
_COMMON = ("Cu", "Al", "Si", "Ni", "Au", "Fe", "Na", "Cl", "C", "H", "O", "N", "Ar", "Li", "Mg")


def check_calculator(
    factory: CalculatorFactory,
    *,
    elements: Sequence[str] | None = None,
    depth: Depth = "quick",
    only: Collection[str] | None = None,
    single_precision: bool = False,
    dynamics_structure: Atoms | None = None,
    dynamics_picoseconds: float | None = None,
    timestep: float | None = None,
    temperature: float = 300.0,
    seed: int = 0,
    on_start: Callable[[Law], object] = lambda law: None,
    on_step: Callable[[int, int], object] = lambda step, steps: None,
) -> Iterator[LawResult]:
    """Measure every law on a calculator, yielding each verdict as it is reached.

    Args:
        factory: Called without arguments, makes a new calculator.
        elements: Chemical symbols the calculator knows; the first makes up most of the test
            structures. By default what its ``elements`` attribute says, else what it accepts.
        depth: ``"quick"``, or ``"default"`` with the NVE drift, which takes minutes with a network,
            or ``"full"`` with spawned processes and degenerate structures as well.
        only: Names of the laws to measure, whatever the depth.
        single_precision: Allow what float32 needs.
        dynamics_structure: Start of the NVE law; by default about 100 atoms of bulk.
        dynamics_picoseconds: Length of the NVE law, ps; by default 5, and of what computes slowly
            as much as a minute allows.
        timestep: Of the NVE law, fs; by default 2, and 0.5 from a structure with hydrogen.
        temperature: Of the NVE law, K.
        seed: Of every random displacement, rotation and velocity.
        on_start: Called with each law before it is measured.
        on_step: Called with the number of the step and of all steps while the NVE law runs.

    Yields:
        One :class:`LawResult` per law.

    Raises:
        ValueError: The calculator accepts none of the elements, or a law has another name.

    Example:
        >>> from ase.calculators.emt import EMT  # doctest: +SKIP
        >>> results = list(check_calculator(EMT, elements=["Cu"]))  # doctest: +SKIP
    """
    if timestep is None:
        numbers = () if dynamics_structure is None else dynamics_structure.numbers
        timestep = 0.5 if 1 in numbers else 2.0
    subject = Subject(
        factory,
        list(elements) if elements else known_elements(factory),
        single_precision=single_precision,
        dynamics_structure=dynamics_structure,
        dynamics_steps=None
        if dynamics_picoseconds is None
        else round(1000 * dynamics_picoseconds / timestep),
        timestep=timestep,
        temperature=temperature,
        seed=seed,
        on_step=on_step,
    )
    unknown = [symbol for symbol in subject.elements if symbol not in atomic_numbers]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a chemical symbol")
    return _judge(subject, _chosen(only, depth=depth), on_start)


def known_elements(factory: CalculatorFactory) -> list[str]:
    """Return the symbols a calculator says it knows, or the common ones among very many.

    Where it says nothing they are the common ones it accepts.

    Raises:
        ValueError: It accepts none of them.
    """
    calculator = factory()
    stated = getattr(calculator, "elements", None)
    if stated is not None and 0 < len(stated) < len(chemical_symbols) - 1:
        known = [chemical_symbols[int(number)] for number in stated]
        common = [symbol for symbol in _COMMON if symbol in known]
        known = common if common and len(known) > len(_COMMON) else known
        return sorted(known, key=lambda symbol: symbol == "H")  # no crystal of half an ångström
    accepted, refusal = [], None
    for symbol in _COMMON:
        atoms = Atoms([symbol, symbol], positions=[[0, 0, 0], [0.8, 1.6, 1.6]])
        atoms.calc = factory()
        try:
            atoms.get_potential_energy()
        except Exception as error:  # any refusal means the element is not known
            refusal = error
        else:
            accepted.append(symbol)
    if not accepted:
        raise ValueError(
            f"the calculator computes no dimer of {', '.join(_COMMON)} "
            f"({describe(refusal) if refusal else 'no reason given'}); name its elements"
        )
    return accepted


def _chosen(only: Collection[str] | None, *, depth: Depth) -> list[Law]:
    if only is None:
        depths = get_args(Depth)
        included = depths[: depths.index(depth) + 1]
        return [law for law in LAWS if law.depth in included]
    names = [law.name for law in LAWS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"there is no law {unknown[0]!r}; laws are {', '.join(names)}")
    return [law for law in LAWS if law.name in only]


def _judge(
    subject: Subject, laws: list[Law], on_start: Callable[[Law], object]
) -> Iterator[LawResult]:
    for law in laws:
        on_start(law)
        yield law.judge(subject)
