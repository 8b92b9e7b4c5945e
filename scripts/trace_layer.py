"""Count what stands between a call and its arithmetic: Python frames and files of this package.

One eSCN edge layer from ``escn_conv`` to the call of C, and one structure from the calculator to
its forces: each frame entered is a function a reader must follow, each change of file a page
turned.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from ase.build import bulk

import atomeq
from atomeq.calculators.ase import AtomeqCalculator
from atomeq.ops.edge.operations import escn_conv
from atomeq.ops.edge.wigner import build_edge_frame

ROOT = Path(atomeq.__file__).parent
LMAX, CHANNELS = 2, 16


class Trace(NamedTuple):
    """The frames of the package entered in a call, by file, in their order."""

    files: list[str]

    @property
    def n_changes(self) -> int:
        """Number of times that the file changes from one frame entered to the next."""
        return sum(
            before != after for before, after in zip(self.files, self.files[1:], strict=False)
        )

    def __str__(self) -> str:
        return (
            f"{len(self.files)} frames in {len(set(self.files))} files, "
            f"{self.n_changes} changes of file"
        )


def trace(call: Callable[[], Any], until: str | None = None) -> Trace:
    """Return the frames of atomeq that a call enters.

    Args:
        call: What is traced; its second call is, when tables and choices are remembered.
        until: The function that calls C; nothing behind its first call is counted.
    """
    call()
    files: list[str] = []
    done = False

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal done
        path = Path(frame.f_code.co_filename)
        if done or event != "call" or not path.is_relative_to(ROOT):
            return
        files.append(str(path.relative_to(ROOT)))
        done = until is not None and frame.f_code.co_name == until

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Trace(files)


def layer() -> Callable[[], Any]:
    """Return a call of one edge layer, as a model makes it."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.tensor([[0, 1, 2, 0], [1, 0, 1, 2]])
    n_sph = (LMAX + 1) ** 2
    x = torch.randn(3, n_sph, CHANNELS, generator=generator)
    vectors = torch.randn(4, 3, generator=generator)
    frame = build_edge_frame(vectors, edge_index, n_atoms=3, lmax=LMAX, mmax=LMAX)

    def weight(m: int, c_out: int, c_in: int) -> torch.Tensor:
        degrees = LMAX + 1 - m
        extra = LMAX * c_out if m == 0 and c_in != c_out else 0
        return torch.randn(degrees * c_out + extra, degrees * c_in, generator=generator)

    first = [weight(m, CHANNELS, 2 * CHANNELS) for m in range(LMAX + 1)]
    second = [weight(m, CHANNELS, CHANNELS) for m in range(LMAX + 1)]
    return lambda: escn_conv(x, frame, first, second)


def forces(potential: str) -> Callable[[], Any]:
    """Return a call of the calculator for the forces of another structure each time."""
    atoms = bulk("Cu", cubic=True)
    atoms.calc = AtomeqCalculator(potential)

    def call() -> object:
        atoms.rattle(1e-3)
        return atoms.get_forces()

    return call


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--potential", default=str(ROOT.parent / "potentials" / "cu-pbe"))
    options = parser.parse_args()
    print(f"escn_conv to C:       {trace(layer(), until='_call_layer')}")
    print(f"structure to forces:  {trace(forces(options.potential))}")


if __name__ == "__main__":
    main()
