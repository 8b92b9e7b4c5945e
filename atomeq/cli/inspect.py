"""``atomeq check`` and ``atomeq doctor``: what a calculator is worth, and what this machine has."""

import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from ase.calculators.calculator import BaseCalculator
from jsonargparse import Namespace
from rich.console import Console
from rich.text import Text

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.check.calculator import check_calculator
from atomeq.check.laws import CalculatorFactory, Law, LawResult
from atomeq.cli.door import ignorable
from atomeq.cli.plain_text import printable
from atomeq.cli.structures import versions
from atomeq.cli.terminal import Meter, say
from atomeq.files import refuse_unwritable, write_atomically
from atomeq.graph.files import read_structures
from atomeq.ops.dispatch import AUTO_ORDER, backends, chosen_backend, distrust, refusal
from atomeq.ops.explain import kernels_here
from atomeq.ops.specification import OpSpec
from atomeq.potential.checkpoint import load_potential, untrained_potential
from atomeq.potential.folders import (
    EXAMPLE_FILE,
    CheckpointError,
    find_potential,
    shipped_potentials,
)

_SCALE = 30.0  # eV; makes forces like those of bonds of what random weights make small

#: Optional packages and what they are for.
_OPTIONAL = {
    "triton": "fused kernels on CUDA",
    "nvalchemiops": "neighbour lists on CUDA",
    "cuequivariance_torch": "kernels on CUDA",
    "openequivariance": "kernels on CUDA",
    "torch_sim": "batched simulation",
    "ray": "many nodes",
    "tblite": "xTB labels",
    "rdkit": "molecules",
    "torch_dftd": "dispersion",
    "phono3py": "thermal conductivity",
}

#: One operation of each kind: what serves it serves its relatives.
_OPERATIONS = (
    "spherical_harmonics",
    "so2_linear_with_scalars",
    "tensor_product",
    "cg_conv",
    "sphere_pointwise",
    "segment_sum",
)


def check(options: Namespace) -> int:
    """Measure all laws, a line each."""
    if options.json is not None:
        refuse_unwritable(options.json)
    factory = calculator_factory(
        options.target,
        device=options.device,
        dtype=options.dtype,
        ignore=ignorable(options.ignore),
    )
    start = options.structure or _example_of(options.target)
    structure = None if start is None else read_structures(start, index="-1:")[-1]
    console = Console()
    console.width = max(console.width, 200)  # lines are for reading and for grep, never wrapped
    results: list[LawResult] = []
    with _Ticker() as ticker, _importable_here():
        measured = check_calculator(
            factory,
            elements=options.elements.split(",") if options.elements else None,
            depth="quick" if options.quick else "full" if options.full else "default",
            only=options.only.split(",") if options.only else None,
            single_precision=options.dtype == "float32",
            dynamics_structure=structure,
            dynamics_picoseconds=options.picoseconds,
            timestep=options.timestep,
            temperature=options.temperature,
            on_start=ticker.start,
            on_step=ticker.step,
        )
        for result in measured:
            results.append(result)
            console.print(_line(result), soft_wrap=True)
    broken = [result for result in results if result.passed is False]
    if options.json is not None:
        with write_atomically(options.json) as partial:
            partial.write_text(_as_json(options, results), encoding="utf-8")
    say(_verdict(results))
    return 1 if broken else 0


def _example_of(target: str) -> Path | None:
    """Return the structure that lies beside a potential, or None."""
    try:
        path = find_potential(target) / EXAMPLE_FILE
    except CheckpointError:  # a model, or a calculator of somebody else
        return None
    return path if path.is_file() else None


def _verdict(results: list[LawResult]) -> str:
    broken = sum(result.passed is False for result in results)
    exempt = sum(bool(result.exempt) for result in results)
    hold = f"{len(results) - broken - exempt} of {len(results)} laws hold"
    if exempt:
        return f"{hold}; the method is exempt from {exempt} more"
    return hold if broken else "all laws hold"


def calculator_factory(
    target: str, *, device: str, dtype: str, ignore: Sequence[str] = ()
) -> CalculatorFactory:
    """Return what makes the calculators under test.

    Args:
        target: Name or folder of a potential, YAML of a model, or ``module:factory``.
        device: Of a potential.
        dtype: Of a potential.
        ignore: Of a potential: ``charge``, ``spin``.

    Raises:
        ValueError: Neither a potential nor an importable factory of calculators, or something is
            to be ignored by one that is no potential.
    """
    if target.endswith((".yaml", ".yml")):
        potential = untrained_potential(target, scale=_SCALE, dtype=getattr(torch, dtype))
        return lambda: AtomeqCalculator(potential, device=device, ignore=ignore)
    module_name, colon, attribute = target.partition(":")
    if not colon or Path(target).exists():
        find_potential(target)
        return lambda: AtomeqCalculator(target, device=device, dtype=dtype, ignore=ignore)
    if ignore:
        raise ValueError(f"--ignore is of potentials; {target} decides that for itself")
    with _importable_here():
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import {target}: {error}") from error
        if not callable(factory):
            raise ValueError(f"{target} is a {type(factory).__name__}, not something to call")
        try:
            calculator = factory()
        except Exception as error:  # the user's own code may raise anything
            raise ValueError(f"{target}() raised {type(error).__name__}: {error}") from error
    if not isinstance(calculator, BaseCalculator):
        raise ValueError(f"{target}() is a {type(calculator).__name__}, not an ASE calculator")
    return factory  # pyright: ignore[reportReturnType] - its result was looked at above


def doctor(_: Namespace) -> int:
    """Write what is found on this machine."""
    say("versions")
    for name, found in versions().items():
        say(f"  {name:<22} {found}")
    say(f"  {'platform':<22} {platform.platform()}")
    say("devices")
    say(f"  {'cpu':<22} {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    say(f"  {'idle threads':<22} {_idle_threads()}")
    for line in _cuda_devices():
        say(line)
    say("data")
    say(f"  {'ATOMEQ_DATA':<22} {_data_folder()}")
    say("potentials")
    for line in _potentials():
        say(line)
    say(f"backends, by preference; chosen: {chosen_backend()}")
    for line in _backends():
        say(line)
    for name, found in kernels_here().items():
        say(f"  {name:<22} {found}")
    say("extras")
    for module, purpose in _OPTIONAL.items():
        say(f"  {module:<22} {_installed(module)}, {purpose}")
    return 0


def _idle_threads() -> str:
    """Say what threads do that wait for work, as the environment has it."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return f"sleep ({said}); in Python where atomeq is imported before torch, or this is set"
    return f"may turn in circles ({said}) and take cores from others; OMP_WAIT_POLICY=passive"


def _cuda_devices() -> Iterator[str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"torch is built for CUDA {built}, no GPU found" if built else "torch is CPU only"
        yield f"  {'cuda':<22} absent: {reason}"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"  {f'cuda:{index}':<22} {found.name}, {found.total_memory / 2**30:.0f} GiB"


def _data_folder() -> str:
    folder = os.environ.get("ATOMEQ_DATA")
    if folder is None:
        return "not set; data commands need --root or this variable"
    if not Path(folder).is_dir():
        return f"{folder} does not exist"
    return f"{folder}: {', '.join(sorted(p.name for p in Path(folder).iterdir())) or 'empty'}"


def _potentials() -> Iterator[str]:
    names = shipped_potentials()
    if not names:
        yield "  none shipped; name them by folder"
    for name in names:
        try:
            potential = load_potential(name)
        except ValueError as error:
            yield f"  {name:<22} damaged: {error}"
        else:
            yield (
                f"  {name:<22} {type(potential.model).__name__}, cutoff {potential.cutoff:g} Å, "
                f"{len(potential.elements)} elements, {potential.dtype}, hash verified"
            )


def _backends() -> Iterator[str]:
    names = [*AUTO_ORDER, *(name for name in backends() if name not in AUTO_ORDER)]
    for name in names:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            try:
                yield f"  {name:<22} {device}: {_served(name, torch.device(device))}"
            except ImportError as error:
                yield f"  {name:<22} absent: {error}"


def _served(name: str, device: torch.device) -> str:
    """Say which operations a backend serves, or why none."""
    specs = [OpSpec(op, 2, 2, 64, 1000, torch.float32, device) for op in _OPERATIONS]
    refusals = {spec.op: refusal(name, spec) or _distrust(name, spec) for spec in specs}
    served = [op for op, reason in refusals.items() if reason is None]
    if len(served) == len(refusals):
        return "serves everything"
    return f"serves {', '.join(served)}" if served else f"{refusals['cg_conv']}"


def _distrust(name: str, spec: OpSpec) -> str | None:
    """Say what keeps auto from a backend that could serve."""
    return distrust(name, spec) if name in AUTO_ORDER else None


def _installed(module: str) -> str:
    if find_spec(module) is None:
        return "not installed"
    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return "installed"


class _Ticker:
    """Shows which law is measured: a spinner on a terminal, lines for the long ones elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.meter = Meter("", 0, unit="steps", console=self.console)

    def __enter__(self) -> "_Ticker":
        self.spinner = self.console.status("")
        self.spinner.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.spinner.stop()

    def start(self, law: Law) -> None:
        self.law = law
        self.spinner.update(law.name)

    def step(self, step: int, steps: int) -> None:
        if step == 0:
            self.meter = Meter(self.law.name, steps, unit="steps", console=self.console)
        elif self.console.is_terminal:
            self.meter.done = step
            self.spinner.update(self.meter.line())
        else:
            self.meter.advance()


def _line(result: LawResult) -> Text:
    verdict = {True: ("holds ", "green"), False: ("BROKEN", "bold red"), None: ("-     ", "dim")}
    word, style = ("exempt", "yellow") if result.exempt else verdict[result.passed]
    figure = "" if math.isnan(result.figure) else f"{result.figure:.1e} {result.unit}"
    line = Text.assemble((word, style), f" {result.name:<27} {figure:<20}")
    return line.append(printable(f" limit {result.tolerance:<8.0e} {result.note}".rstrip()))


def _as_json(options: Namespace, results: list[LawResult]) -> str:
    def plain(result: LawResult) -> dict:
        figure = result.figure if math.isfinite(result.figure) else str(result.figure)
        return {**asdict(result), "figure": figure}

    document = {
        "target": options.target,
        "dtype": options.dtype,
        "device": options.device,
        "versions": versions(),
        "laws": [plain(result) for result in results],
    }
    return json.dumps(document, indent=2) + "\n"


@contextmanager
def _importable_here() -> Iterator[None]:
    """Find modules in the working directory, as ``python -m`` does."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())
