"""``atomeq potentials``: those that are here, and those that can be installed."""

from jsonargparse import Namespace

from atomeq.cli.terminal import say, show_table
from atomeq.potential.catalogue import CATALOGUE, install_potential, installed_name
from atomeq.potential.folders import find_potential, installed_potentials, shipped_potentials


def potentials(options: Namespace) -> int:
    """List, show or install.

    Raises:
        ValueError: A name is missing, or given where none is wanted.
    """
    if options.action == "list":
        return _list()
    if options.name is None:
        raise ValueError(f"{options.action} what? Give a NAME; `atomeq potentials list` shows them")
    if options.action == "show":
        say((find_potential(options.name) / "README.md").read_text(encoding="utf-8"))
        return 0
    folder = install_potential(
        options.name,
        file=options.file,
        modal=options.modal,
        zbl=options.zbl,
        overwrite=options.overwrite,
    )
    published = CATALOGUE[options.name]
    say(f"installed {folder.name} in {folder}")
    say(f"licence: {published.licence}; please cite {published.authors}")
    return 0


def _list() -> int:
    here = {name: "shipped" for name in shipped_potentials()}
    here |= {name: "installed" for name in installed_potentials()}
    rows = [(name, state, str(find_potential(name))) for name, state in here.items()]
    for name, published in CATALOGUE.items():
        names = [installed_name(name, modal) for modal in published.modalities or (None,)]
        if not all(known in here for known in names):
            choice = (
                f", --modal {' or '.join(published.modalities)}" if published.modalities else ""
            )
            gate = "; ask for it first" if getattr(published.source, "gated", "") else ""
            rows.append((name, "to install", f"{published.trained_on}{choice}{gate}"))
    show_table(("potential", "", "where, or trained on"), rows, most=len(rows))
    return 0
