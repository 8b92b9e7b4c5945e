"""The layout of golden/light_models: one ``CASE.json`` beside one ``CASE.safetensors``.

golden.py runs these checks beside its own. A family of models is a module beside this one, named in
``FAMILIES``, with a function ``check(case, report)``; it is imported when a case asks for it.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

#: First word of a case's model -> module beside this file with ``check(case, report)``.
FAMILIES = {
    "egnn": "golden_egnn",
    "segno": "golden_egnn",
    "faenet": "golden_faenet",
    "equihgnn": "golden_equihgnn",
}
SUFFIXES = {torch.float64: "f64", torch.float32: "f32"}
RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-5}
NOISE_FACTOR = 20  # float32 may differ by this many times what float32 cost the reference itself
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One golden case; ``tensors`` is empty where the JSON stands alone.

    Attributes:
        path: The JSON file.
        document: What it holds; ``config`` has the constructor arguments of the reference.
        tensors: Everything in the safetensors file under its full name.
    """

    path: Path
    document: Any
    tensors: Tensors

    @classmethod
    def read(cls, path: Path) -> "Case":
        """Read CASE.json and, where there is one, CASE.safetensors."""
        weights = path.with_suffix(".safetensors")
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, document, load_file(weights) if weights.exists() else {})

    @property
    def model(self) -> str:
        """Name of the variant; the folder names a case whose JSON does not."""
        named = self.document.get("model") if isinstance(self.document, dict) else None
        return str(named or self.path.parent.name)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments of the reference."""
        return self.document["config"]

    def weights(self, dtype: torch.dtype) -> Tensors:
        """Return the reference's state_dict."""
        return self._with_prefix("param.", dtype)

    def inputs(self, dtype: torch.dtype) -> Tensors:
        """Return the inputs by name without ``in.``; integers stay integers."""
        return self._with_prefix("in.", dtype)

    def expected(self, dtype: torch.dtype) -> Tensors:
        """Return out.*, mid.*, grad.in.* and gradparam.* of a dtype, names without its suffix."""
        suffix = f".{SUFFIXES[dtype]}"
        found = {k: v for k, v in self.tensors.items() if k.endswith(suffix)}
        return {name.removesuffix(suffix): tensor for name, tensor in found.items()}

    def noise(self, name: str) -> float:
        """Return the largest difference between float32 and float64 in the reference itself."""
        return float(self.document.get("official_f32_minus_f64_maxabs", {}).get(name, 0.0))

    def _with_prefix(self, prefix: str, dtype: torch.dtype) -> Tensors:
        return {
            name.removeprefix(prefix): tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and not name.endswith(tuple(SUFFIXES.values()))
        }


@dataclass
class Report:
    """What came of one case: deviation and tolerance of each tensor in each dtype."""

    found: dict[str, dict[torch.dtype, tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    passed: bool = True

    def compare(
        self, name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype, *, noise: float = 0.0
    ) -> None:
        """Add one tensor; a shape that differs is beyond any tolerance.

        Args:
            name: Of the tensor.
            ours: What the package computes.
            theirs: What the reference computed.
            dtype: Which of the two runs it belongs to.
            noise: Absolute rounding error of the reference in that dtype.
        """
        deviation, tolerance = float("inf"), RELATIVE[dtype]
        if ours.shape == theirs.shape:
            largest = float(theirs.abs().max()) if theirs.numel() else 0.0
            difference = (ours.detach().double() - theirs.double()).abs()
            deviation = float(difference.max()) / (largest or 1.0) if theirs.numel() else 0.0
            tolerance = max(tolerance, NOISE_FACTOR * noise / (largest or 1.0))
        self.found.setdefault(name, {})[dtype] = (deviation, tolerance)
        self.passed &= deviation <= tolerance  # false for nan too

    def fail(self, message: str) -> None:
        """Note what makes the case fail without a number."""
        self.notes.append(message)
        self.passed = False


Checker = Callable[[Case, Report], None]


def find_cases(path: Path) -> list[Path]:
    """Return the JSON files of this layout at or below a path, or the one it names."""
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    return [
        file
        for file in files
        if file.with_suffix(".safetensors").exists() or file.parent.name.split("_")[0] in FAMILIES
    ]


def check(path: Path) -> Report:
    """Check one case by the module of its family."""
    case, report = Case.read(path), Report()
    module = FAMILIES.get(case.model.split("_")[0])
    if module is None:
        report.fail(f"no family for model {case.model!r}; there are {', '.join(FAMILIES)}")
        return report
    try:
        checker: Checker = importlib.import_module(module).check
    except ModuleNotFoundError as error:
        report.fail(f"no checker for model {case.model!r}: {error}")
        return report
    checker(case, report)
    if not report.found and report.passed:
        report.fail("nothing was compared")
    return report


def compare_all(case: Case, report: Report, ours: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Compare everything the reference computed; what ``ours`` lacks fails the case.

    Args:
        case: With what the reference computed.
        report: Where deviations go.
        ours: By the names of the case, without the suffix of the dtype.
        dtype: Of this run.
    """
    for name, theirs in case.expected(dtype).items():
        if name not in ours:
            report.fail(f"{name} was not computed")
            continue
        noise = case.noise(name) if dtype == torch.float32 else 0.0
        report.compare(name, ours[name], theirs, dtype, noise=noise)


def probe_loss(outputs: Iterable[Tensor], *, target: Tensor | None = None) -> Tensor:
    """Return the loss that the gradients of the cases were taken of.

    Args:
        outputs: Float outputs in the order of ``document["outputs"]``.
        target: ``in.x_target``: then it is the mean squared error of the first output.
    """
    outputs = list(outputs)
    if target is not None:
        return ((outputs[0] - target) ** 2).mean()
    terms = []
    for output in outputs:
        index = torch.arange(output.numel(), dtype=output.dtype)
        terms.append((output * torch.cos(index).view(output.shape)).sum())
    return torch.stack(terms).sum()


def gradients(loss: Tensor, of: Mapping[str, Tensor]) -> Tensors:
    """Return d loss / d tensor by name, zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(of.values()), materialize_grads=True, retain_graph=True)
    return dict(zip(of, found, strict=True))


def show(console: Console, title: str, report: Report) -> None:
    """Print the table of a case."""
    table = Table("tensor", title=title, title_justify="left")
    for dtype in RELATIVE:
        table.add_column(SUFFIXES[dtype], justify="right")
    for name, found in report.found.items():
        cells = []
        for dtype in RELATIVE:
            deviation, tolerance = found.get(dtype, (0.0, 0.0))
            style = "" if deviation <= tolerance else "[red]"
            cells.append(f"{style}{deviation:.1e}" if dtype in found else "")
        table.add_row(name, *cells)
    console.print(table)
    for note in report.notes:
        console.print(f"  {note}")
