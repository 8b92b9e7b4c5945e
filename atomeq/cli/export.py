"""``atomeq export``: a potential becomes one file that others run."""

from jsonargparse import Namespace

from atomeq.calculators.metatomic import export_metatomic
from atomeq.cli.terminal import say
from atomeq.potential.checkpoint import resolve_dtype
from atomeq.potential.compiled import read_metadata
from atomeq.potential.export import export_potential


def export(options: Namespace) -> int:
    """Compile, and tell what for; or write what engines with metatomic load."""
    if options.format == "metatomic":
        path = export_metatomic(options.potential, options.out, dtype=resolve_dtype(options.dtype))
        say(f"{path}: energies of structures and atoms, for engines with metatomic")
        return 0
    path = export_potential(options.potential, options.out, dtype=resolve_dtype(options.dtype))
    told = read_metadata(path)
    say(
        f"{path}: {', '.join(told['properties'])} in {told['dtype']} for "
        f"{told['machine']['processor']}, torch {told['machine']['torch']}; weights "
        f"{told['sha256'][:12]}…"
    )
    return 0
