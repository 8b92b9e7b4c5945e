"""What came of a golden case: the deviation of every tensor from the reference, and its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

NOISE_FACTOR = 20  # float32 may differ by this many times what float32 cost the reference itself


@dataclass
class Report:
    """Deviation and tolerance of each tensor in each dtype, relative to its largest value.

    Attributes:
        tolerances: Of each dtype, where the reference's own noise is not larger.
        found: By name of the tensor and dtype: (deviation, tolerance).
        notes: What else there is to say.
        passed: Whether everything is within tolerance.
    """

    tolerances: Mapping[torch.dtype, float]
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
        deviation, tolerance = float("inf"), self.tolerances[dtype]
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

    def beyond(self) -> list[str]:
        """Return the names of the tensors that are beyond tolerance in either dtype."""
        return [
            name
            for name, found in self.found.items()
            if any(not deviation <= tolerance for deviation, tolerance in found.values())
        ]

    def show(self, console: Console, title: str) -> None:
        """Print the table of the case and its notes."""
        table = Table("tensor", title=title, title_justify="left")
        for dtype, tolerance in self.tolerances.items():
            name = str(dtype).removeprefix("torch.")
            table.add_column(f"{name} ({tolerance:g})", justify="right")
        for name, found in self.found.items():
            cells = []
            for dtype in self.tolerances:
                deviation, tolerance = found.get(dtype, (0.0, 0.0))
                style = "" if deviation <= tolerance else "[red]"
                cells.append(f"{style}{deviation:.1e}" if dtype in found else "")
            table.add_row(name, *cells)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}")
