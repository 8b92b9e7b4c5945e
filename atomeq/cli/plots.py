"""Pictures of results as PNG files, drawn without a display."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from atomeq.files import write_atomically

_INK, _ACCENT, _PALE = "#1f3a5f", "#c0562f", "#b8c4d0"
_DPI = 150


def plot_path(out: str | Path) -> Path:
    """Return the picture's path: ``cu.extxyz`` has ``cu.png`` beside it."""
    return Path(out).with_suffix(".png")


def plot_curve(
    out: str | Path,
    points: tuple[Sequence[float], Sequence[float]],
    curve: tuple[Sequence[float], Sequence[float]],
    *,
    labels: tuple[str, str],
    title: str,
) -> Path:
    """Draw points and the curve through them.

    Args:
        out: The output file the picture stands beside.
        points: x and y.
        curve: x and y.
        labels: Of the axes.
        title: Above the picture.

    Returns:
        The path of the picture.
    """

    def draw(axes: Axes) -> None:
        axes.plot(*curve, color=_INK, zorder=1)
        axes.plot(*points, "o", color=_ACCENT, markersize=5, zorder=2)
        axes.set(xlabel=labels[0], ylabel=labels[1], title=title)

    return _save(out, [draw])


def plot_matrix(out: str | Path, matrix: NDArray[np.float64], *, title: str) -> Path:
    """Draw the elastic constants as a table of numbers and shades; return the path."""

    def draw(axes: Axes) -> None:
        limit = float(np.abs(matrix).max())
        axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for (row, column), value in np.ndenumerate(matrix):
            dark = abs(value) > 0.6 * limit
            text = f"{value:.0f}" if abs(value) >= 0.5 else "0"
            axes.text(
                column, row, text, ha="center", va="center", color="white" if dark else "black"
            )
        names = [str(number) for number in range(1, 7)]
        axes.set(xticks=range(6), yticks=range(6), xticklabels=names, yticklabels=names)
        axes.set_title(title)

    return _save(out, [draw])


def plot_phonons(
    out: str | Path,
    bands: tuple[Sequence[NDArray[np.float64]], Sequence[tuple[str, str]]],
    lengths: Sequence[float],
    dos: tuple[NDArray[np.float64], NDArray[np.float64]],
    *,
    title: str,
) -> Path:
    """Draw the band structure and, at its side, the density of states.

    Args:
        out: The output file the picture stands beside.
        bands: Frequencies of each leg, (n_points, n_modes), THz, and the names of its ends.
        lengths: Of the legs, 1/Å.
        dos: Frequencies (THz) and density of states.
        title: Above the picture.

    Returns:
        The path of the picture.
    """

    def draw_bands(axes: Axes) -> None:
        ticks, names, start = [0.0], [bands[1][0][0]], 0.0
        for leg, ends, length in zip(*bands, lengths, strict=True):
            if names[-1] != ends[0]:
                names[-1] = f"{names[-1]}|{ends[0]}"
            axes.plot(np.linspace(start, start + length, len(leg)), leg, color=_INK, linewidth=1)
            start += length
            ticks.append(start)
            names.append(ends[1])
        for tick in ticks:
            axes.axvline(tick, color=_PALE, linewidth=0.6, zorder=0)
        axes.axhline(0, color=_PALE, linewidth=0.6, zorder=0)
        names = [name.replace("G", "Γ") for name in names]
        axes.set(xlim=(0, start), xticks=ticks, xticklabels=names, ylabel="frequency / THz")
        axes.set_title(title)

    def draw_dos(axes: Axes) -> None:
        axes.plot(dos[1], dos[0], color=_ACCENT)
        axes.set(xlabel="density of states", xticks=[])
        axes.tick_params(labelleft=False)
        axes.set_xlim(left=0)

    return _save(out, [draw_bands, draw_dos], widths=(4, 1), share_y=True)


class Panel(NamedTuple):
    """Lines in one pair of axes.

    Attributes:
        x_label: Below.
        y_label: At the left.
        lines: x and y of each.
        log: Whether y is logarithmic.
        ends: Whether the first and the last point of each line are marked.
        points: x and y of what stands beside the lines.
        title: Above.
    """

    x_label: str
    y_label: str
    lines: Sequence[tuple[Sequence[float], Sequence[float]]]
    log: bool = False
    ends: bool = True
    points: tuple[Sequence[float], Sequence[float]] | None = None
    title: str = ""


def plot_lines(out: str | Path, panels: Sequence[Panel]) -> Path:
    """Draw lines in each of several panels; return the path of the picture."""

    def drawer(panel: Panel) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for x, y in panel.lines:
                axes.plot(x, y, color=_INK, linewidth=1)
                if panel.ends and len(x):
                    axes.plot([x[0], x[-1]], [y[0], y[-1]], "o", color=_ACCENT, markersize=4)
            if panel.points is not None:
                axes.plot(*panel.points, "o", color=_ACCENT, markersize=4, zorder=0)
            axes.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
            if panel.log:
                axes.set_yscale("log")

        return draw

    return _save(out, [drawer(panel) for panel in panels], columns=2)


class Cloud(NamedTuple):
    """Points about the diagonal in one pair of axes.

    Attributes:
        x_label: Below.
        y_label: At the left.
        x: Of the points.
        y: Of the points.
        log: Whether both axes are logarithmic.
    """

    x_label: str
    y_label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    log: bool = False


def plot_clouds(out: str | Path, clouds: Sequence[Cloud]) -> Path:
    """Draw clouds of points with the diagonal, a panel each; return the path of the picture."""

    def drawer(cloud: Cloud) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            keep = (cloud.x > 0) & (cloud.y > 0) if cloud.log else slice(None)
            x, y = cloud.x[keep], cloud.y[keep]
            axes.plot(x, y, "o", color=_INK, markersize=2, alpha=0.3, rasterized=True)
            if len(x):
                ends = [min(x.min(), y.min()), max(x.max(), y.max())]
                axes.plot(ends, ends, color=_ACCENT, linewidth=0.8)
            axes.set(xlabel=cloud.x_label, ylabel=cloud.y_label)
            if cloud.log:
                axes.set(xscale="log", yscale="log")
            else:
                axes.locator_params(axis="x", nbins=4)  # labels of total energies are long

        return draw

    return _save(out, [drawer(cloud) for cloud in clouds], columns=2)


def _save(
    out: str | Path,
    draws: Sequence[Callable[[Axes], None]],
    *,
    widths: Sequence[float] | None = None,
    share_y: bool = False,
    columns: int | None = None,
) -> Path:
    columns = len(draws) if columns is None else min(columns, len(draws))
    rows = -(-len(draws) // columns)
    size = (6.4 if columns == 1 else 8.0, 4.2 * max(1.0, 0.75 * rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharey=share_y,
        gridspec_kw={"width_ratios": widths} if widths else None,
    )
    panels = grid.ravel()
    for draw, axes in zip(draws, panels, strict=False):
        draw(axes)
    for axes in panels[len(draws) :]:
        axes.set_visible(False)
    path = plot_path(out)
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=_DPI, metadata={"Software": None})
    return path
