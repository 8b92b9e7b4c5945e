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


def not_converged(n_steps: int) -> Row:
    """Return what a row that is done tells of a relaxation that did not get there."""
    reason = f"not converged after {n_steps} steps"
    return {"stage": "relax", "kind": "not_converged", "reason": reason}


def _refusal(expression: Expression, row: Row) -> str:
    try:
        return "" if expression(row) else f"not {expression.text}"
    except LookupError as error:
        return f"{expression.text}: the row has no {error.args[0]}"
    except (ArithmeticError, TypeError) as error:
        return f"{expression.text}: {error}"


def _unfiltered(row: Row) -> Row:
    why: Row = {"stage": None, "kind": None, "reason": None}
    if row["converged"] is False:
        why = not_converged(row["n_steps"])
    return {**row, "status": "done", **why}
