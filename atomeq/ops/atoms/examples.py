"""Small random problems by which kernels prove themselves."""

from atomeq.ops.self_check import Example, random
from atomeq.ops.specification import Size

_ATOMS = 5


def norm(size: Size) -> Example:
    """Return the features of some atoms; the weights of a normalisation are fixed."""
    x, weight = (
        random(size, n, rows, size.channels)
        for n, rows in ((_ATOMS, (size.lmax + 1) ** 2), (1, size.lmax + 1))
    )
    bias = random(size, size.channels)
    return [x], lambda operation, x: operation(x, weight[0], bias)


def update(size: Size) -> Example:
    """Return the features of some atoms; the weights of an update are fixed."""
    hidden, n_degrees = size.channels, size.lmax + 1
    channels, c_out = hidden + 3, hidden + 1
    x = random(size, _ATOMS, n_degrees**2, channels)
    first = random(size, n_degrees, hidden, channels), random(size, hidden)
    gates = random(size, size.lmax * hidden, channels), random(size, size.lmax * hidden)
    second = random(size, n_degrees, c_out, hidden), random(size, c_out)
    return [x], lambda operation, x: operation(x, first, gates, second)
