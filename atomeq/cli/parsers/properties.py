"""Command lines of ``atomeq eos``, ``elastic``, ``phonons``, ``kappa`` and ``spectrum``."""

from collections.abc import Sequence

from jsonargparse.typing import PositiveFloat, PositiveInt

from atomeq.cli.parsers.simulation import RESTART_HELP, simulation_parser
from atomeq.cli.terminal import Parser

_DESCRIPTIONS = {
    "eos": """\
Compute the energy of a crystal at several volumes, its atoms relaxed at each, and fit Birch and
Murnaghan's equation of state: volume at zero pressure, bulk modulus and its derivative. Beside
OUT.extxyz, the structures, stand OUT.summary.json and OUT.png.

example:
  atomeq eos cu.cif --potential cu-pbe --out eos.extxyz
""",
    "elastic": """\
Compute the elastic constants of a crystal from the stress of strained structures, their atoms
relaxed: C_ij with the symmetry of the crystal, in GPa and in the axes of the file; bulk and shear
moduli by Voigt, Reuss and Hill; Born's criterion of stability. Beside OUT.extxyz, the strained
structures, stand OUT.summary.json and OUT.png. Exit code 1 says that the crystal is not stable.

example:
  atomeq elastic cu.cif --potential cu-pbe --out elastic.extxyz
""",
    "phonons": """\
Compute harmonic phonons by finite displacements of a supercell (phonopy): band structure, density
of states, free energy, entropy and heat capacity. Imaginary modes are reported as negative
frequencies. Beside OUT.extxyz, the displaced supercells, stand OUT.summary.json, OUT.png and
OUT.phonopy.yaml, which phonopy reads. A run that is interrupted leaves OUT.forces.jsonl, with which
--restart does not compute again what was finished.

example:
  atomeq phonons cu.cif --potential cu-pbe --out phonons.extxyz --supercell 4 4 4
""",
    "kappa": """\
Compute the lattice thermal conductivity of a crystal by finite displacements of a supercell
(phono3py, pip install 'atomeq[kappa]'): three-phonon and isotope scattering, in the relaxation-time
approximation. Raise --mesh until it no longer changes. Beside OUT.extxyz, the displaced supercells,
stand OUT.summary.json, OUT.png and OUT.phono3py.yaml, which phono3py reads. A run that is
interrupted leaves OUT.forces.jsonl, with which --restart does not compute again what was finished.

example:
  atomeq kappa si.cif --potential FOLDER --out kappa.extxyz --min-length 10 --mesh 80
""",
    "spectrum": """\
Compute the infrared spectrum of a molecule, in km/mol. Of a structure it is harmonic: the molecule
is relaxed, and the Hessian of --potential and the Born effective charges of --dipole give wave
numbers and intensities; OUT.extxyz is the relaxed molecule. Of a trajectory whose frames are
--interval apart it is that of the dipoles of the frames, which --dipole gives; OUT.extxyz holds
them. Beside it stand OUT.summary.json and OUT.png.

examples:
  atomeq spectrum ethanol.xyz --potential FOLDER --dipole DIPOLES --out ir.extxyz
  atomeq spectrum md.extxyz --potential DIPOLES --out ir.extxyz --interval 1 --temperature 300
""",
}


def main(argv: Sequence[str]) -> int:
    """Parse one of the verbs and run it.

    Args:
        argv: The verb and its options.

    Returns:
        0, or 1 where a crystal is elastically unstable.
    """
    verb, *words = argv
    module = "spectrum" if verb == "spectrum" else "properties"
    return build_parser(verb).serve(words, f"atomeq.cli.{module}:{verb}")


def build_parser(verb: str) -> Parser:
    """Return the parser of a verb."""
    # Differences of energies and forces of nearly equal structures are what these verbs are about.
    parser = simulation_parser(verb, _DESCRIPTIONS[verb], dtype="float64")
    parser.add_argument(
        "--relax", type=bool, default=True, help="first relax atoms and cell; --relax false"
    )
    parser.add_argument("--fmax", type=PositiveFloat, default=1e-3, help="of relaxations, eV/Å")
    parser.add_argument("--max-steps", type=PositiveInt, default=500, help="of relaxations")
    if verb == "eos":
        parser.add_argument("--span", type=PositiveFloat, default=0.06, help="±, of the volume")
        parser.add_argument("--volumes", type=PositiveInt, default=11, help="how many")
    if verb == "elastic":
        parser.add_argument("--strain", type=PositiveFloat, default=0.005, help="the largest")
    if verb in ("phonons", "kappa"):
        _add_supercell_options(parser, displacement=0.01 if verb == "phonons" else 0.03)
    if verb == "phonons":
        _add_phonon_options(parser)
    if verb == "kappa":
        _add_kappa_options(parser)
    if verb == "spectrum":
        _add_spectrum_options(parser)
    return parser


def _add_supercell_options(parser: Parser, *, displacement: float) -> None:
    parser.add_argument(
        "--supercell",
        type=PositiveInt,
        nargs=3,
        default=None,
        help="repeats of the cell; by default as --min-length asks",
    )
    parser.add_argument(
        "--min-length",
        type=PositiveFloat,
        default=10.0,
        help="least distance between opposite faces of the supercell, Å",
    )
    parser.add_argument("--displacement", type=PositiveFloat, default=displacement, help="Å")
    parser.add_argument("--restart", action="store_true", help=RESTART_HELP)


def _add_phonon_options(parser: Parser) -> None:
    parser.add_argument(
        "--path", type=str, default=None, help="special points such as GXWKG,LU; by default all"
    )
    parser.add_argument(
        "--mesh", type=PositiveFloat, default=60.0, help="density of wave vectors, phonopy's length"
    )
    parser.add_argument(
        "--temperature", type=PositiveFloat, default=300.0, help="of the thermal properties, K"
    )


def _add_kappa_options(parser: Parser) -> None:
    parser.add_argument(
        "--mesh", type=PositiveFloat, default=50.0, help="density of wave vectors, phonopy's length"
    )
    parser.add_argument(
        "--temperatures",
        type=PositiveFloat,
        nargs="+",
        default=[100.0 * k for k in range(1, 11)],
        help="K; by default 100, 200 ... 1000",
    )
    parser.add_argument(
        "--isotopes", type=bool, default=True, help="whether isotopes scatter; --isotopes false"
    )


def _add_spectrum_options(parser: Parser) -> None:
    parser.add_argument(
        "--dipole",
        type=str,
        default=None,
        help="potential that gives dipoles; by default --potential",
    )
    parser.add_argument(
        "--interval",
        type=PositiveFloat,
        default=None,
        help="fs between frames: the file is a trajectory",
    )
    parser.add_argument(
        "--temperature", type=PositiveFloat, default=300.0, help="of the trajectory, K"
    )
    parser.add_argument("--width", type=PositiveFloat, default=10.0, help="of lines, cm⁻¹")
