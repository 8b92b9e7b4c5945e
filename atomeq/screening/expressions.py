"""Filter expressions: comparisons and arithmetic over the numbers of a row, and nothing else.

An expression is parsed into a syntax tree and walked here, node by node; what is not on the list is
refused before the first structure is read.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": abs, "min": min, "max": max}
_TEXTS = ("id", "formula", "space_group", "locator")
_FLAGS = ("converged", "cell_kept")
_LONGEST = 1000


class Expression:
    """A condition on a row, such as ``energy_above_hull < 0.05 and n_atoms <= 20``.

    Args:
        text: Comparisons of columns and numbers with ``and``, ``or``, ``not``, ``+ - * /``,
            ``abs``, ``min``, ``max``; ``in`` with a list of texts.
        columns: Names of the columns with numbers; ``id``, ``formula``, ``space_group``,
            ``locator``, ``converged`` and ``cell_kept`` are known as well.

    Raises:
        ValueError: It is no such condition, or names what is no column.

    Example:
        >>> bound = Expression("energy < -2 * n_atoms", ("energy", "n_atoms"))
        >>> bound({"energy": -9.0, "n_atoms": 2})
        True
    """

    def __init__(self, text: str, columns: tuple[str, ...]) -> None:
        self.text = text
        self._known = (*columns, *_TEXTS, *_FLAGS)
        if len(text) > _LONGEST:
            raise ValueError(f"the filter has {len(text)} characters, more than {_LONGEST}")
        try:
            self._tree = ast.parse(text, mode="eval").body
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise ValueError(f"the filter {text!r} cannot be read: {error}") from error
        self.names = sorted(
            {
                node.id
                for node in ast.walk(self._tree)
                if isinstance(node, ast.Name) and node.id not in _FUNCTIONS
            }
        )
        self._check(self._tree)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row meets the condition.

        Raises:
            LookupError: The row has no value where the condition needs one; it says where.
            ArithmeticError: A division by zero.
        TypeError: A text where a number must be, or the other way round.
        """
        return bool(self._value(self._tree, row))

    def _check(self, node: ast.AST) -> None:
        allowed = (
            self._is_structural(node)
            or (isinstance(node, ast.Name) and node.id in self._known)
            or (isinstance(node, ast.Constant) and isinstance(node.value, int | float | str))
        )
        if isinstance(node, ast.Name) and not allowed:
            raise ValueError(
                f"the filter {self.text!r} names {node.id!r}; columns are {', '.join(self._known)}"
            )
        if not allowed:
            raise ValueError(
                f"the filter {self.text!r} holds {ast.unparse(node)!r}, which is not allowed; "
                "compare columns with numbers, joined by and, or, not, + - * /, abs, min, max, in"
            )
        children = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
        for child in children:
            if isinstance(child, ast.expr):
                self._check(child)

    @staticmethod
    def _is_structural(node: ast.AST) -> bool:
        if isinstance(node, ast.Compare):
            known = (*_COMPARISONS, ast.In, ast.NotIn)
            return all(isinstance(operation, known) for operation in node.ops)
        if isinstance(node, ast.BinOp):
            return type(node.op) in _ARITHMETIC
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.op, ast.USub | ast.Not)
        if isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            return named and bool(node.args) and not node.keywords
        return isinstance(node, ast.BoolOp | ast.List | ast.Tuple)

    def _value(self, node: ast.expr, row: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            value = row.get(node.id)
            if value is None:
                raise LookupError(node.id)
            return value
        if isinstance(node, ast.BoolOp):
            joined = all if isinstance(node.op, ast.And) else any
            return joined(self._value(value, row) for value in node.values)
        if isinstance(node, ast.Compare):
            return self._compare(node, row)
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(item, row) for item in node.elts]
        return self._operation(node, row)

    def _operation(self, node: ast.expr, row: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.UnaryOp):
            value = self._value(node.operand, row)
            return not value if isinstance(node.op, ast.Not) else -_number(value)
        if isinstance(node, ast.BinOp):
            left, right = self._value(node.left, row), self._value(node.right, row)
            return _ARITHMETIC[type(node.op)](_number(left), _number(right))
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        return _FUNCTIONS[node.func.id](*(self._value(item, row) for item in node.args))

    def _compare(self, node: ast.Compare, row: Mapping[str, Any]) -> bool:
        left = self._value(node.left, row)
        for operation, other in zip(node.ops, node.comparators, strict=True):
            right = self._value(other, row)
            if isinstance(operation, ast.In | ast.NotIn):
                holds = (left in right) == isinstance(operation, ast.In)
            else:
                holds = _COMPARISONS[type(operation)](left, right)
            if not holds:
                return False
            left = right
        return True


def _number(value: Any) -> int | float:
    """Refuse texts, which multiplied by a number could fill the memory."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value
