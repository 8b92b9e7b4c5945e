"""``atomeq convert``: a published checkpoint becomes a potential folder."""

from jsonargparse import Namespace

from atomeq.cli.terminal import say
from atomeq.potential.checkpoint import load_potential, read_document
from atomeq.potential.convert import convert_checkpoint


def convert(options: Namespace) -> int:
    """Convert, and read what came out."""
    folder = convert_checkpoint(
        options.checkpoint,
        options.out,
        use_ema=options.ema,
        grid_resolution=options.grid_resolution,
        modal=options.modal,
        head=options.head,
        config=options.config,
        zbl=options.zbl,
    )
    heads = read_document(folder).get("heads")
    potential = load_potential(f"{folder}@{heads[0]}" if heads else folder)
    n_parameters = sum(parameter.numel() for parameter in potential.model.parameters())
    chosen = f", with the heads {', '.join(heads)}" if heads else ""
    say(f"{type(potential.model).__name__} with {n_parameters:,} parameters in {folder}{chosen}")
    return 0
