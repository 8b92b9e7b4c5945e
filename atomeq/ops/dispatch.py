"""Which backend serves an operation and how to choose one; explain.py says why and at what cost.

The choice is made call by call: ``with use_backend(name)``, else the environment variable
ATOMEQ_BACKEND, else ``auto``, the first backend of :data:`AUTO_ORDER` that serves the operation. A
backend asked for by name serves or the call raises, saying why; only ``auto`` may pass on.

``torch.compile`` traces the choice too, inside a compiled function or around it: a graph belongs to
the choice it was traced under, and another one makes another graph. Only the environment is read
once, at the trace.
"""

import difflib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.harmonics.polynomials import Normalization
from atomeq.ops.paths import Mode, Path, RadialMap
from atomeq.ops.specification import OpSpec
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.tables import constant_in_traces

logger = logging.getLogger(__name__)

# Where each backend lives, "module:class"; it is imported when first asked for. Those of other
# distributions, named by entry points of the group atomeq.backends, come after them.
BACKENDS: dict[str, str] = {
    "cpu": "atomeq.ops.kernel_backend:CPUBackend",
    "reference": "atomeq.ops.reference_backend:ReferenceBackend",
    "e3nn": "atomeq.ops.coupling.e3nn:E3nnBackend",
    "cuequivariance": "atomeq.ops.coupling.cuequivariance:CuEquivarianceBackend",
    "openequivariance": "atomeq.ops.coupling.openequivariance:OpenEquivarianceBackend",
    "triton": "atomeq.ops.triton_backend:TritonBackend",
}
AUTO_ORDER: tuple[str, ...] = ("cpu", "reference")  # the fastest first; others serve when named
ENVIRONMENT_VARIABLE = "ATOMEQ_BACKEND"
_GROUP = "atomeq.backends"


class _Choice(threading.local):
    """The name asked for in this thread; a plain attribute, since that is what a trace guards."""

    def __init__(self) -> None:
        self.name: str | None = None


_choice = _Choice()
_loaded: dict[str, "Backend"] = {}


@runtime_checkable
class Backend(Protocol):
    """One implementation of the operations; it holds no weights.

    The functions of ``atomeq.ops`` check the arguments first, so a backend may trust them. Every
    method is differentiable any number of times in its floating-point arguments, except
    ``edge_wigner``. A backend that refuses an operation in any form may lack its method.

    Attributes:
        name: As in :data:`BACKENDS`.
    """

    name: str

    def refusal(self, spec: OpSpec) -> str | None:
        """Return None if this backend serves the call, else the reason why not.

        The answer may depend on the call, on what the machine has and on whether torch is asked for
        repeatable sums, nothing else: it is remembered. Of ``n_edges`` only 0 may be told apart.
        """
        ...

    def by_torch(self, spec: OpSpec) -> bool:
        """Whether a call that it serves runs in plain torch, by no kernel made for it."""
        ...

    def spherical_harmonics(
        self, vectors: Tensor, lmax: int, normalization: Normalization, normalize: bool
    ) -> Tensor:
        """Evaluate the harmonics of vectors or of their directions, (*, 3) -> (*, n_sph)."""
        ...

    def edge_wigner(self, vectors: Tensor, lmax: int, mmax: int) -> Tensor:
        """Return the Wigner rows that take edges to +y, (n_edges, n_rows, n_sph)."""
        ...

    def rotate_to_edge(self, x: Tensor, frame: EdgeFrame, indices: tuple[Tensor, ...]) -> Tensor:
        """Gather by each index, join the channels, rotate into the edge frames."""
        ...

    def rotate_from_edge(
        self, y: Tensor, frame: EdgeFrame, envelope: Tensor | None, total: bool
    ) -> Tensor:
        """Rotate back to the lab frame and, if total, sum on the targets."""
        ...

    def so2_linear(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        c_out: int,
        bias: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Mix degrees and channels within each order; return rows and extra scalars."""
        ...

    def escn_conv(
        self,
        x: Tensor,
        frame: EdgeFrame,
        first: list[Tensor],
        second: list[Tensor],
        radial: Tensor | None,
        radial_weight: Tensor | None,
        radial_bias: Tensor | None,
        envelope: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        """Return a whole edge layer: both atoms, map, gate, map, sum on the targets."""
        ...

    def tensor_product(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
    ) -> Tensor:
        """Couple two features by Clebsch-Gordan paths."""
        ...

    def cg_conv(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        edge_index: Tensor,
        n_atoms: int,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
        radial_map: RadialMap | None,
    ) -> Tensor:
        """Gather x on the sources, couple it with y, sum on the targets.

        With ``radial_map`` the weights of an edge are still to be made, from what ``weights`` has.
        """
        ...

    def sphere_pointwise(
        self, x: Tensor, fn: Callable[[Tensor], Tensor], grid: SphereGrid
    ) -> Tensor:
        """Apply a function to the values on the points of a grid."""
        ...

    def sphere_silu(self, x: Tensor, grid: SphereGrid) -> Tensor:
        """Apply SiLU to the values on the points of a grid, (n, n_rows, channels)."""
        ...

    def sphere_product(
        self, x: Tensor, y: Tensor, left: Tensor, right: Tensor, out: Tensor
    ) -> Tensor:
        """Return out^T ((left x) * (right y)), tables of size (n_points, rows of each)."""
        ...

    def segment_sum(self, x: Tensor, index: Tensor, n_segments: int) -> Tensor:
        """Sum the members of each segment."""
        ...

    def segment_softmax(self, logits: Tensor, index: Tensor, n_segments: int) -> Tensor:
        """Normalise the members of each segment."""
        ...


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation inside the ``with`` block by one backend.

    The choice belongs to the current thread, and ends with the block. The block may lie around a
    function of ``torch.compile`` or within it.

    Args:
        name: ``cpu`` (C kernels), ``reference`` (plain torch) or ``auto``.

    Raises:
        ValueError: If no backend has this name.

    Example:
        >>> with use_backend("reference"):
        ...     chosen_backend()
        'reference'
    """
    _check_name(name, "use_backend")
    before = _choice.name
    _choice.name = name
    try:
        yield
    finally:
        _choice.name = before


def chosen_backend() -> str:
    """Return the name asked for here: by ``use_backend``, by the environment, else ``auto``.

    Raises:
        ValueError: If the environment asks for a backend that does not exist.
    """
    name = _choice.name
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _check_name(name, ENVIRONMENT_VARIABLE)
    return name


def select(
    op: str,
    *,
    lmax: int,
    mmax: int,
    channels: int,
    n_edges: int,
    like: Tensor,
    mode: Mode = "uvu",
    weighted: bool = True,
) -> Backend:
    """Return the backend that serves a call.

    Args:
        op: Name of the operation.
        lmax: Highest degree.
        mmax: Highest order.
        channels: Number of channels.
        n_edges: Number of rows the operation works on, edges mostly.
        like: A tensor with the dtype and device of the call.
        mode: How channels couple, in Clebsch-Gordan products.
        weighted: Whether the paths of such a product have weights.

    Raises:
        NotImplementedError: If the backend asked for by name does not serve this call.
        ValueError: If the environment asks for a backend that does not exist.
    """
    # Of the edges only none is told apart from some; in a trace sizes may be symbols.
    if torch.compiler.is_compiling():
        channels, find = len(range(channels)), _serving
    else:
        find = _remembered
    return find(
        *(chosen_backend(), AUTO_ORDER, torch.are_deterministic_algorithms_enabled()),
        *(op, lmax, mmax, channels, 1 if n_edges > 0 else 0, like.dtype, like.device),
        *(mode, weighted),
    )


def load_backend(name: str) -> Backend:
    """Return a backend by its name, importing it when first asked for."""
    if name not in _loaded:
        entry = EntryPoint(name, backends()[name], _GROUP)
        _loaded[name] = entry.load()()
    return _loaded[name]


def backends() -> dict[str, str]:
    """Return where each backend lives, ours and those of other distributions, which add names."""
    return {entry.name: entry.value for entry in entry_points(group=_GROUP)} | BACKENDS


def _serving(asked_for: str, order: tuple[str, ...], repeatable: bool, *call: Any) -> Backend:
    """Return the backend that serves a call; ``repeatable`` is what torch is asked for."""
    reasons = []  # the reference refuses nothing, so auto finds somebody
    for name in order if asked_for == "auto" else (asked_for,):
        reason = _refusal(name, *call)
        if reason is None:
            return _loaded[name]
        reasons.append(reason)
    raise NotImplementedError(
        f"backend {asked_for!r} was asked for but does not serve {call[0]}: {'; '.join(reasons)}; "
        f"choose another one or 'auto'"
    )


# A model makes the same few calls again and again; a refusal is not remembered, for it is an error.
_remembered = lru_cache(maxsize=1024)(_serving)


@constant_in_traces
def _refusal(name: str, *call: Any) -> str | None:
    """Return why a backend does not serve a call, or None; afterwards it is loaded."""
    spec = OpSpec(*call)
    reason = load_backend(name).refusal(spec)
    if reason is None:
        _announce(spec.op, name)
    return reason


@cache
def _announce(op: str, name: str) -> None:
    logger.debug("%s is served by the %s backend", op, name)  # once for each pair


def _check_name(name: str, source: str) -> None:
    if name == "auto" or name in BACKENDS or name in _loaded:  # each call of an operation asks
        return
    known = ("auto", *backends())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{source} asks for backend {name!r}; the backends are: {', '.join(known)}{meant}"
        )
