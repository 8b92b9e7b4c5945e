"""atomeq: equivariant graph networks for atoms, from structure to forces.

This is the face, for users; nothing inside the package imports it. Names are loaded when they are
first asked for, so that ``import atomeq`` and ``atomeq --help`` do not wait for torch.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atomeq.calculators.ase import AtomeqCalculator
    from atomeq.check.model import validate_model
    from atomeq.dynamics.run import relax, simulate
    from atomeq.graph.atom_graph import AtomGraph
    from atomeq.graph.pyg import from_pyg, to_pyg
    from atomeq.graph.to_structures import to_ase, to_pymatgen
    from atomeq.potential.checkpoint import load_potential, save_potential
    from atomeq.potential.compiled import load_compiled
    from atomeq.potential.export import export_potential
    from atomeq.potential.potential import Potential
    from atomeq.screening.run import screen

__version__ = "0.1.0"

__all__ = [
    "AtomGraph",
    "AtomeqCalculator",
    "Potential",
    "__version__",
    "export_potential",
    "from_pyg",
    "load_compiled",
    "load_potential",
    "relax",
    "save_potential",
    "screen",
    "simulate",
    "to_ase",
    "to_pyg",
    "to_pymatgen",
    "validate_model",
]

# OpenMP's threads turn in circles for 3 ms after each piece of work, and there are thousands of
# them: on shared cores that cost 8 times the work. OpenMP reads this once, as torch is imported.
if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_HOMES = {
    "AtomGraph": "atomeq.graph.atom_graph",
    "AtomeqCalculator": "atomeq.calculators.ase",
    "Potential": "atomeq.potential.potential",
    "export_potential": "atomeq.potential.export",
    "from_pyg": "atomeq.graph.pyg",
    "load_compiled": "atomeq.potential.compiled",
    "load_potential": "atomeq.potential.checkpoint",
    "relax": "atomeq.dynamics.run",
    "save_potential": "atomeq.potential.checkpoint",
    "screen": "atomeq.screening.run",
    "simulate": "atomeq.dynamics.run",
    "to_ase": "atomeq.graph.to_structures",
    "to_pyg": "atomeq.graph.pyg",
    "to_pymatgen": "atomeq.graph.to_structures",
    "validate_model": "atomeq.check.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atomeq' has no attribute {name!r}; it offers {__all__}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
