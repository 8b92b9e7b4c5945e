"""The command line of ``atomeq benchmark``."""

from collections.abc import Sequence
from typing import Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from atomeq.cli.door import device_name, existing_file
from atomeq.cli.parsers.screen import add_work_options
from atomeq.cli.terminal import Parser
from atomeq.potential.folders import find_potential

_DESCRIPTION = """\
Write the prediction files of a public benchmark from its own input files.

matbench-discovery: relax the initial structures (*-wbm-initial-atoms.extxyz.zip or
*-wbm-init-structs.jsonl.gz, atoms and cells), correct the energies as the Materials Project did in
2020, and write OUT/DATE-discovery.csv.gz with formation energies and OUT/DATE-geo-opt.jsonl.gz with
relaxed structures. The files are in https://figshare.com/articles/dataset/22715158, by the names in
data-files.yml of https://github.com/janosh/matbench-discovery.

matbench-discovery --task kappa: thermal conductivities at 300 K of the 103 crystals in
*-phononDB-PBE-103-structures.extxyz, with the supercells and meshes that stand in it, by phono3py
(pip install 'atomeq[kappa]'); writes OUT/DATE-phonons-kappa-103.json.gz. In float64 by default.

The same command given again, after Ctrl-C, a kill or a crash, computes only what is missing. With
--shard k/n, several share OUT, and the one that ends last writes the files.

examples:
  atomeq benchmark matbench-discovery wbm-initial-atoms.extxyz.zip --potential FOLDER --out mbd \\
    --entries wbm-computed-structure-entries.jsonl.gz \\
    --references mp-elemental-reference-entries.json.gz
  atomeq benchmark matbench-discovery phononDB-PBE-103-structures.extxyz --task kappa \\
    --potential FOLDER --out mbd
"""


def main(argv: Sequence[str]) -> int:
    """Parse the verb and run it.

    Args:
        argv: The verb and its options.

    Returns:
        0; failures of structures are lines of the files, not an error.
    """
    return build_parser().serve(argv[1:], "atomeq.cli.benchmark:run")


def build_parser() -> Parser:
    """Return the parser of the verb."""
    parser = Parser("atomeq benchmark", _DESCRIPTION)
    parser.add_argument("benchmark", type=Literal["matbench-discovery"], help="which")
    parser.add_argument("structures", type=str, help="file of initial structures, or of crystals")
    parser.add_argument(
        "--task", type=Literal["discovery", "kappa"], default="discovery", help="what to predict"
    )
    parser.add_argument("--potential", required=True, type=str, help="name or folder")
    parser.add_argument("--out", required=True, type=str, help="folder for the results")
    parser.add_argument("--entries", type=str, default=None, help="computed structure entries")
    parser.add_argument("--references", type=str, default=None, help="elemental references")
    parser.add_argument(
        "--fmax", type=PositiveFloat, default=None, help="of relaxations, eV/Å; 0.05, kappa: 1e-4"
    )
    parser.add_argument(
        "--max-steps", type=PositiveInt, default=None, help="of relaxations; 500, kappa: 300"
    )
    parser.add_argument(
        "--displacement", type=PositiveFloat, default=None, help="of kappa, Å; 0.01"
    )
    add_work_options(parser)
    parser.door(
        structures=existing_file,
        potential=find_potential,
        entries=existing_file,
        references=existing_file,
        device=device_name,
    )
    return parser
