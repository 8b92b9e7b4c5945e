"""All families of golden checkers, and the command that runs them: ``golden.py PATH...``."""

import argparse
import importlib
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from rich.console import Console

import checkers
from atomeq.nn.radial_tables import exact_radial_functions
from checkers.cases import Case
from checkers.report import Report


def main(argv: list[str] | None = None) -> int:
    """Check all cases; return the exit code.

    A PATH is a case or a folder of cases. The model is built from the case's JSON, takes the
    reference's weights and computes its structures; the largest deviation of every output and
    intermediate is printed, relative to the largest value of the tensor, in float64 and float32.
    The exit code is 1 where one is beyond tolerance, or there are no cases.
    """
    parser = argparse.ArgumentParser(
        prog="golden.py", description="Compare models with outputs of reference implementations."
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100)
    cases = [Case.read(file) for path in arguments.paths for file in find_cases(path)]
    failed = []
    for case in cases:
        report = check(case)
        report.show(console, case.title)
        if not report.passed:
            failed.append(case.title)
    console.print(f"{len(cases) - len(failed)} of {len(cases)} cases within tolerance")
    if failed:
        console.print("beyond: " + ", ".join(failed), style="red")
    return 1 if failed or not cases else 0


@cache
def families() -> tuple[ModuleType, ...]:
    """Return the modules of this folder that check cases."""
    names = sorted(module.name for module in pkgutil.iter_modules(checkers.__path__))
    modules = (importlib.import_module(f"checkers.{name}") for name in names)
    return tuple(module for module in modules if hasattr(module, "handles"))


def family_of(case: Case) -> ModuleType | None:
    """Return the one family that checks a case, or None."""
    found = [module for module in families() if module.handles(case)]
    if len(found) > 1:
        names = ", ".join(module.__name__ for module in found)
        raise ValueError(f"{case.path} is handled by {names}; their handles() must tell it apart")
    return found[0] if found else None


def find_cases(path: Path) -> list[Path]:
    """Return the JSON files of all cases at or below a path, or the one it names.

    A JSON file without tensors is a case where a family says so; others lie beside the cases.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    return [
        file
        for file in files
        if file.name == "case.json"
        or file.with_suffix(".safetensors").exists()
        or family_of(Case.read(file)) is not None
    ]


def check(case: Case) -> Report:
    """Check one case by its family."""
    report = Report(case.tolerances)
    family = family_of(case)
    if family is None:
        report.fail(f"no layout for model {case.model!r}")
        return report
    with exact_radial_functions():  # intermediates are those of the networks, not of their tables
        family.check(case, report)
    if not report.found and report.passed:
        report.fail("nothing was compared")
    return report
