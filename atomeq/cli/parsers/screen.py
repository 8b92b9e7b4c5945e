"""The command line of ``atomeq screen``."""

from collections.abc import Sequence
from typing import Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from atomeq.cli.door import device_name, existing_file, existing_path, refuse_old_files
from atomeq.cli.parsers.simulation import add_ignore_option, add_precision_option
from atomeq.cli.terminal import Parser
from atomeq.potential.folders import find_potential

_DESCRIPTION = """\
Screen structures: refuse bad ones, leave out copies, relax the rest in batches, compute properties,
filter and rank. OUT/results/*.parquet gets one row per structure, bad ones with their reason;
OUT/ranking.parquet the best, OUT/report.html everything to look at.

SOURCE is a file or folder of CIF, POSCAR, extxyz or a zip of it, traj, ASE databases, ASE-LMDB,
LMDB of OC20, Parquet, JSON of pymatgen or OPTIMADE. The same command given again, after Ctrl-C, a
kill or a crash, computes only what has no row yet; "atomeq screen --out OUT --resume" is short for
it.

steps.yaml is a list of steps, of which these are the default:
  steps: [validate, dedupe, relax, properties, rank]
with options such as
  - dedupe: structure     # also other cells, other orders of atoms, small displacements
  - relax: {fmax: 0.05, cell: true}
  - properties: {hull: references/, symprec: 0.01}
  - filter: energy_above_hull < 0.05 and n_atoms <= 20
  - rank: {by: energy_above_hull, top: 50}

example:
  atomeq screen structures/ --potential cu-pbe --out screening --fmax 0.05
"""


def main(argv: Sequence[str]) -> int:
    """Parse the verb and run it.

    Args:
        argv: The verb and its options.

    Returns:
        0; failures of structures are rows, not an error.
    """
    return build_parser().serve(argv[1:], "atomeq.cli.screen:run")


def build_parser() -> Parser:
    """Return the parser of the verb."""
    parser = Parser("atomeq screen", _DESCRIPTION)
    parser.add_argument("sources", metavar="SOURCE", type=str, nargs="*", help="files and folders")
    parser.add_argument("--potential", type=str, default=None, help="name or folder of a potential")
    parser.add_argument("--out", required=True, type=str, help="folder for the results")
    parser.add_argument("--config", type=str, default=None, help="YAML with the list of steps")
    parser.add_argument(
        "--fmax", type=PositiveFloat, default=None, help="of the step relax, eV/Å; by default 0.03"
    )
    parser.add_argument("--cell", action="store_true", help="relax the lattice as well")
    parser.add_argument(
        "--max-steps", type=PositiveInt, default=None, help="of the step relax; by default 500"
    )
    add_work_options(parser)
    parser.add_argument(
        "--id-key", type=str, default=None, help="info key or column that holds the ids"
    )
    parser.add_argument(
        "--info", type=str, default=None, help="keys to keep as columns: source,band_gap:number"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take all that is not given from the run in OUT; make a damaged ledger anew",
    )
    parser.add_argument("--dry-run", action="store_true", help="estimate time and memory only")
    parser.add_argument("--export-db", type=str, default=None, help="also write an ASE database")
    parser.add_argument("--export-chemiscope", type=str, default=None, help="also write its JSON")
    parser.add_overwrite(refuse_old_files("export_db", "export_chemiscope"))
    parser.door(
        sources=existing_path,
        potential=find_potential,
        config=existing_file,
        device=device_name,
    )
    return parser


def add_work_options(parser: Parser) -> None:
    """Add who computes a screening, and which part of it."""
    parser.add_argument(
        "--engine",
        type=Literal["local", "processes", "ray"],
        default=None,
        help="who computes; by default local",
    )
    parser.add_argument("--workers", type=PositiveInt, default=None, help="of processes and ray")
    parser.add_argument("--address", type=str, default=None, help="of a Ray cluster")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype", type=Literal["float32", "float64"], default=None, help="of the network"
    )
    add_precision_option(parser)
    add_ignore_option(parser)
    parser.add_argument("--max-edges", type=PositiveInt, default=None, help="computed at once")
    parser.add_argument(
        "--shard", type=str, default=None, help="k/n: every n-th structure; in a SLURM array auto"
    )
    parser.add_argument(
        "--retry", type=str, default=None, help="failures to compute again: kinds with commas, all"
    )
