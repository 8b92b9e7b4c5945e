"""``atomeq serve``: energies and forces for other codes, by the socket protocol of i-PI."""

from collections.abc import Sequence

from ase.calculators.socketio import SocketClient
from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from atomeq.calculators.ase import has_volume
from atomeq.cli.terminal import Parser, say
from atomeq.cli.verbs import prepare
from atomeq.graph.convert import StructureError

_DESCRIPTION = """\
Compute energy, forces and virial for a code that moves atoms itself and speaks the protocol of
i-PI: i-PI, ASE's SocketIOCalculator and others. That code listens; this verb connects to it and
serves until it closes the connection. INPUT tells the elements, in the order in which the other
code sends positions.

examples:
  atomeq serve cu.cif --potential cu-pbe --unix atomeq
  atomeq serve cu.cif --potential cu-pbe --host localhost --port 31415
"""


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: The verb and its options.

    Returns:
        0 when the other side has closed the connection.
    """
    verb, *words = argv
    return serve(build_parser(verb).parse_args(words))


def build_parser(verb: str) -> Parser:
    """Return the parser."""
    parser = Parser(f"atomeq {verb}", _DESCRIPTION)
    parser.add_argument("input", metavar="INPUT", type=str, help="any structure file ASE reads")
    parser.add_argument(
        "--potential", required=True, type=str, help="name or folder of a potential"
    )
    parser.add_argument(
        "--unix", type=str, default=None, help="name of a UNIX socket (/tmp/ipi_NAME)"
    )
    parser.add_argument("--host", type=str, default="localhost", help="where the other code is")
    parser.add_argument("--port", type=PositiveInt, default=31415, help="its port")
    parser.add_argument("--timeout", type=PositiveFloat, default=None, help="s; by default never")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype", type=str, default=None, help="float32 or float64; by default the potential's"
    )
    return parser


def serve(options: Namespace) -> int:
    """Connect and answer until the other side has had enough."""
    calculator, structures = prepare(options, index="-1:")
    atoms = structures[-1]
    atoms.calc = calculator
    where = f"/tmp/ipi_{options.unix}" if options.unix else f"{options.host}:{options.port}"
    try:
        client = SocketClient(
            host=options.host, port=options.port, unixsocket=options.unix, timeout=options.timeout
        )
    except OSError as error:
        raise ConnectionError(
            f"nobody listens at {where} ({error}); start the other code first"
        ) from error
    say(f"connected to {where}")
    with_stress = has_volume(atoms) and "stress" in calculator.implemented_properties
    served = 0
    try:
        for _ in client.irun(atoms, use_stress=with_stress):
            served += 1
    except StructureError as error:
        raise ValueError(
            f"evaluation {served + 1}: {error}; the other code sent positions of other atoms or "
            "its run broke down"
        ) from error
    say(f"served {served} evaluations")
    return 0
