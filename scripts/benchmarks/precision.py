"""What the precision of tensor products costs: errors of energy and forces, drift of NVE dynamics.

    python scripts/benchmark.py precision [POTENTIAL ...] [--device cuda] [--steps N]

On a GPU the kernels round. On a CPU the reference does in their place: the operands of every
product of the SO(2) maps, forwards and backwards, are rounded to TF32 (nearest, 10 bits) or to
bfloat16 and the sums are in single precision; messages are rounded to bfloat16 before they are
rotated back, where operands are. Those are the products that tensor cores have; a
potential without them, of Clebsch-Gordan products say, is computed in single precision whatever is
asked for, and gets one row. Errors are those against double precision, of rattled supercells of a
potential's own crystal; the drift is the slope of the total energy with its standard error.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor
from torch.overrides import TorchFunctionMode

from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge import reference
from atomeq.ops.precision import PRECISIONS
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.potential import Potential
from benchmarks.record import RESULTS, machine, write

TIMESTEP, TEMPERATURE = 2.0, 600.0  # fs, K
CRYSTALS = {29: bulk("Cu", cubic=True) * (3, 3, 3), 14: bulk("Si", cubic=True) * (2, 2, 2)}


def to_tf32(x: Tensor) -> Tensor:
    """Round to the 10 bits of TF32, to the nearest, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def to_bfloat16(x: Tensor) -> Tensor:
    """Round to bfloat16, to the nearest."""
    return x.bfloat16().float()


ROUNDINGS = {"high": to_tf32, "medium": to_bfloat16}


class RoundedProduct(torch.autograd.Function):
    """A product x W^T whose operands are rounded, in its gradient too; weights are constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: str) -> Tensor:
        """Multiply."""
        ctx.weight, ctx.rounded = ROUNDINGS[precision](weight), ROUNDINGS[precision]
        return ctx.rounded(x) @ ctx.weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Multiply by the transpose."""
        return ctx.rounded(grads[0]) @ ctx.weight, None, None


class Rounding(TorchFunctionMode):
    """Rounds the operands of products that are called within it."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision, self.n_products = precision, 0

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        """Take the place of linear() and of @ with a matrix."""
        name = getattr(func, "__name__", "")
        if name not in ("linear", "matmul", "__matmul__"):
            return func(*args, **(kwargs or {}))
        self.n_products += 1
        x, matrix, *bias = args
        y = RoundedProduct.apply(x, matrix if name == "linear" else matrix.T, self.precision)
        return y if not bias or bias[0] is None else y + bias[0]


@contextmanager
def rounding(precision: str) -> Iterator[Rounding]:
    """Let the reference round as kernels would at a precision."""
    mode, exact = Rounding(precision), reference.so2_map

    def rounded(*args: Any) -> Any:
        with mode if precision in ROUNDINGS else nullcontext():
            rows, gates = exact(*args)
        if precision == "medium" and not gates.shape[1]:  # a message; its gradient is not rounded
            rows = rows + (to_bfloat16(rows) - rows).detach()
        return rows, gates

    reference.so2_map = rounded
    try:
        with use_backend("reference"):
            yield mode
    finally:
        reference.so2_map = exact


def crystals(potential: Potential) -> list[Atoms]:
    """Return four rattled supercells of a crystal that a potential knows."""
    perfect = next(CRYSTALS[z] for z in potential.elements if z in CRYSTALS)
    found = []
    for seed in range(4):
        atoms = perfect.copy()
        atoms.set_cell(atoms.cell.array * (0.96 + 0.03 * seed), scale_atoms=True)
        atoms.rattle(0.05 + 0.05 * seed, seed=seed)
        found.append(atoms)
    return found


def errors(potential: Potential, truth: dict[Any, Tensor]) -> dict[str, float]:
    """Return root mean squares and largest errors, meV per atom and meV/Å."""
    structures = crystals(potential)
    found = potential(potential.build_graph(structures))
    energy = (found["energy"] - truth["energy"]).cpu() / len(structures[0]) * 1e3
    forces = (found["forces"] - truth["forces"]).cpu() * 1e3
    return {
        "energy_rms_meV_per_atom": float(energy.square().mean().sqrt()),
        "energy_max_meV_per_atom": float(energy.abs().max()),
        "forces_rms_meV_per_A": float(forces.square().mean().sqrt()),
        "forces_max_meV_per_A": float(forces.abs().max()),
    }


def drift(potential: Potential, n_steps: int) -> dict[str, float]:
    """Return the slope of the total energy of NVE dynamics, and its standard error."""
    evaluate, integrator = Evaluator(potential), VelocityVerlet(TIMESTEP, temperature=TEMPERATURE)
    atoms = crystals(potential)[1]
    state = integrator.init(
        evaluate.prepare([atoms]), evaluate, seeds=torch.zeros(1, dtype=torch.int64)
    )
    energies = []
    for _ in range(n_steps):
        state = integrator.step(state, evaluate)
        energies.append(float(state.graph.energy + state.kinetic_energy()) * 1e3 / len(atoms))
    times = np.arange(n_steps) * TIMESTEP / 1e3
    # Neighbouring steps are not independent: the error is that of the means of 20 parts.
    parts = [np.array_split(np.asarray(values), 20) for values in (times, energies)]
    (slope, _), covariance = np.polyfit(*[[p.mean() for p in x] for x in parts], 1, cov=True)
    return {
        "drift_meV_per_atom_per_ps": float(slope),
        "drift_error": float(np.sqrt(covariance[0, 0])),
        "energy_spread_meV_per_atom": float(np.std(energies)),
    }


def measured(name: str, device: str, n_steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each precision."""
    exact = load_potential(name, device=device, dtype=torch.float64)
    truth = exact(exact.build_graph(crystals(exact)))
    for precision in PRECISIONS:
        potential = load_potential(name, device=device, dtype=torch.float32, precision=precision)
        row: dict[str, Any] = {"potential": Path(name).name, "precision": precision}
        if device != "cpu":
            row |= errors(potential, truth) | drift(potential, n_steps)
        else:
            with rounding(precision) as mode:
                row |= errors(potential, truth) | drift(potential, n_steps)
            if precision != "highest" and not mode.n_products:
                yield {**row, "precision": "any other: it has no product that is rounded"}
                return
        yield row


def main(argv: list[str] | None = None) -> int:
    """Measure each potential and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("potentials", nargs="*", default=["cu-pbe"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=2000, help=f"of {TIMESTEP} fs")
    parser.add_argument("--out", type=Path, help="JSON file; by default in results")
    arguments = parser.parse_args(argv)
    rows = []
    document = {**machine(), "device": arguments.device, "steps": arguments.steps, "rows": rows}
    out = arguments.out or RESULTS / f"precision_{arguments.device}.json"
    for name in arguments.potentials:
        for row in measured(name, arguments.device, arguments.steps):
            rows.append(row)
            numbers = {k: v for k, v in row.items() if isinstance(v, float)}
            print(row["potential"], row["precision"], end=" ")
            print(*(f"{key}={value:.2g}" for key, value in numbers.items()), flush=True)
            write(out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
