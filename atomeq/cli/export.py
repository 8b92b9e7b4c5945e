"""``atomeq export``: a potential becomes one file that others run."""

from jsonargparse import Namespace

from atomeq.calculators.metatomic import export_metatomic
from atomeq.cli.terminal import say
from atomeq.potential.checkpoint import resolve_dtype
from atomeq.potential.compiled import read_metadata
from atomeq.potential.export import export_potential


def export(options: Namespace) -> int:
    """Compile, and tell what for; or write what engines with metatomic load.

    Raises:
        ValueError: A device for a model that computes where its engine does.
    """
    dtype = resolve_dtype(options.dtype)
    if options.format == "metatomic":
        if options.device is not None:
            raise ValueError("--device is of compiled libraries; metatomic's engines choose theirs")
        path = export_metatomic(options.potential, options.out, dtype=dtype)
        say(f"{path}: energies of structures and atoms, for engines with metatomic")
        return 0
    path = export_potential(options.potential, options.out, dtype=dtype, device=options.device)
    told = read_metadata(path)
    processor = told["machine"].get("GPU", told["machine"]["processor"])
    say(
        f"{path}: {', '.join(told['properties'])} in {told['dtype']} for {processor}, torch "
        f"{told['machine']['torch']}; weights {told['sha256'][:12]}…"
    )
    return 0
