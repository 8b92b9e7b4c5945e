"""Small random problems by which kernels prove themselves."""

from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Size

_MEMBERS, _SEGMENTS = 40, 6


def members(size: Size) -> Example:
    """Return members of segments, one of which is empty."""
    index = indices(size, _SEGMENTS, _MEMBERS)
    x = random(size, _MEMBERS, size.channels)
    return [x], lambda operation, x: operation(x, index, _SEGMENTS)
