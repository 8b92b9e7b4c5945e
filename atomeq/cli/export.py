"""``atomeq export``: a potential becomes one compiled file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from atomeq.cli.terminal import Parser, say
from atomeq.potential.compiled import read_metadata
from atomeq.potential.export import export_potential

_DESCRIPTION = """\
Compile a potential for the processor of this machine: OUT.pt2 computes energy, forces and stress of
structures of any size without the package's operations, faster for small structures. It takes about
a minute and a C++ compiler. The file is a program: whoever loads it runs it, which in Python
atomeq.load_compiled("OUT.pt2") does.

example:
  atomeq export cu-pbe --out cu.pt2
"""


def main(argv: Sequence[str]) -> int:
    """Run ``atomeq export``.

    Args:
        argv: The verb and its options.

    Returns:
        0.
    """
    _, *words = argv
    options = build_parser().parse_args(words)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    path = export_potential(options.potential, options.out, dtype=dtype)
    told = read_metadata(path)
    say(
        f"{path}: {', '.join(told['properties'])} in {told['dtype']} for "
        f"{told['machine']['processor']}, torch {told['machine']['torch']}; weights "
        f"{told['sha256'][:12]}…"
    )
    return 0


def build_parser() -> Parser:
    """Return the parser of the verb."""
    parser = Parser("atomeq export", _DESCRIPTION)
    parser.add_argument(
        "potential", metavar="POTENTIAL", type=str, help="name or folder of a potential"
    )
    parser.add_argument("--out", required=True, type=Path, help="OUT.pt2")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64"],
        default=None,
        help="precision of the network; by default that of the potential",
    )
    return parser
