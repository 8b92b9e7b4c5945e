"""Figures of a fit as PNG: the learning curve, and predictions against labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atomeq.files import write_atomically

_INK, _ACCENT, _PALE = "#1f3a5f", "#c0562f", "#b8c4d0"


_BY_TIME = ("cpu_s", "val/forces_mae")


class Parity(NamedTuple):
    """Labels and predictions of one property.

    Attributes:
        name: Of the property.
        unit: Of both.
        labels: What was to be learned; NaN where it is not known.
        predictions: What is predicted of the same.
    """

    name: str
    unit: str
    labels: Sequence[float]
    predictions: Sequence[float]


def draw_learning_curve(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Draw the losses of each epoch and, of a potential, the error of forces by CPU time.

    Args:
        path: The PNG.
        rows: ``epoch`` and, where they are known, ``train/loss`` and ``val/loss``; ``cpu_s`` and
            ``val/forces_mae``, meV/Å.
    """
    errors = [(r["cpu_s"], r["val/forces_mae"]) for r in rows if {*_BY_TIME} <= set(r)]
    figure = Figure(figsize=(9.0 if errors else 6.4, 4.2), layout="constrained")
    axes, *more = figure.subplots(1, 2 if errors else 1, squeeze=False)[0]
    for name, colour in (("train/loss", _INK), ("val/loss", _ACCENT)):
        known = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=colour, markersize=3, label=name)
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    for beside in more:
        beside.plot(*zip(*errors, strict=True), "o-", color=_INK, markersize=3)
        beside.set(xlabel="CPU time / s", ylabel="validation MAE of forces / meV/Å")
        beside.set(xscale="log", yscale="log")
    _save(figure, path)


def draw_parity(path: Path, pairs: Sequence[Parity]) -> None:
    """Draw predictions over labels, a panel for each property."""
    figure = Figure(figsize=(4.2 * len(pairs), 4.2), layout="constrained")
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        first = next((value for value in pair.labels if value == value), 0.0)  # the rest are NaN
        axes.axline((first, first), slope=1, color=_PALE, zorder=0)
        axes.plot(pair.labels, pair.predictions, "o", color=_INK, markersize=2.5, alpha=0.5)
        unit = f" / {pair.unit}" if pair.unit else ""
        axes.set(xlabel=f"label{unit}", ylabel=f"predicted{unit}", title=pair.name)
        axes.set_aspect("equal", adjustable="datalim")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=150, metadata={"Software": None})
