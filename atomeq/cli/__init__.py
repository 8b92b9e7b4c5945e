"""The command ``atomeq``: looks up the verb and hands over to the module that does it.

What parses a verb's words is imported when the verb is called, and what does its work when they are
right, so that helps and errors are answered before torch is imported.
"""

import difflib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, NoReturn

from atomeq.cli.plain_text import printable


class Verb(NamedTuple):
    """A subcommand: the module whose ``main(argv)`` parses and serves it, and its line of help."""

    module: str
    summary: str


_SIMULATION = "atomeq.cli.parsers.simulation"
_PROPERTIES = "atomeq.cli.parsers.properties"
_INSPECT = "atomeq.cli.parsers.inspect"
_DATA = "atomeq.cli.parsers.data"
_SCREEN = "atomeq.cli.parsers.screen"
_BENCHMARK = "atomeq.cli.parsers.benchmark"
_TRAINING = "atomeq.cli.parsers.training"

VERBS = {
    "single-point": Verb(_SIMULATION, "energy, forces and stress of every structure in a file"),
    "relax": Verb(_SIMULATION, "move atoms, and the cell with --cell, until forces vanish"),
    "md": Verb(_SIMULATION, "molecular dynamics: NVE, NVT or NPT"),
    "rollout": Verb(_DATA, "carry particles on, long step after long step"),
    "eos": Verb(_PROPERTIES, "equation of state: energy against volume, bulk modulus"),
    "elastic": Verb(_PROPERTIES, "elastic constants and moduli of a crystal"),
    "phonons": Verb(_PROPERTIES, "phonon bands, density of states, thermal properties"),
    "kappa": Verb(_PROPERTIES, "lattice thermal conductivity of a crystal"),
    "spectrum": Verb(_PROPERTIES, "infrared spectrum of a molecule or a trajectory"),
    "neb": Verb(_SIMULATION, "reaction path and barrier between two structures"),
    "serve": Verb(_SIMULATION, "energies and forces for i-PI and codes that speak like it"),
    "screen": Verb(_SCREEN, "many structures to a ranked table; may be interrupted"),
    "benchmark": Verb(_BENCHMARK, "write the prediction files of a public benchmark"),
    "check": Verb(_INSPECT, "hold a potential or any ASE calculator to the laws of physics"),
    "evaluate": Verb(_INSPECT, "errors on labelled structures, and properties beside references"),
    "select": Verb(_INSPECT, "choose the structures of a pool that are worth labelling"),
    "calibrate": Verb(_INSPECT, "teach a potential how far off it may be, by labelled structures"),
    "convert": Verb(_INSPECT, "turn a published checkpoint (.pt) into a potential"),
    "potentials": Verb(_INSPECT, "list, show and install published potentials"),
    "export": Verb(_INSPECT, "compile a potential into one file, for this processor"),
    "doctor": Verb(_INSPECT, "versions, devices, data, potentials and backends on this machine"),
    "fit": Verb(_TRAINING, "train a potential from a configuration file"),
    "validate": Verb(_TRAINING, "evaluate a checkpoint on the validation set"),
    "test": Verb(_TRAINING, "evaluate a checkpoint on the test set"),
    "predict": Verb(_TRAINING, "write a checkpoint's predictions"),
    "data": Verb(_DATA, "look through, download and convert data sets"),
    "is2re": Verb(_DATA, "relax OC20's initial structures and compare with DFT"),
}

#: What a user's input can cause; anything else is a fault of the program and shows its traceback.
BAD_INPUT = (ValueError, OSError, ImportError, NotImplementedError)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``atomeq VERB ...``.

    Args:
        argv: Words after ``atomeq``; by default those of the process.

    Raises:
        SystemExit: Code 1 where the work was done but its result is bad (a law broken, a
            relaxation not converged), 2 for bad input, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return
    if words[0] == "--version":
        sys.stdout.write(f"atomeq {_version()}\n")
        return
    if words[0] not in VERBS:
        close = difflib.get_close_matches(words[0], VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"verbs are {', '.join(VERBS)}."
        _fail(f"there is no {words[0]!r}; {hint} See atomeq --help", EXIT_BAD_INPUT)
    _set_up_terminal()
    if code := _run(words):
        sys.exit(code)


def _run(words: list[str]) -> int | None:
    """Run a verb; turn what a user's input can cause into one line and an exit code."""
    try:
        return importlib.import_module(VERBS[words[0]].module).main(words)
    except KeyboardInterrupt as interruption:
        _fail(f"interrupted {interruption}".strip(), EXIT_INTERRUPTED)
    except BAD_INPUT as error:
        if os.environ.get("ATOMEQ_TRACEBACK"):
            raise
        _fail(_one_line(error), EXIT_BAD_INPUT)


def _version() -> str:
    try:
        return version("atomeq")
    except PackageNotFoundError:
        return "(source tree, not installed)"


def _set_up_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if not sys.warnoptions:  # readers of structure files warn about details of their own
        warnings.simplefilter("ignore")


class _Formatter(logging.Formatter):
    """Messages name files, which may be called anything."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text else type(error).__name__


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"atomeq: error: {printable(message)}\n")
    sys.exit(code)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return f"""usage: atomeq VERB ...

From structure files to forces, relaxations, molecular dynamics and trained potentials.

verbs:
{verbs}

  atomeq VERB --help explains a verb and gives an example.

examples:
  atomeq single-point cu.cif --potential cu-pbe --out cu.extxyz
  atomeq relax cu.cif --potential cu-pbe --out relaxed.extxyz --fmax 0.01 --cell
  atomeq md cu.cif --potential cu-pbe --ensemble nvt --temperature 300 --steps 1000 --out md.extxyz
  atomeq screen structures/ --potential cu-pbe --out screening
  atomeq check cu-pbe

Errors are one line and exit code 2; ATOMEQ_TRACEBACK=1 shows where they come from.
"""
