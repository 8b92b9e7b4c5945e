"""``atomeq export``: a potential becomes one compiled file."""

import torch
from jsonargparse import Namespace

from atomeq.cli.terminal import say
from atomeq.potential.compiled import read_metadata
from atomeq.potential.export import export_potential


def export(options: Namespace) -> int:
    """Compile, and tell what for."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    path = export_potential(options.potential, options.out, dtype=dtype)
    told = read_metadata(path)
    say(
        f"{path}: {', '.join(told['properties'])} in {told['dtype']} for "
        f"{told['machine']['processor']}, torch {told['machine']['torch']}; weights "
        f"{told['sha256'][:12]}…"
    )
    return 0
