"""How equivariant a published model is on finer grids: ``grid-resolution [CASE] [--grids ...]``.

eSCN and EquiformerV2 as published apply SiLU at the points of a grid on the sphere, which commutes
with rotations only as far as the grid resolves what comes out. No weight depends on the grid, so it
can be made finer when the model is used. CASE is a folder in the layout of
tests/golden/oc20_models; its structure is rotated with its edges kept, in float32, and the rms
difference of forces and energy is printed for each grid.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.spatial.transform import Rotation
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "golden"))
from checkers.cases import Case
from checkers.oc20 import case_model

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
CASE = GOLDEN / "oc20_models" / "eqv2_p2_slab_L4M2_oc20style"
GRIDS = (10, 14, 18, 24, 32, 40)
N_ROTATIONS = 4


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", type=Path, default=CASE, metavar="CASE")
    parser.add_argument("--grids", type=int, nargs="+", default=GRIDS)
    arguments = parser.parse_args(argv)
    case: Any = Case.read(arguments.case / "case.json")
    model: Any = case_model(case)
    graph = case.graph()
    table = Table("grid_resolution", "forces, ΔF/F", "energy, ΔE/E", box=None)
    for grid in arguments.grids:
        model.set_grid_resolution(grid)
        forces, energy = rotation_errors(model, graph)
        table.add_row(str(grid), f"{forces:.1e}", f"{energy:.1e}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return 0


def rotation_errors(model: Any, graph: AtomGraph) -> tuple[float, float]:
    """Return how far forces do not turn with the structure, and how far its energy changes.

    Args:
        model: With a head for forces.
        graph: With edges, which are kept.

    Returns:
        Root mean square over rotations, relative to the forces and to the energy.
    """
    forces, energy = _evaluate(model, graph)
    errors, changes = [], []
    for matrix in Rotation.random(N_ROTATIONS, random_state=0).as_matrix():
        rotation = torch.from_numpy(matrix)
        turned_graph = graph.replace(pos=graph.pos @ rotation.T, cell=graph.cell @ rotation.T)
        turned, changed = _evaluate(model, turned_graph)
        errors.append(turned - forces @ rotation.T.to(forces))
        changes.append(changed - energy)
    return _relative(torch.stack(errors), forces), _relative(torch.stack(changes), energy)


def _evaluate(model: Any, graph: AtomGraph) -> tuple[Tensor, Tensor]:
    outputs = model(graph)
    return outputs["forces"], outputs["energies"].double().sum()


def _relative(error: Tensor, value: Tensor) -> float:
    return float((error.square().mean() / value.square().mean()).sqrt())
