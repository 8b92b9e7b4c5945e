"""Filters: which rows that are done meet the conditions; judged again when conditions change."""

from collections.abc import Sequence

from atomeq.screening.expressions import Expression
from atomeq.screening.rows import NUMBERS, Row
from atomeq.screening.steps import Filter, Step


class Filters:
    """Marks rows that do not meet a condition as filtered.

    Args:
        steps: All steps; those that are no filters are passed over.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._expressions = [
            Expression(step.where, NUMBERS) for step in steps if isinstance(step, Filter)
        ]

    def __call__(self, row: Row) -> Row:
        """Return the row as it is with these filters, whatever others it went through before."""
        if row["status"] == "filtered":
            row = _unfiltered(row)
        if row["status"] != "done":
            return row
        for expression in self._expressions:
            reason = _refusal(expression, row)
            if reason:
                why = {"stage": "filter", "kind": "filter", "reason": reason}
                return {**row, "status": "filtered", **why}
        return row


def remarks(row: Row) -> Row:
    """Return what a row that is done tells of a relaxation that did not do all it was to."""
    said: dict[str, str] = {}
    if row.get("converged") is False:
        said["not_converged"] = f"not converged after {row['n_steps']} steps"
    if row.get("cell_kept"):
        said["cell_kept"] = "the cell is as it was: it relaxes only if periodic in three directions"
    if not said:
        return {"stage": None, "kind": None, "reason": None}
    return {"stage": "relax", "kind": next(iter(said)), "reason": "; ".join(said.values())}


def _refusal(expression: Expression, row: Row) -> str:
    try:
        return "" if expression(row) else f"not {expression.text}"
    except LookupError as error:
        return f"{expression.text}: the row has no {error.args[0]}"
    except (ArithmeticError, TypeError) as error:
        return f"{expression.text}: {error}"


def _unfiltered(row: Row) -> Row:
    return {**row, "status": "done", **remarks(row)}
