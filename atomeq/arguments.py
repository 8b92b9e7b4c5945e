"""What a file gives a constructor is held to the types that the constructor declares."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def refuse_wrong_types(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse plain values of another type than a function declares, and numbers that are none.

    An integer is a float too, a boolean is no integer, and a list may stand for a tuple. What else
    than plain values a function takes is its own business, and so is an unknown argument.

    Raises:
        TypeError: Naming the argument, its value and the type.

    Example:
        >>> refuse_wrong_types(math.ldexp, {})
    """
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # names that exist for type checkers only
        return
    for name, value in arguments.items():
        if name in hints and not _is(value, hints[name]):
            wanted = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise TypeError(f"{name} is {str(value)[:60]!r}, which is no {wanted}")


def _is(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < math.inf  # not so of NaN; an int of any length may ask
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_is(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            _is(key, inner[0]) and _is(one, inner[1]) for key, one in value.items()
        )
    return True
