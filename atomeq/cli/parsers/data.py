"""Command lines of ``atomeq data ...``, ``atomeq is2re`` and ``atomeq rollout``."""

from collections.abc import Sequence
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from atomeq.cli.door import (
    data_source,
    device_name,
    existing_file,
    refuse_old_files,
    refuse_old_output,
)
from atomeq.cli.parsers.simulation import add_ignore_option
from atomeq.cli.terminal import Parser, say
from atomeq.files import refuse_unwritable
from atomeq.potential.folders import find_potential, find_propagator

_DATA = """\
Fetch public data sets and turn OC20's files into those that one trains on.

commands:
  stats     what is in a data set: ranges, copies, leaks between its parts, outliers
  list      the data sets, their licences and sources
  download  fetch a data set and check that it is what was published
  convert   rewrite data as lmdb, aselmdb or raw, from any of these
  metadata  write metadata.npz: atoms of each frame and elements, for batches bounded by atoms
  nbody     simulate few-body systems, charged or heavy, into an .npz

  atomeq data COMMAND --help explains a command.
"""

_DESCRIPTIONS = {
    "list": "Show the data sets that can be downloaded, their licences and sources.\n",
    "stats": """\
Look through labelled structures before the first step: elements, ranges of energies, forces and
stresses, copies (rotated, reflected, reordered or repeated cells too) within a set and between
sets, outliers, sums of forces, energies of elements and the shortest distance of each pair. SOURCE
is a file, a folder whose files are sets, the name of a folder in $ATOMEQ_DATA, or the YAML of a
data set or an experiment, whose division it looks at.

examples:
  atomeq data stats acac
  atomeq data stats train.extxyz test.extxyz --labels energy=REF_energy,forces=REF_forces
  atomeq data stats configs/experiment/cu_pbe.yaml --json
""",
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

Where TARGET ends in .h5 or .zarr the source is any file of structures, and training reads from it
what it wants, whether it fits into memory or not.

examples:
  atomeq data convert data/oc20/oc20-s2ef-200k data/oc20/s2ef_200k --format lmdb
  atomeq data convert train.extxyz.gz train.h5 --labels energy=REF_energy
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

_ROLLOUT = """\
Carry particles on from a frame of a file with a trained propagator. Few-body systems are .npz files
(see `atomeq data nbody --help`), a molecule is anything that ASE reads, with velocities. OUT holds
the start and the particles after every long step; OUT.summary.json what was done and, with
--reference, the errors of the steps whose times the reference has; OUT.png draws both.

A network that gives positions only gets its velocities by the trapezoidal rule.

examples:
  atomeq data nbody systems.npz --num 100 --frames 30,40,50
  atomeq rollout systems.npz --propagator runs/nbody_segno/propagator --frame 0 --steps 2 \\
      --reference systems.npz --out rollout.npz
  atomeq rollout md.extxyz --propagator runs/molecule_segno/propagator --steps 10 --out long.extxyz
"""

_WORK = {
    "stats": "data_stats:show_statistics",
    "list": "data:list_sets",
    "download": "data:download_set",
    "convert": "data:convert_files",
    "metadata": "data:metadata",
    "nbody": "data:nbody",
}


def main(argv: Sequence[str]) -> int:
    """Parse a command of ``atomeq data``, ``atomeq is2re`` or ``atomeq rollout``, and run it.

    Args:
        argv: The verb, the command and its options.

    Returns:
        0.
    """
    verb, *words = argv
    if verb == "is2re":
        return _is2re_parser().serve(words, "atomeq.cli.data:is2re")
    if verb == "rollout":
        return _rollout_parser().serve(words, "atomeq.cli.rollout:rollout")
    if not words or words[0] in ("-h", "--help"):
        say(f"usage: atomeq data COMMAND ...\n\n{_DATA}")
        return 0
    command, *words = words
    if command not in _DESCRIPTIONS:
        raise ValueError(f"there is no command {command!r}; there are {', '.join(_DESCRIPTIONS)}")
    return _data_parser(command).serve(words, f"atomeq.cli.{_WORK[command]}")


def _data_parser(command: str) -> Parser:
    parser = Parser(f"atomeq data {command}", _DESCRIPTIONS[command])
    if command == "download":
        parser.add_argument(
            "name", metavar="NAME", type=str, nargs="?", help="a data set from the list"
        )
        parser.add_argument(
            "--folder", type=str, default=None, help="where data sets are kept; $ATOMEQ_DATA"
        )
        parser.add_argument(
            "--source", type=str, default=None, help="another address of the same files, a mirror"
        )
        parser.add_argument("--keep-archive", action="store_true", help="keep OC20's tar file too")
        return parser
    if command == "list":
        return parser
    if command == "stats":
        parser.add_argument(
            "sources", metavar="SOURCE", type=str, nargs="+", help="file, folder, name or YAML"
        )
        _add_labels(parser)
        parser.add_argument("--json", action="store_true", help="everything, as JSON")
        return parser
    if command == "nbody":
        return _add_nbody_options(parser)
    parser.add_argument("source", metavar="SOURCE", type=str, help="folder or file of OC20 data")
    parser.door(source=data_source)
    if command == "metadata":
        parser.add_overwrite()
    if command == "convert":
        parser.add_argument("target", metavar="TARGET", type=str, help="new folder, .h5 or .zarr")
        parser.add_argument(
            "--format",
            type=Literal["lmdb", "aselmdb", "raw", "hdf5", "zarr"] | None,
            default=None,
            help="lmdb, aselmdb, raw, hdf5, zarr; by default what the suffix says, else lmdb",
        )
        parser.add_argument(
            "--energy",
            type=Literal["stored", "total", "referenced"],
            default="stored",
            help="the one energy of an lmdb; stored is referenced where the source has a reference",
        )
        parser.add_argument(
            "--frames-per-file", type=PositiveInt, default=50_000, help="frames in one shard"
        )
        _add_labels(parser)
        parser.add_overwrite()
    return parser


def _add_labels(parser: Parser) -> None:
    text = "what the files call them: energy=KEY,forces=KEY,stress=KEY,scalar=KEY"
    parser.add_argument("--labels", type=str, default="", help=text)


def _add_nbody_options(parser: Parser) -> Parser:
    parser.add_argument("out", metavar="OUT", type=str, help="OUT.npz")
    parser.add_overwrite(refuse_old_files("out"))
    parser.add_argument(
        "--system", type=Literal["charged", "gravity"], default="charged", help="forces"
    )
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
    parser.add_overwrite(refuse_old_files("out"))
    parser.add_argument("--fmax", type=PositiveFloat, default=0.02, help="largest force, eV/Å")
    parser.add_argument("--max-steps", type=PositiveInt, default=300, help="end a relaxation after")
    parser.add_argument("--limit", type=PositiveInt, default=None, help="only the first so many")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:1")
    add_ignore_option(parser)
    parser.door(
        source=data_source, potential=find_potential, out=refuse_unwritable, device=device_name
    )
    return parser


def _rollout_parser() -> Parser:
    parser = Parser("atomeq rollout", _ROLLOUT)
    parser.add_argument("input", metavar="INPUT", type=str, help="systems.npz or structures")
    parser.add_argument(
        "--propagator", required=True, type=str, help="folder that a fit of propagation has left"
    )
    parser.add_argument("--out", required=True, type=str, help="OUT.npz, OUT.extxyz or OUT.traj")
    parser.add_overwrite(refuse_old_output("rollout"))
    parser.add_argument("--steps", type=PositiveInt, default=1, help="number of long steps")
    parser.add_argument("--frame", type=int, default=-1, help="of the input to start from")
    parser.add_argument("--reference", type=str, default=None, help="true motion to compare with")
    parser.add_argument(
        "--frame-time",
        type=PositiveFloat,
        default=None,
        help="fs between frames of structures that do not say it",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64"],
        default=None,
        help="precision of the network; by default that of the propagator",
    )
    parser.door(
        input=existing_file, propagator=find_propagator, reference=existing_file, device=device_name
    )
    return parser
