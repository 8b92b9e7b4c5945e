"""Scalar properties of molecules that models learn, each with its unit and how atoms add up to it.

They are what :class:`~atomeq.training.task.AtomisticTask` takes as ``target``, by name or spelled
out. Energies whose derivatives are forces are no such targets: they belong to potentials.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from atomeq.data.ase_files import DataError
from atomeq.units import HARTREE

Readout = Literal["sum", "mean"]


@dataclass(frozen=True)
class ScalarTarget:
    """A scalar property of a structure.

    Attributes:
        name: Of the property, and of its label in files unless ``data.labels.scalar`` says else.
        unit: Of labels, predictions and errors.
        readout: ``sum`` over atoms, for what grows with the molecule; ``mean`` for what does not. A
            model that gives one number for each structure reads out by itself.
        atoms: Value of isolated atoms by element symbol, where the data set publishes them.
    """

    name: str
    unit: str = ""
    readout: Readout = "mean"
    atoms: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.readout not in ("sum", "mean"):
            raise ValueError(f"readout is 'sum' or 'mean', not {self.readout!r}")


def known_target(target: str | ScalarTarget) -> ScalarTarget:
    """Return a target given by name or spelled out.

    Args:
        target: A name such as ``gap``, or the target itself.

    Raises:
        DataError: No data set that is known here has a target of that name.
    """
    if isinstance(target, ScalarTarget):
        return target
    if target not in TARGETS:
        raise DataError(
            f"there is no target {target!r}; known are {', '.join(TARGETS)}, and any other is "
            "spelled out as {name: ..., unit: ..., readout: sum or mean}"
        )
    return TARGETS[target]


def _hartree(*values: float) -> dict[str, float]:
    return dict(zip("HCNOF", (HARTREE * value for value in values), strict=True))


# Isolated atoms of QM9, its atomref.txt: U0, U, H and G, and the heat capacity, 3/2 R.
_U0 = _hartree(-0.500273, -37.846772, -54.583861, -75.064579, -99.718730)
_U = _hartree(-0.498857, -37.845355, -54.582445, -75.063163, -99.717314)
_H = _hartree(-0.497912, -37.844411, -54.581501, -75.062219, -99.716370)
_G = _hartree(-0.510927, -37.861317, -54.598897, -75.079532, -99.733544)
_CV = dict.fromkeys("HCNOF", 2.981)


_KNOWN = (
    # QM9, and the gaps and orbitals of PCQM4Mv2 and OPV
    ScalarTarget("mu", "D"),
    ScalarTarget("alpha", "bohr³", "sum"),
    ScalarTarget("homo", "eV"),
    ScalarTarget("lumo", "eV"),
    ScalarTarget("gap", "eV"),
    ScalarTarget("r2", "bohr²", "sum"),
    ScalarTarget("zpve", "eV", "sum"),
    ScalarTarget("U0", "eV", "sum", _U0),
    ScalarTarget("U", "eV", "sum", _U),
    ScalarTarget("H", "eV", "sum", _H),
    ScalarTarget("G", "eV", "sum", _G),
    ScalarTarget("Cv", "cal/mol/K", "sum", _CV),
    # QM7
    ScalarTarget("atomization_energy", "eV", "sum"),
    # OPV: oscillator strengths against the solar spectrum, and what is extrapolated to the polymer
    ScalarTarget("spectral_overlap", ""),
    ScalarTarget("gap_extrapolated", "eV"),
    ScalarTarget("homo_extrapolated", "eV"),
    ScalarTarget("lumo_extrapolated", "eV"),
    ScalarTarget("optical_lumo_extrapolated", "eV"),
)
TARGETS: dict[str, ScalarTarget] = {target.name: target for target in _KNOWN}
