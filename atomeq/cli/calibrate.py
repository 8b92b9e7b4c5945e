"""``atomeq calibrate``: a potential learns how far off it may be."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jsonargparse import Namespace

from atomeq.cli.door import ignorable
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.data.ase_files import read_structures
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import load_potential, metadata_of, save_potential
from atomeq.potential.folders import find_potential
from atomeq.potential.mean import MeanPotential, read_committee, rescaling_of, write_committee
from atomeq.potential.potential import Potential
from atomeq.potential.selection import batches_of
from atomeq.potential.uncertainty import calibrated


def calibrate(options: Namespace) -> int:
    """Calibrate, save, and tell how many errors lie within what is promised."""
    potential = load_potential(options.potential, device=options.device)
    potential.ignore(ignorable(options.ignore))
    source = find_potential(options.potential)
    if isinstance(potential, MeanPotential):
        return _rescale(options, potential, source)
    if not options.train:
        raise ValueError("a single potential knows its doubt from --train, what it was trained on")
    metadata = metadata_of(source)
    training = _batches(options.train, potential, "training set")
    held_out = _batches(options.held_out, potential, "held out")
    potential.uncertainty, coverage = calibrated(potential, training, held_out)
    folder = save_potential(potential, options.out, metadata={**metadata, "coverage": coverage})
    if (card := source / "README.md").is_file() and not folder.samefile(source):
        shutil.copyfile(card, folder / "README.md")
    _tell(coverage, folder)
    return 0


def _rescale(options: Namespace, committee: MeanPotential, source: Path) -> int:
    """Write the committee with its spread rescaled."""
    factors, coverage = rescaling_of(committee, _batches(options.held_out, committee, "held out"))
    members, _ = read_committee(source)
    options.out.mkdir(parents=True, exist_ok=True)
    for member in members if not options.out.samefile(source) else []:
        shutil.copytree(source / member, options.out / member, dirs_exist_ok=True)
    write_committee(options.out, members, rescaling=factors)
    told = ", ".join(f"{name} by {factor:.3g}" for name, factor in factors.items())
    say(f"the spread of {len(members)} members is multiplied: {told}")
    _tell(coverage, options.out)
    return 0


def _tell(coverage: Mapping[str, float], folder: Path) -> None:
    rows = [
        [name, f"{coverage[f'{name}_68']:.1%}", f"{coverage[f'{name}_95']:.1%}"]
        for name in ("energy", "forces")
    ]
    show_table(["errors held out of", "within σ (68.3 %)", "within 2 σ (95.4 %)"], rows)
    say(f"{folder} knows how far off it may be")


def _batches(files: Sequence[str], potential: Potential, name: str) -> Iterator[AtomGraph]:
    """Yield the labelled structures of files as batches with edges."""
    structures = [atoms for file in files for atoms in read_structures(file)]
    meter = Meter(name, len(structures), unit="structures")
    with meter.running():
        yield from batches_of(potential, structures, meter.advance)
