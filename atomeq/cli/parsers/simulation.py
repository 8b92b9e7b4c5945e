"""Command lines of the verbs that move one structure or compute it: what a potential is for."""

from collections.abc import Sequence
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from atomeq.cli.door import (
    device_name,
    existing_file,
    ignorable,
    output_format,
    refuse_old_output,
)
from atomeq.cli.terminal import Parser
from atomeq.potential.folders import find_potential

_WORK = {
    "single-point": "atomeq.cli.simulate:single_point",
    "relax": "atomeq.cli.simulate:relax",
    "md": "atomeq.cli.dynamics:md",
    "neb": "atomeq.cli.neb:neb",
    "serve": "atomeq.cli.serve:serve",
}

UNCERTAINTY_HELP = (
    "give up on a structure where a force may be off by more, eV/Å; of a potential that was "
    "calibrated (atomeq calibrate)"
)
RESTART_HELP = "go on where an interrupted run left off; from the start where there is none"

_DESCRIPTIONS = {
    "single-point": """\
Compute energy, forces and, where the cell has a volume, stress of every structure in a file.

example:
  atomeq single-point cu.cif --potential cu-pbe --out cu.extxyz
""",
    "relax": """\
Move the atoms of every structure in a file until the largest force is below --fmax; with --cell
also the lattice, until the stress vanishes. They relax in batches, each as it would alone.
Beside OUT.extxyz stand OUT.summary.json and OUT.png (largest force and energy of the first
structures). Exit code 1 says that some structure did not converge; what breaks harms no other. A
run that is interrupted leaves the folder OUT.relax, from which --restart goes on.

example:
  atomeq relax cu.cif --potential cu-pbe --out relaxed.extxyz --fmax 0.01 --cell
""",
    "md": """\
Run molecular dynamics from the last structure of a file; --index picks another (0 is the first),
or several (:10) or all (:), which run as a batch. Velocities are those of the file, or drawn for
--temperature. Beside the trajectory OUT.extxyz stand OUT.log.csv (energies, temperature),
OUT.report.json and OUT.png (temperature, total energy, radial distribution, mean squared
displacement) and OUT.summary.json; of several structures each has its own, OUT-0.extxyz and so on,
and they share picture and summary. The folder OUT.restart has all that a run needs to go on: with
--restart an interrupted one ends as if it had never stopped (on a GPU up to rounding), and one that
has ended is extended to the --steps that are asked for. Exit code 1 says that a structure broke
down on the way; its frames so far are kept.

nve  velocity Verlet: constant energy
nvt  --thermostat bussi (stochastic velocity rescaling), langevin (BAOAB) or nose-hoover (chains)
npt  Langevin thermostat and barostat; --barostat isotropic keeps the shape of the cell

examples:
  atomeq md cu.cif --potential cu-pbe --ensemble nvt --temperature 300 --timestep 2 --steps 1000 \\
      --out md.extxyz
  atomeq md cu.cif --potential cu-pbe --temperature 300 --temperature-end 1200 --out heated.extxyz
""",
    "neb": """\
Find the path of least energy between two structures with a nudged elastic band: improved tangent,
all images evaluated in one batch per step, and a climbing image that ends at the saddle point.
INPUT holds the two ends, with the atoms in the same order, or a whole band to start from; between
two ends the images are interpolated by the image-dependent pair potential. Beside OUT.extxyz, the
band, stand OUT.summary.json and OUT.png; OUT.band.traj is the last band, which --restart continues
from. Exit code 1 says that the band did not converge.

example:
  atomeq neb ends.extxyz --potential cu-pbe --out path.extxyz --images 7
""",
    "serve": """\
Compute energy, forces and virial for a code that moves atoms itself and speaks the protocol of
i-PI: i-PI, ASE's SocketIOCalculator and others. That code listens; this verb connects to it and
serves until it closes the connection. INPUT tells the elements, in the order in which the other
code sends positions.

examples:
  atomeq serve cu.cif --potential cu-pbe --unix atomeq
  atomeq serve cu.cif --potential cu-pbe --host localhost --port 31415
""",
}


def main(argv: Sequence[str]) -> int:
    """Parse one of the simulation verbs and run it.

    Args:
        argv: The verb and its options.

    Returns:
        0, or 1 where something did not converge.
    """
    verb, *words = argv
    return build_parser(verb).serve(words, _WORK[verb])


def build_parser(verb: str) -> Parser:
    """Return the parser of a simulation verb."""
    parser = simulation_parser(verb, _DESCRIPTIONS[verb], out=verb != "serve")
    if verb in _OPTIONS:
        _OPTIONS[verb](parser)
    return parser


def simulation_parser(
    verb: str, description: str, *, dtype: str | None = None, out: bool = True
) -> Parser:
    """Return a parser with the options every verb with a potential has.

    Args:
        verb: The subcommand.
        description: Its help.
        dtype: Precision by default; None takes the potential's own.
        out: Whether structures are written.
    """
    parser = Parser(f"atomeq {verb}", description)
    parser.add_argument("input", metavar="INPUT", type=str, help="any structure file ASE reads")
    parser.add_argument(
        "--potential", required=True, type=str, help="name or folder of a potential"
    )
    parser.add_argument(
        "--head", type=str, default=None, help="of a potential of several: one level of theory"
    )
    if out:
        parser.add_argument("--out", required=True, type=str, help="OUT.extxyz or OUT.traj")
        parser.door(out=output_format)
        parser.add_overwrite(refuse_old_output(verb))
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64"],
        default=dtype,
        help="precision of the network" + ("" if dtype else "; by default that of the potential"),
    )
    add_precision_option(parser)
    add_ignore_option(parser)
    parser.door(input=existing_file, potential=find_potential, device=device_name)
    return parser


def add_precision_option(parser: Parser) -> None:
    """Add how coarse products may be."""
    parser.add_argument(
        "--precision",
        type=Literal["highest", "high", "medium"],
        default=None,
        help="operands of tensor products on a GPU: fp32, TF32 or bfloat16; by default what the "
        "potential recommends",
    )


def add_ignore_option(parser: Parser) -> None:
    """Add what is left out of account, as every verb has it that computes others' structures."""
    parser.add_argument(
        "--ignore",
        type=str,
        default="",
        help="charge, spin or both, with a comma: leave them out where the potential knows neither",
    )
    parser.door(ignore=ignorable)


def _add_relax_options(parser: Parser) -> None:
    parser.add_argument("--fmax", type=PositiveFloat, default=0.01, help="largest force left, eV/Å")
    parser.add_argument("--cell", action="store_true", help="relax the lattice as well")
    parser.add_argument("--pressure", type=float, default=0.0, help="with --cell, in GPa")
    parser.add_argument(
        "--optimizer",
        type=Literal["fire", "lbfgs"],
        default="lbfgs",
        help="FIRE as ASE's; L-BFGS takes fewer steps than ASE's",
    )
    parser.add_argument(
        "--max-steps", type=PositiveInt, default=500, help="give up on a structure after"
    )
    parser.add_argument(
        "--checkpoint-interval", type=PositiveInt, default=20, help="steps between checkpoints"
    )
    parser.add_argument(
        "--max-uncertainty", type=PositiveFloat, default=None, help=UNCERTAINTY_HELP
    )
    parser.add_argument("--restart", action="store_true", help=RESTART_HELP)


def _add_md_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--index", type=str, default="-1", help="which structures of the file, as ASE's index")
    add("--ensemble", type=Literal["nve", "nvt", "npt"], default="nvt", help="nve, nvt or npt")
    add("--temperature", type=PositiveFloat, default=300.0, help="K")
    add(
        "--temperature-end",
        type=PositiveFloat,
        default=None,
        help="K; the thermostat's changes evenly to it over --steps",
    )
    add("--timestep", type=PositiveFloat, default=1.0, help="fs")
    add("--steps", type=PositiveInt, default=1000, help="number of steps, earlier ones included")
    thermostats = Literal["bussi", "langevin", "nose-hoover"]
    add("--thermostat", type=thermostats, default="bussi", help="of nvt")
    add("--thermostat-time", type=PositiveFloat, default=100.0, help="its relaxation time, fs")
    add("--pressure", type=float, default=0.0, help="of npt, GPa")
    barostats = Literal["isotropic", "anisotropic"]
    add("--barostat", type=barostats, default="isotropic", help="of npt")
    add("--barostat-time", type=PositiveFloat, default=1000.0, help="its relaxation time, fs")
    add("--interval", type=PositiveInt, default=10, help="steps between frames and log lines")
    add("--checkpoint-interval", type=PositiveInt, default=100, help="steps between checkpoints")
    add("--max-uncertainty", type=PositiveFloat, default=None, help=UNCERTAINTY_HELP)
    add("--restart", action="store_true", help=RESTART_HELP)
    add("--new-velocities", action="store_true", help="ignore those of the file")
    add("--seed", type=NonNegativeInt, default=0, help="of velocities and noise")


def _add_neb_options(parser: Parser) -> None:
    parser.add_argument("--images", type=PositiveInt, default=7, help="between the two ends")
    parser.add_argument("--relax-ends", action="store_true", help="relax both ends first")
    parser.add_argument("--fmax", type=PositiveFloat, default=0.05, help="largest force left, eV/Å")
    parser.add_argument("--max-steps", type=PositiveInt, default=300, help="give up after")
    parser.add_argument("--spring", type=PositiveFloat, default=0.1, help="eV/Å²")
    parser.add_argument(
        "--no-climb", action="store_true", help="leave the highest image on the band's springs"
    )
    parser.add_argument("--no-mic", action="store_true", help="interpolate without periodicity")
    parser.add_argument(
        "--optimizer", type=Literal["fire", "bfgs"], default="fire", help="ASE optimizer"
    )
    parser.add_argument("--interval", type=PositiveInt, default=10, help="steps between saves")
    parser.add_argument("--restart", action="store_true", help=RESTART_HELP)


def _add_serve_options(parser: Parser) -> None:
    parser.add_argument(
        "--unix", type=str, default=None, help="name of a UNIX socket (/tmp/ipi_NAME)"
    )
    parser.add_argument("--host", type=str, default="localhost", help="where the other code is")
    parser.add_argument("--port", type=PositiveInt, default=31415, help="its port")
    parser.add_argument("--timeout", type=PositiveFloat, default=None, help="s; by default never")


_OPTIONS = {
    "relax": _add_relax_options,
    "md": _add_md_options,
    "neb": _add_neb_options,
    "serve": _add_serve_options,
}
