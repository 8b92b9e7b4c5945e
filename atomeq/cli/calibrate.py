"""``atomeq calibrate``: a potential learns how far off it may be."""

import shutil
from collections.abc import Iterator, Sequence

from jsonargparse import Namespace

from atomeq.cli.door import ignorable
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.data.ase_files import read_structures
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import load_potential, save_potential
from atomeq.potential.folders import CONFIG_FILE, find_potential
from atomeq.potential.potential import Potential
from atomeq.potential.selection import batches_of
from atomeq.potential.uncertainty import calibrated
from atomeq.potential.untrusted import read_yaml


def calibrate(options: Namespace) -> int:
    """Calibrate, save, and tell how many errors lie within what is promised."""
    potential = load_potential(options.potential, device=options.device)
    potential.ignore(ignorable(options.ignore))
    source = find_potential(options.potential)
    metadata = read_yaml(source / CONFIG_FILE).get("metadata", {})
    training = _batches(options.train, potential, "training set")
    held_out = _batches(options.held_out, potential, "held out")
    potential.uncertainty, coverage = calibrated(potential, training, held_out)
    folder = save_potential(potential, options.out, metadata={**metadata, "coverage": coverage})
    if (card := source / "README.md").is_file() and not folder.samefile(source):
        shutil.copyfile(card, folder / "README.md")
    rows = [
        [name, f"{coverage[f'{name}_68']:.1%}", f"{coverage[f'{name}_95']:.1%}"]
        for name in ("energy", "forces")
    ]
    show_table(["errors held out of", "within σ (68.3 %)", "within 2 σ (95.4 %)"], rows)
    say(f"{folder} knows how far off it may be")
    return 0


def _batches(files: Sequence[str], potential: Potential, name: str) -> Iterator[AtomGraph]:
    """Yield the labelled structures of files as batches with edges."""
    structures = [atoms for file in files for atoms in read_structures(file)]
    meter = Meter(name, len(structures), unit="structures")
    with meter.running():
        yield from batches_of(potential, structures, meter.advance)
