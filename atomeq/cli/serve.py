"""``atomeq serve``: energies and forces for other codes, by the socket protocol of i-PI."""

from ase.calculators.socketio import SocketClient
from jsonargparse import Namespace

from atomeq.calculators.ase import has_volume
from atomeq.cli.terminal import say
from atomeq.cli.verbs import prepare
from atomeq.graph.convert import StructureError


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
