"""``atomeq convert``: a published checkpoint becomes a potential folder."""

from collections.abc import Sequence
from pathlib import Path

from atomeq.cli.terminal import Parser, say
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.import_official import convert_checkpoint

_DESCRIPTION = """\
Turn a published checkpoint of eSCN or EquiformerV2 (fairchem 1.x or older, .pt) into a potential
folder OUT with weights, options and a model card. Nothing in the file is executed; what is not
known in it is refused by its name.

example:
  atomeq convert eq2_31M_ec4_allmd.pt potentials/eq2-31M --grid-resolution 32
"""


def main(argv: Sequence[str]) -> int:
    """Run ``atomeq convert``.

    Args:
        argv: The verb and its options.

    Returns:
        0.
    """
    _, *words = argv
    arguments = build_parser().parse_args(words)
    folder = convert_checkpoint(
        arguments.checkpoint,
        arguments.out,
        use_ema=arguments.ema,
        grid_resolution=arguments.grid_resolution,
    )
    potential = load_potential(folder)
    n_parameters = sum(parameter.numel() for parameter in potential.model.parameters())
    say(f"{type(potential.model).__name__} with {n_parameters:,} parameters in {folder}")
    return 0


def build_parser() -> Parser:
    """Return the parser of the verb."""
    parser = Parser("atomeq convert", _DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a .pt file")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new potential")
    parser.add_argument(
        "--ema", action="store_true", help="take the running average of the weights"
    )
    parser.add_argument(
        "--grid-resolution",
        type=int,
        default=None,
        help="finer grids on the sphere than the checkpoint's, 32 say: slower, more equivariant",
    )
    return parser
