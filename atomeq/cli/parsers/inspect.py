"""Command lines of ``atomeq check``, ``doctor``, ``convert``, ``calibrate`` and their like."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from atomeq.cli.door import (
    checkable,
    data_source,
    device_name,
    existing_file,
    output_format,
    refuse_old_files,
    refuse_old_output,
    refuse_old_potential,
)
from atomeq.cli.parsers.simulation import add_ignore_option
from atomeq.cli.terminal import Parser
from atomeq.files import refuse_unwritable
from atomeq.potential.folders import ABOUT_FILE, METRICS_FILE, find_potential, find_single_potential

_CHECK = """\
Measure the laws of physics and of good behaviour on a potential or on any ASE calculator. One line
per law with the measured figure; exit code 1 says that a law is broken. A model may name laws that
its method cannot keep: they are measured, and no fault.

  --quick    derivatives, symmetries, extensivity, smoothness, threads, copies, refusals: seconds
  (default)  the drift of the energy in molecular dynamics as well: minutes
  --full     spawned processes and 26 degenerate structures as well (slabs without vacuum, atoms
             far outside of the cell, NaN, ...), each to be answered rightly or refused clearly

The YAML of a model is checked with random weights. These know no repulsion, so give their dynamics
a smaller --timestep and fewer --picoseconds, or leave it out by --quick.

examples:
  atomeq check cu-pbe --full
  atomeq check configs/model/egnn.yaml --quick
  atomeq check ase.calculators.emt:EMT --elements Cu,Al --quick
"""

_DOCTOR = """\
Tell what atomeq finds on this machine: versions, devices, data, potentials, backends.

example:
  atomeq doctor
"""
_CONVERT = """\
Turn a published checkpoint of eSCN, EquiformerV2, eSEN or EquiformerV3 (fairchem 1.x, .pt), of
SevenNet (.pth) or of MACE (.model) into a potential folder OUT with weights, options and a model
card. Nothing in the file is executed; what is not known in it is refused by its name.

examples:
  atomeq convert checkpoint_sevennet_0.pth my-sevennet
  atomeq convert mace-mh-1.model my-mace --head omat_pbe
  atomeq convert mace_state.pt my-mace --config options.yaml    (a state dict)
  atomeq convert eq2_31M_ec4_allmd.pt potentials/eq2-31M --grid-resolution 32
"""
_POTENTIALS = """\
Potentials by name: "list" those that are here and those that can be installed, "show" the model
card of one, "install" a published one. Its file is downloaded, from the package index or a hub,
checked and read as data, nothing of it is executed; the potential goes to the user's data folder
(ATOMEQ_POTENTIALS names another one), and every --potential knows it by its name. What is only
given to those who agree to its terms you download yourself, and give by --from.

examples:
  atomeq potentials list
  atomeq potentials install sevennet-0
  atomeq potentials install sevennet-0 --zbl    (as sevennet-0-zbl)
  atomeq potentials install sevennet-mf-0 --modal PBE --from sevenn-0.13.0-py3-none-any.whl
  atomeq potentials install eqv2-31m-oam --from eqV2_31M_omat_mp_salex.pt
"""
_EVALUATE = """\
Measure a potential: errors on labelled structures, in all, by kind and by element, with pictures of
labels against predictions; of a calibrated potential also what its uncertainties are worth. With
--properties also textbook properties of a crystal (lattice, elastic constants, vacancy, surfaces,
other structures, a dimer's core) beside the reference values that a YAML file names. OUT.json holds
it all, OUT.png the pictures. --scans compares energies along paths of structures. An experiment's
YAML stands for its test structures, whole ones where
it trains on reduced cells, and less the offset of stresses that it names. --card writes README.md
beside OUT.json, which is then the potential's metrics.json, around the text of its about.md.

examples:
  atomeq evaluate cu-pbe test.extxyz --kind tag --out cu.json
  atomeq evaluate cu-pbe --properties potentials/cu-pbe/references.yaml --out cu.json
"""
_CALIBRATE = """\
Teach a potential how far off it may be: the covariance of its last layer on its training set,
scaled so that 68 % of the errors of structures that it was not trained on lie within one standard
deviation. One pass over the files, no training. The potential in OUT gives the same energies and
forces, and beside them energy_uncertainty and forces_uncertainty: calculators, single-point and
screen tell them, relax and md stop by --max-uncertainty. Structures far from the training set are
told apart (extrapolation above 1), but how far off they are is not promised. Of a committee's
folder the spread of its members is rescaled so, without --train.

example:
  atomeq calibrate cu-pbe --train train.extxyz --held-out held_out.extxyz --out my-cu
"""
_SELECT = """\
Choose the structures of a pool that are worth labelling, by what a potential knows of them; labels
are not needed. OUT.extxyz has them, the most telling first, and OUT.summary.json the table: rank,
id (the hash of a structure, the same in every pool), score, file and frame, and the copies that
were left out. Copies count once, and those of the training set not at all.

  d-optimal  what enlarges the volume of the last layer's features most (default)
  farthest   what lies farthest, in these features, from all that is known
  spread     what a committee (`atomeq fit --seeds 4`) disagrees on most, or what a potential that
             `atomeq calibrate` has seen doubts most
  random     what the others are measured by

examples:
  atomeq select md.extxyz --potential my-cu --train train.extxyz --number 50 --out to_label.extxyz
  atomeq select md.extxyz --potential runs/cu/committee --by spread --number 9 --out chosen.extxyz
"""
_EXPORT = """\
Compile a potential for this machine: OUT.pt2 computes energy, forces and stress of structures of
any size without the package's operations, faster for small structures. It takes about a minute and
a C++ compiler; with --device cuda also a GPU like the one it is for, and NVIDIA's CUDA toolkit. The
file is a program: whoever loads it runs it, which in Python atomeq.load_compiled("OUT.pt2") does.

With --format metatomic it writes OUT.pt, a model for LAMMPS, GROMACS, i-PI and other codes that are
built with metatomic, which has to be installed here as well (pip install atomeq[metatomic]).

examples:
  atomeq export cu-pbe --out cu.pt2
  atomeq export cu-pbe --out cu.pt2 --device cuda
  atomeq export cu-pbe --format metatomic --out cu.pt
"""


def main(argv: Sequence[str]) -> int:
    """Parse one of the verbs and run it.

    Args:
        argv: The verb and its options.

    Returns:
        0, or 1 where a law is broken.
    """
    verb, *words = argv
    parser, work = {
        "check": (_check_parser, "atomeq.cli.inspect:check"),
        "doctor": (_doctor_parser, "atomeq.cli.inspect:doctor"),
        "convert": (_convert_parser, "atomeq.cli.convert:convert"),
        "potentials": (_potentials_parser, "atomeq.cli.potentials:potentials"),
        "evaluate": (_evaluate_parser, "atomeq.cli.evaluate:evaluate"),
        "select": (_select_parser, "atomeq.cli.select:choose"),
        "calibrate": (_calibrate_parser, "atomeq.cli.calibrate:calibrate"),
        "export": (_export_parser, "atomeq.cli.export:export"),
    }[verb]
    return parser().serve(words, work)


def _check_parser() -> Parser:
    parser = Parser("atomeq check", _CHECK)
    parser.add_argument(
        "target",
        metavar="TARGET",
        type=str,
        help="name or folder of a potential, YAML of a model, or module:factory that makes an ASE "
        "calculator",
    )
    parser.add_argument(
        "--elements",
        type=str,
        default=None,
        help="symbols it knows, as Cu,Al; found out by default",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="leave out the laws that take minutes")
    depth.add_argument("--full", action="store_true", help="measure every law there is")
    parser.add_argument("--only", type=str, default=None, help="laws by name, as rotation,pickling")
    parser.add_argument(
        "--structure",
        type=str,
        default=None,
        help="file with the start of the NVE law; by default example.extxyz of the potential",
    )
    parser.add_argument(
        "--picoseconds",
        type=PositiveFloat,
        default=None,
        help="of the NVE law; by default 5, less where that takes more than a minute",
    )
    parser.add_argument(
        "--timestep",
        type=PositiveFloat,
        default=None,
        help="of the NVE law, fs; by default 2, and 0.5 from a structure with hydrogen",
    )
    parser.add_argument(
        "--temperature", type=PositiveFloat, default=300.0, help="of the NVE law, K"
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda; of a potential")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64"],
        default="float64",
        help="of a potential; float32 gets wider tolerances",
    )
    parser.add_argument("--json", type=str, default=None, help="write the results there as well")
    parser.add_overwrite(refuse_old_files("json"))
    add_ignore_option(parser)
    parser.door(
        target=checkable, structure=existing_file, json=refuse_unwritable, device=device_name
    )
    return parser


def _doctor_parser() -> Parser:
    return Parser("atomeq doctor", _DOCTOR)


def _convert_parser() -> Parser:
    parser = Parser("atomeq convert", _CONVERT)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a .pt, .pth or .model file"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new potential")
    parser.add_overwrite(refuse_old_potential)
    parser.add_argument(
        "--ema", action="store_true", help="take the running average of the weights"
    )
    parser.add_argument(
        "--grid-resolution",
        type=int,
        default=None,
        help="finer grids on the sphere than the checkpoint's, 32 say: slower, more equivariant",
    )
    _published_options(parser)
    parser.add_argument(
        "--head", type=str, default=None, help="one head of a MACE of several; by default all"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        help="of a state dict of MACE: YAML that says its interactions and numbers of neighbours",
    )
    parser.door(checkpoint=existing_file, config=existing_file)
    return parser


def _published_options(parser: Parser) -> None:
    parser.add_argument(
        "--modal", type=str, default=None, help="level of theory, PBE say, of a SevenNet of several"
    )
    parser.add_argument(
        "--zbl",
        action="store_true",
        help="add the repulsion of nuclei where atoms are closer than in the data",
    )


def _potentials_parser() -> Parser:
    parser = Parser("atomeq potentials", _POTENTIALS)
    parser.add_argument("action", choices=("list", "show", "install"), help="what to do")
    parser.add_argument("name", metavar="NAME", nargs="?", type=str, default=None)
    parser.add_argument(
        "--from", dest="file", type=Path, default=None, help="the wheel or checkpoint on disk"
    )
    _published_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an installed one")
    return parser


def _evaluate_parser() -> Parser:
    parser = Parser("atomeq evaluate", _EVALUATE)
    parser.add_argument(
        "potential", metavar="POTENTIAL", type=str, help="name or folder of a potential"
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        type=str,
        help="structures with energies and forces, or the YAML of an experiment that has test sets",
    )
    parser.add_argument("--out", required=True, type=Path, help="OUT.json")
    parser.add_overwrite(_refuse_nothing_to_evaluate)
    parser.add_argument(
        "--kind",
        type=str,
        default=None,
        help="what atoms.info calls the kind of a structure; by default each file is one",
    )
    parser.add_argument(
        "--properties", type=Path, default=None, help="YAML of a crystal and reference values"
    )
    parser.add_argument(
        "--scans",
        nargs="+",
        type=str,
        default=[],
        help="files of structures with energies, each along a path; drawn beside OUT in scans.png",
    )
    parser.add_argument(
        "--card", action="store_true", help="write the model card of the potential in OUT's folder"
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64"],
        default=None,
        help="precision of the network on labels; by default that of the potential",
    )
    add_ignore_option(parser)
    parser.door(
        potential=find_potential,
        properties=existing_file,
        device=device_name,
        out=refuse_unwritable,
    )
    return parser


def _refuse_nothing_to_evaluate(options: Namespace) -> None:
    if not (options.files or options.properties or options.scans):
        raise ValueError("nothing to evaluate by: name files of labels, --scans or --properties")
    about = options.out.parent / ABOUT_FILE
    if options.card and (options.out.name != METRICS_FILE or not about.is_file()):
        raise ValueError(
            f"--card needs --out FOLDER/{METRICS_FILE} of a potential whose folder has "
            f"{ABOUT_FILE}, not {options.out}"
        )
    refuse_old_files("out")(options)


def _calibrate_parser() -> Parser:
    parser = Parser("atomeq calibrate", _CALIBRATE)
    parser.add_argument(
        "potential", metavar="POTENTIAL", type=str, help="name or folder of a potential"
    )
    parser.add_argument(
        "--train",
        nargs="+",
        type=str,
        default=[],
        help="files of what it was trained on; a committee needs none",
    )
    parser.add_argument(
        "--held-out",
        required=True,
        nargs="+",
        type=str,
        help="files with energies and forces that it was not trained on",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the new potential")
    parser.add_overwrite(refuse_old_potential)
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    add_ignore_option(parser)
    parser.door(potential=find_potential, device=device_name)
    return parser


def _select_parser() -> Parser:
    parser = Parser("atomeq select", _SELECT)
    parser.add_argument("pool", metavar="POOL", nargs="+", type=str, help="files of structures")
    parser.add_argument(
        "--potential", required=True, type=str, help="name or folder of a potential or committee"
    )
    parser.add_argument("--number", required=True, type=PositiveInt, help="how many to choose")
    parser.add_argument(
        "--by",
        type=Literal["d-optimal", "farthest", "spread", "random"],
        default="d-optimal",
        help="what makes a structure worth its label",
    )
    parser.add_argument(
        "--train", nargs="+", type=str, default=[], help="files of what is labelled already"
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of random")
    parser.add_argument("--out", required=True, type=str, help="OUT.extxyz or OUT.traj")
    parser.add_overwrite(refuse_old_output("select"))
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    add_ignore_option(parser)
    parser.door(
        pool=data_source,
        train=data_source,
        potential=find_potential,
        out=output_format,
        device=device_name,
    )
    return parser


def _export_parser() -> Parser:
    parser = Parser("atomeq export", _EXPORT)
    parser.add_argument(
        "potential", metavar="POTENTIAL", type=str, help="name or folder of a potential"
    )
    parser.add_argument("--out", required=True, type=Path, help="OUT.pt2, or OUT.pt of metatomic")
    parser.add_overwrite(refuse_old_files("out"))
    parser.add_argument(
        "--format", type=Literal["pt2", "metatomic"], default="pt2", help="what to write"
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64"],
        default=None,
        help="precision of the network; by default that of the potential",
    )
    parser.add_argument(
        "--device", type=str, default=None, help="cpu (default) or cuda, where OUT.pt2 computes"
    )
    parser.door(potential=find_single_potential, out=refuse_unwritable, device=device_name)
    return parser
