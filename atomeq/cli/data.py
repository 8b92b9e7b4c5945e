"""``atomeq data ...`` and ``atomeq is2re``: public data sets, OC20's files and its tasks."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.relaxation import relax_frame
from atomeq.cli.terminal import Meter, Parser, say, show_table
from atomeq.data.ase_files import DATA_VARIABLE, DataError, expand_data_path
from atomeq.data.download import DATA_SETS, download
from atomeq.data.molecule_download import MOLECULE_SETS, download_molecules
from atomeq.data.nbody import NBodyRecipe, System
from atomeq.data.oc20 import open_frames
from atomeq.data.oc20_download import ARCHIVES, Archive, fetch, unpack
from atomeq.data.oc20_frame import EnergyKind
from atomeq.data.oc20_write import FileFormat, convert, write_metadata
from atomeq.data.recordings import simulated, write_systems
from atomeq.files import refuse_unwritable, write_atomically
from atomeq.training.oc20_metrics import (
    ENERGY_THRESHOLD,
    average_distance_within_threshold,
    mean_distance,
)

_MIB = 2**20
_DATA = """\
Fetch public data sets and turn OC20's files into those that one trains on.

commands:
  list      the data sets, their licences and sources
  download  fetch a data set and check that it is what was published
  convert   rewrite data as lmdb, aselmdb or raw, from any of these
  metadata  write metadata.npz: atoms of each frame and elements, for batches bounded by atoms
  nbody     simulate few-body systems, charged or heavy, into an .npz

  atomeq data COMMAND --help explains a command.
"""
_DESCRIPTIONS = {
    "download": """\
Fetch a public data set and check that it is what was published; `atomeq data list` names them. A
download that broke off goes on when the command is given again. The archives of OC20 are unpacked
in FOLDER/oc20, any other set is put in FOLDER/NAME.

examples:
  atomeq data download acac --folder data
  atomeq data download oc20-s2ef-200k --folder data
""",
    "convert": """\
Rewrite OC20 data in another format, with metadata.npz. The source may be raw S2EF (*.extxyz[.xz]
with *.txt[.xz]), an LMDB of pickled records, which are read without executing them, or an ASE-LMDB.

example:
  atomeq data convert data/oc20/oc20-s2ef-200k data/oc20/s2ef_200k --format lmdb
""",
    "metadata": """\
Read a folder of OC20 data once and write metadata.npz into it: the number of atoms of each frame
and the elements that occur.

example:
  atomeq data metadata data/oc20/s2ef_200k
""",
    "nbody": """\
Simulate systems of few bodies, as propagators are trained on, into OUT.npz: pos and velocities
(n_systems, n_frames, n_bodies, 3), charges or masses (n_systems, n_bodies), times (n_frames,). A
frame is 0.1 units of time.

example:
  atomeq data nbody systems.npz --system charged --num 100 --frames 30,40,50
""",
}
_IS2RE = """\
Relax the initial structures of IS2RE data with a potential and compare with the energies and
positions of DFT: energy MAE, EwT and ADwT of the free atoms. For IS2RE by direct prediction train
on IS2RE data (OC20DataModule) and use `atomeq test`.

example:
  atomeq is2re data/oc20/is2re/val_id --potential runs/oc20/potential --out is2re_val_id.json
"""


def main(argv: Sequence[str]) -> int:
    """Run a command of ``atomeq data``, or ``atomeq is2re``.

    Args:
        argv: The verb, the command and its options.

    Returns:
        0.
    """
    verb, *words = argv
    if verb == "is2re":
        return is2re(_is2re_parser().parse_args(words))
    if not words or words[0] in ("-h", "--help"):
        say(f"usage: atomeq data COMMAND ...\n\n{_DATA}")
        return 0
    if words[0] == "list":
        return list_sets()
    commands: dict[str, Callable[[Namespace], int]] = {
        "download": download_set,
        "convert": convert_files,
        "metadata": metadata,
        "nbody": nbody,
    }
    if words[0] not in commands:
        raise ValueError(f"there is no command {words[0]!r}; there are {', '.join(commands)}")
    return commands[words[0]](_data_parser(words[0]).parse_args(words[1:]))


def _data_parser(command: str) -> Parser:
    parser = Parser(f"atomeq data {command}", _DESCRIPTIONS[command])
    if command == "download":
        parser.add_argument(
            "name", metavar="NAME", type=str, nargs="?", help="a data set from the list"
        )
        parser.add_argument(
            "--folder", type=str, default=None, help=f"where data sets are kept; ${DATA_VARIABLE}"
        )
        parser.add_argument(
            "--source", type=str, default=None, help="another address of the same files, a mirror"
        )
        parser.add_argument("--keep-archive", action="store_true", help="keep OC20's tar file too")
        return parser
    if command == "nbody":
        return _add_nbody_options(parser)
    parser.add_argument("source", metavar="SOURCE", type=str, help="folder or file of OC20 data")
    if command == "convert":
        parser.add_argument("target", metavar="TARGET", type=str, help="new folder")
        parser.add_argument("--format", type=FileFormat, default="lmdb", help="lmdb, aselmdb, raw")
        parser.add_argument(
            "--energy",
            type=Literal["stored", "total", "referenced"],
            default="stored",
            help="the one energy of an lmdb; stored is referenced where the source has a reference",
        )
        parser.add_argument(
            "--frames-per-file", type=PositiveInt, default=50_000, help="frames in one shard"
        )
    return parser


def _add_nbody_options(parser: Parser) -> Parser:
    parser.add_argument("out", metavar="OUT", type=str, help="OUT.npz")
    parser.add_argument("--system", type=System, default="charged", help="charged or gravity")
    parser.add_argument("--num", type=PositiveInt, default=100, help="number of systems")
    parser.add_argument("--n-bodies", type=PositiveInt, default=5, help="bodies of a system")
    parser.add_argument("--frames", type=str, default="0,10,20", help="frames to keep")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of the systems")
    return parser


def _is2re_parser() -> Parser:
    parser = Parser("atomeq is2re", _IS2RE)
    parser.add_argument("source", metavar="SOURCE", type=str, help="folder or file of IS2RE data")
    parser.add_argument(
        "--potential", required=True, type=str, help="name or folder of a potential"
    )
    parser.add_argument("--out", required=True, type=str, help="OUT.json: metrics and systems")
    parser.add_argument("--fmax", type=PositiveFloat, default=0.02, help="largest force, eV/Å")
    parser.add_argument("--max-steps", type=PositiveInt, default=300, help="end a relaxation after")
    parser.add_argument("--limit", type=PositiveInt, default=None, help="only the first so many")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:1")
    return parser


def nbody(options: Namespace) -> int:
    """Simulate few-body systems."""
    if Path(options.out).suffix != ".npz":
        raise ValueError(f"cannot write {options.out}: give it the suffix .npz")
    refuse_unwritable(options.out)
    if not all(word.strip().isdigit() for word in options.frames.split(",")):
        raise ValueError(f"frames are numbers, as in 30,40,50; got {options.frames!r}")
    recipe = NBodyRecipe(
        options.system,
        options.n_bodies,
        num_train=options.num,
        num_val=0,
        num_test=0,
        seed=options.seed,
        frames=tuple(int(word) for word in options.frames.split(",")),
    )
    write_systems(options.out, simulated(recipe))
    say(f"wrote {options.out}: {options.num} systems of {options.n_bodies} bodies")
    return 0


def list_sets() -> int:
    """Show the data sets that can be downloaded."""
    rows = [[name, known.licence, known.source] for name, known in DATA_SETS.items()]
    rows += [
        [name, "CC-BY-4.0", f"{archive.url} ({archive.size} unpacked)"]
        for name, archive in ARCHIVES.items()
    ]
    rows += [
        [name, known.licence, f"{known.files[0].url} and {len(known.files) - 1} more"]
        for name, known in MOLECULE_SETS.items()
    ]
    show_table(["set", "licence", "source"], rows, most=len(rows))
    return 0


def download_set(options: Namespace) -> int:
    """Fetch a data set."""
    known = (*DATA_SETS, *MOLECULE_SETS, *ARCHIVES)
    if options.name is None:
        raise DataError(f"name a data set to download: {', '.join(known)}")
    if options.name not in known:
        raise DataError(
            f"there is no data set {options.name!r} to download; known: {', '.join(known)}"
        )
    folder = options.folder or os.environ.get(DATA_VARIABLE)
    if not folder:
        raise DataError(f"say where to put it: --folder FOLDER, or set {DATA_VARIABLE}")
    logging.getLogger("atomeq").setLevel(logging.INFO)
    if options.name in DATA_SETS:
        paths = download(options.name, folder, source=options.source)
        say(f"{options.name}: {len(paths)} files in {paths[0].parent}")
        return 0
    if options.name in MOLECULE_SETS:
        paths = download_molecules(options.name, folder, source=options.source)
        say(f"{options.name}: {len(paths)} files in {paths[0].parent}")
        return 0
    archive = ARCHIVES[options.name]
    if options.source is not None:
        url = f"{options.source.rstrip('/')}/{archive.file_name}"
        archive = Archive(url, archive.md5, archive.size)
    target = Path(folder) / "oc20" / options.name
    _fetch_archive(archive, target, keep=options.keep_archive)
    say(f"{options.name} is in {target}; its MD5 sum is {archive.md5}, as published")
    return 0


def _fetch_archive(archive: Archive, target: Path, *, keep: bool) -> None:
    if target.exists():
        raise DataError(f"{target} exists already; nothing was fetched")
    meter: Meter | None = None

    def report(present: int, total: int) -> None:
        nonlocal meter
        if meter is None:
            meter = Meter(archive.file_name, max(1, total // _MIB), unit="MiB")
        meter.advance(present // _MIB - meter.done)

    file = fetch(archive, target.parent, report=report)
    unpack(file, target)
    if not keep:
        file.unlink()


def convert_files(options: Namespace) -> int:
    """Rewrite data in another format."""
    meter: Meter | None = None

    def report(done: int, total: int) -> None:
        nonlocal meter
        if meter is None:
            meter = Meter("convert", total, unit="frames")
        meter.advance(done - meter.done)

    file_format: FileFormat = options.format
    energy: EnergyKind = options.energy
    n_frames = convert(
        expand_data_path(options.source),
        options.target,
        file_format=file_format,
        energy=energy,
        frames_per_file=options.frames_per_file,
        report=report,
    )
    say(f"{n_frames} frames in {options.target}")
    return 0


def metadata(options: Namespace) -> int:
    """Write metadata.npz."""
    meter: Meter | None = None

    def report(done: int, total: int) -> None:
        nonlocal meter
        if meter is None:
            meter = Meter("metadata", total, unit="frames")
        meter.advance(done - meter.done)

    say(f"wrote {write_metadata(expand_data_path(options.source), report=report)}")
    return 0


def is2re(options: Namespace) -> int:
    """Relax initial structures and compare with DFT."""
    refuse_unwritable(options.out)
    frames = open_frames(expand_data_path(options.source))
    calculator = AtomeqCalculator(options.potential, device=options.device)
    n_systems = min(len(frames), options.limit or len(frames))
    rows: list[dict[str, Any]] = []
    meter = Meter("is2re", n_systems, unit="systems")
    with meter.running():
        for index in range(n_systems):
            frame = frames[index]
            relaxed = relax_frame(frame, calculator, fmax=options.fmax, max_steps=options.max_steps)
            row: dict[str, Any] = {
                "sid": frame.sid,
                "energy": relaxed.energy,
                "steps": relaxed.n_steps,
                "converged": relaxed.converged,
            }
            if frame.relaxed_energy is not None:
                row["energy_error"] = relaxed.energy - frame.relaxed_energy
            if frame.relaxed_positions is not None and not frame.fixed.all():
                free = ~frame.fixed
                row["mean_distance"] = mean_distance(
                    relaxed.positions[free], frame.relaxed_positions[free], frame.cell
                )
            rows.append(row)
            meter.advance()
    metrics = _is2re_metrics(rows)
    with write_atomically(options.out) as partial:
        partial.write_text(json.dumps({"metrics": metrics, "systems": rows}, indent=2) + "\n")
    show_table(["metric", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()])
    return 0


def _is2re_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    errors = np.abs([row["energy_error"] for row in rows if "energy_error" in row])
    distances = [row["mean_distance"] for row in rows if "mean_distance" in row]
    metrics: dict[str, float] = {
        "systems": len(rows),
        "converged": sum(row["converged"] for row in rows),
    }
    if len(errors):
        metrics["energy MAE, eV"] = float(errors.mean())
        metrics["EwT"] = float((errors < ENERGY_THRESHOLD).mean())
    if distances:
        metrics["ADwT"] = average_distance_within_threshold(distances)
    return metrics
