"""The figures that the tensor-product backend is to reach, and whether the rows reach them."""

import dataclasses

from benchmarks.judged import Judged
from benchmarks.rounds import PHASES


@dataclasses.dataclass
class Bar:
    """A figure to reach: a ratio to another implementation, seconds, or bytes."""

    op: str
    lmax: int
    channels: int
    what: str  # a phase, "saved_bytes_per_edge" or "differing_runs"
    limit: float
    against: str | None = None  # the implementation; None for a figure of our own
    by: tuple[str, ...] = ("auto",)  # whose figure counts, the first one measured

    def figure(self, rows: list[dict]) -> float | None:
        """Return the figure reached, or None where it was not measured."""
        place = (self.op, self.lmax, self.channels)
        found = {
            row["implementation"]: row
            for row in rows
            if (row["op"], row["lmax"], row["channels"]) == place
        }
        names = (self.against,) if self.against is not None else self.by
        row = next((found[name] for name in names if name in found), {})
        if self.against is not None:
            return row.get("ratio", {}).get(self.what)
        if self.what in PHASES:
            seconds = row.get("seconds", {}).get(self.what)
            return None if seconds is None else seconds / row["n_edges"] * 1e9
        return row.get(self.what)

    def judged(self, rows: list[dict]) -> Judged:
        """Return the bar beside its figure; one that was not measured is neither met nor missed."""
        owner = f" of {self.by[0]}" if self.by[0] != "auto" else ""
        what = f"{self.op} L={self.lmax} C={self.channels} {self.what}{owner}"
        unit = " ns per edge" if self.what in PHASES else ""
        asked = f"<= {self.limit:g}{unit}"
        if self.against is not None:
            asked = f">= {self.limit:g}x {self.against}"
        figure = self.figure(rows)
        if figure is None:
            return Judged(what, "-", asked)
        met = figure >= self.limit if self.against is not None else figure <= self.limit
        return Judged(what, f"{figure:.3g}", asked, met)


def bars(device: str) -> list[Bar]:
    """Return the figures that the backend is to reach on a device."""
    if device == "cuda":
        found = [
            Bar("escn_layer", 2, 128, "forward", 14.0, by=("triton",)),
            Bar("escn_layer", 2, 128, "forward", 7.0, by=("triton bf16",)),
        ]
        found += [
            Bar("escn_layer", lmax, 128, "forward_backward", limit, "reference compiled")
            for lmax, limit in ((2, 2.5), (3, 2.0), (4, 2.0), (6, 1.5))
        ]
        found.append(Bar("escn_layer", 2, 128, "double_backward", 3.0, "reference"))
        found += [
            Bar(op, 2, 128, "differing_runs", 0, by=("triton",)) for op in ("escn_layer", "cg_conv")
        ]
        for lmax, phase in ((lmax, phase) for lmax in (1, 2, 3, 4) for phase in PHASES):
            found.append(Bar("cg_conv", lmax, 128, phase, 10.0, "e3nn"))
            found.append(Bar("cg_conv", lmax, 128, phase, 1.2, "cuequivariance"))
        return found
    found = [
        Bar("cg_conv", lmax, 64, phase, limit, "e3nn")
        for lmax, limit in ((1, 2.0), (2, 2.0), (4, 5.0), (6, 5.0))
        for phase in PHASES
    ]
    found += [Bar("edge_wigner", lmax, 1, "forward", 20.0, "e3nn") for lmax in (3, 4)]
    for phase in PHASES[:2]:  # degree 3 stands for three dimensions
        found.append(Bar("geometric_product", 3, 28, phase, 5.0, "dense table"))
    for lmax in (2, 4):
        found.append(Bar("spherical_harmonics", lmax, 1, "forward", 1.0, "sphericart"))
        found.append(Bar("spherical_harmonics", lmax, 1, "double_backward", 2.0, "sphericart"))
    # Products of matrices are four fifths of the layer. Three real ones in place of four make them
    # 1.18 times cheaper at lmax 2 and 1.22 at lmax 4 in each phase, at the same rate: 2.75 against
    # 3.24 MFLOP per edge of a forward pass at lmax 2 and 128 channels, three times that with the
    # gradient, nine with its gradient. What is beyond comes of all else.
    found += [
        Bar("escn_layer", lmax, channels, phase, 1.3, "reference")
        for lmax in (2, 4)
        for channels in (64, 128)
        for phase in PHASES
    ]
    found += [
        Bar(
            "escn_layer",
            lmax,
            128,
            "saved_bytes_per_edge",
            kilobytes * 1000,
            by=("auto, recomputing", "auto"),
        )
        for lmax, kilobytes in ((2, 6), (4, 13), (6, 21))
    ]
    return found
