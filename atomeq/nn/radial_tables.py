"""Radial networks with frozen weights read off tables, in single precision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.coupling.irreps_conv import reads_tables
from atomeq.ops.coupling.weight_table import WeightTable, tabulated

_LEAST = 200  # intervals: the weights are then good to 1e-8 of the largest, their slopes to 1e-6


class RadialTables:
    """Tables of functions of the edge length, made at the first call and again for other weights.

    Args:
        cutoff: Where they end, Å.
        onset: A length where their curvature jumps, Å, at the bound of two intervals.
    """

    def __init__(self, cutoff: float, onset: float | None = None) -> None:
        part = 0.0 if onset is None else onset / cutoff
        choices = range(_LEAST, _LEAST + _LEAST // 2)
        self.n_intervals = min(choices, key=lambda n: round(abs(part * n - round(part * n)), 9))
        self.step = cutoff / self.n_intervals
        # The weights are kept too: what is made from others never lies where one of these did.
        self._made: tuple[Any, list[Tensor], Sequence[Tensor]] = (None, [], ())

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tables out of copies and pickles."""
        return self.__dict__ | {"_made": (None, [], ())}

    def serve(self, lengths: Tensor, weights: Sequence[Tensor]) -> bool:
        """Whether tables do: in single precision, for frozen weights, in kernels that read them."""
        frozen = not any(weight.requires_grad for weight in weights)
        traced = torch.compiler.is_compiling() or type(lengths) is not Tensor
        return frozen and not traced and lengths.dtype == torch.float32 and reads_tables(lengths)

    def at(
        self,
        lengths: Tensor,
        weights: Sequence[Tensor],
        functions: Callable[[], Sequence[Callable[[Tensor], Tensor]]],
    ) -> list[WeightTable]:
        """Return the table of each function at the lengths of the edges.

        Args:
            lengths: (n_edges,), Å.
            weights: All that the functions depend on.
            functions: Gives them in float64; called if the tables are to be made.
        """
        state = [(one.data_ptr(), None if one.is_inference() else one._version) for one in weights]
        known, tables, _ = self._made
        if known != state:
            with torch.inference_mode(False), torch.no_grad():
                made = [tabulated(one, self.step, self.n_intervals) for one in functions()]
                tables = [table.to(lengths.dtype) for table in made]
            self._made = (state, tables, weights)
        at = lengths / self.step
        return [WeightTable(at, table) for table in tables]
