"""An operation: one signature, a verifier, its truth in plain torch, and who else serves it.

The choice is made call by call: ``with use_backend(name)``, else the environment variable
ATOMEQ_BACKEND, else ``auto``, the first backend of :data:`AUTO_ORDER` that serves the operation. A
backend asked for by name serves or the call raises, saying why; only ``auto`` may pass on.

A backend is a module, or any object, with ``refusal(spec)``, which returns why it does not serve a
call or None, and with a function for each operation it serves, of the operation's name, which is
given every argument by its own; these may trust the verifier. It is differentiable any number of
times in whatever is a floating-point argument, and ``by_torch(spec)``, if it has one, says of which
calls it leaves to the reference. Our own kernels are raw functions instead, tensors in and tensors
out, which the operation calls by what it has registered with torch: see :func:`operation`.

``torch.compile`` traces the choice too, inside a compiled function or around it: a graph belongs to
the choice it was traced under, and another one makes another graph. Only the environment is read
once, at the trace.
"""

import difflib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from inspect import Parameter, signature
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from atomeq.ops.precision import matmul_precision, use_precision
from atomeq.ops.self_check import Example, deviation
from atomeq.ops.specification import Mode, OpSpec, Size
from atomeq.traces import constant_in_traces
from atomeq.typing import Precision

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

# Where each backend lives; it is imported when first asked for. Kernels lie in the folder of their
# family. Those of other distributions, named by entry points of the group atomeq.backends, come
# after them.
BACKENDS: dict[str, str] = {
    "cpu": "atomeq.ops.{family}.cpu.kernels",
    "reference": "",  # the operation itself
    "e3nn": "atomeq.ops.coupling.e3nn",
    "cuequivariance": "atomeq.ops.coupling.cuequivariance",
    "openequivariance": "atomeq.ops.coupling.openequivariance",
    "triton": "atomeq.ops.{family}.triton.kernels",
}
KERNELS = frozenset(name for name, path in BACKENDS.items() if "{family}" in path)  # our own
AUTO_ORDER: tuple[str, ...] = ("cpu", "triton", "reference")  # the fastest first; others if named
# Where kernels serve unasked what they have proved themselves in; an interpreter only when named.
PROVED: dict[str, frozenset[str]] = {"triton": frozenset({"cuda"})}
ENVIRONMENT_VARIABLE = "ATOMEQ_BACKEND"
_GROUP = "atomeq.backends"


class Operation(NamedTuple):
    """What is known of an operation.

    Attributes:
        name: Of the public function.
        family: Folder of ops that it lives in.
        reference: The function as it is written: the truth, in plain torch.
        by_kernels: The same in terms of what is registered with torch, with the name of the
            kernels as one argument more, ``kernels``; None if no kernels of ours have it.
        example: A random problem by which kernels prove themselves, see self_check.
        names: Of the arguments.
        defaults: Of those that have some.
    """

    name: str
    family: str
    reference: Callable[..., Any]
    by_kernels: Callable[..., Any] | None
    example: Callable[[Size], Example] | None
    names: tuple[str, ...]
    defaults: dict[str, Any]

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return every argument of a call by its name."""
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}

    def served_by(self, kernels: str) -> Callable[..., Any]:
        """Return a function of the operation's signature that some kernels compute."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            assert self.by_kernels is not None
            return self.by_kernels(**self.arguments(args, kwargs), kernels=kernels)

        return compute


OPERATIONS: dict[str, Operation] = {}


def operation(
    verify: Callable[..., Size],
    *,
    by_kernels: Callable[..., Any] | None = None,
    example: Callable[[Size], Example] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let backends serve a function that is written in plain torch.

    Verifier, kernels and backends are given every argument by its name, the defaults too.

    Args:
        verify: Refuses arguments that do not fit together; returns what the choice depends on.
        by_kernels: See :class:`Operation`.
        example: See :class:`Operation`; without one no kernels serve unasked on a GPU.

    Returns:
        A decorator. The function verifies its arguments and hands them to whoever serves the call.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        name, family = reference.__name__, reference.__module__.split(".")[-2]
        parameters = signature(reference).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not Parameter.empty}
        known = OPERATIONS[name] = Operation(
            name, family, reference, by_kernels, example, tuple(parameters), defaults
        )

        @wraps(reference)
        def served(*args: P.args, **kwargs: P.kwargs) -> R:
            given = known.arguments(args, kwargs)
            server = serving(name, verify(**given))
            if server == "reference":
                return reference(*args, **kwargs)
            if by_kernels is not None and server in KERNELS:
                return by_kernels(**given, kernels=_with_precision(server))
            return getattr(_loaded[server, family], name)(**given)

        return served

    return decorate


def size_of(
    like: Tensor,
    n_edges: int,
    *,
    lmax: int = 0,
    mmax: int = 0,
    channels: int = 1,
    mode: Mode = "uvu",
    weighted: bool = True,
) -> Size:
    """Return the size of a call on tensors like one of them.

    Of ``n_edges`` is kept whether there are any; in a trace sizes may be symbols, of which the
    channels become a number.
    """
    if torch.compiler.is_compiling():
        channels = len(range(channels))
    some = 1 if n_edges > 0 else 0
    return Size(lmax, mmax, channels, some, like.dtype, like.device, mode, weighted)


def _with_precision(server: str) -> str:
    """Return what names kernels in a call and in its gradients: only tensor cores round."""
    return server if server == "cpu" else f"{server}:{matmul_precision()}"


class _Choice(threading.local):
    """The name asked for in this thread; a plain attribute, since that is what a trace guards."""

    def __init__(self) -> None:
        self.name: str | None = None


_choice = _Choice()
_loaded: dict[tuple[str, str], Any] = {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation inside the ``with`` block by one backend.

    The choice belongs to the current thread, and ends with the block. The block may lie around a
    function of ``torch.compile`` or within it.

    Args:
        name: ``cpu`` (C kernels), ``reference`` (plain torch) or ``auto``.

    Returns:
        A context manager.

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


def serving(op: str, size: Size) -> str:
    """Return the backend that serves a call, ``reference`` if that one leaves it to plain torch.

    Raises:
        NotImplementedError: If the backend asked for by name does not serve this call.
        ValueError: If the environment asks for a backend that does not exist.
    """
    find = _serving if torch.compiler.is_compiling() else _remembered
    return find(
        *(chosen_backend(), AUTO_ORDER, torch.are_deterministic_algorithms_enabled()),
        *(matmul_precision(), op, *size),
    )


def load_backend(name: str, family: str) -> Any:
    """Return a backend by its name, importing it when first asked for.

    Args:
        name: Of the backend, not ``reference``.
        family: Whose kernels are wanted; other backends have one module for all.

    Returns:
        The backend, or None if it has no kernels of this family.
    """
    if (name, family) not in _loaded:
        path = backends()[name].format(family=family)
        if ":" in path:
            found = EntryPoint(name, path, _GROUP).load()
            found = found() if isinstance(found, type) else found
        else:
            found = import_module(path) if find_spec(path.rpartition(".")[0]) else None
        _loaded[name, family] = found
    return _loaded[name, family]


def backends() -> dict[str, str]:
    """Return where each backend lives, ours and those of other distributions, which add names."""
    return {entry.name: entry.value for entry in entry_points(group=_GROUP)} | BACKENDS


def refusal(name: str, spec: OpSpec) -> str | None:
    """Return why a backend does not serve a call, or None if it does.

    The answer may depend on the call, on what the machine has and on whether torch is asked for
    repeatable sums, nothing else: it is remembered. Of ``n_edges`` only 0 may be told apart.
    """
    if name == "reference":
        return None
    if name == "triton" and (missing := _triton_is_missing()):  # before its modules are imported
        return missing
    op = OPERATIONS[spec.op]
    backend = load_backend(name, op.family)
    if backend is None:
        return f"the {name} backend has no kernels for it"
    reason = backend.refusal(spec)
    if reason is not None or _by_torch(backend, spec) or hasattr(backend, op.name):
        return reason
    return (
        None if op.by_kernels and name in KERNELS else f"the {name} backend has no such operation"
    )


def by_torch(name: str, spec: OpSpec) -> bool:
    """Whether a backend leaves a call that it serves to plain torch, for want of a kernel."""
    if name == "reference":
        return True
    return _by_torch(load_backend(name, OPERATIONS[spec.op].family), spec)


def _by_torch(backend: Any, spec: OpSpec) -> bool:
    return hasattr(backend, "by_torch") and backend.by_torch(spec)


def _serving(
    asked_for: str,
    order: tuple[str, ...],
    repeatable: bool,
    precision: Precision,
    op: str,
    *size: Any,
) -> str:
    """Return who serves a call; ``repeatable`` is what torch is asked for."""
    reasons = []  # the reference refuses nothing, so auto finds somebody
    for name in order if asked_for == "auto" else (asked_for,):
        reason = _refusal(name, op, *size)
        if reason is None and asked_for == "auto":
            reason = _distrust(name, precision, op, *size)
        if reason is None:
            return "reference" if _left(name, op, *size) else name
        reasons.append(reason)
    raise NotImplementedError(
        f"backend {asked_for!r} was asked for but does not serve {op}: {'; '.join(reasons)}; "
        f"choose another one or 'auto'"
    )


# A model makes the same few calls again and again; a refusal is not remembered, for it is an error.
_remembered = lru_cache(maxsize=1024)(_serving)


@constant_in_traces
def _refusal(name: str, op: str, *size: Any) -> str | None:
    """Return why a backend does not serve a call, or None; afterwards it is loaded."""
    reason = refusal(name, OpSpec(op, *size))
    if reason is None:
        _announce(op, name)
    return reason


def distrust(name: str, spec: OpSpec) -> str | None:
    """Return why ``auto`` passes over a backend that does not refuse a call, or None.

    The first call of its degrees and dtype on a device compares value and gradients with the
    reference on a small random problem; what deviates or does not compile is logged once.
    """
    if name not in PROVED:
        return None
    if spec.device.type not in PROVED[name]:
        return f"on {spec.device.type} it serves only when asked for by name"
    if by_torch(name, spec):
        return None
    _, *size = spec._replace(n_edges=1)
    return _proof(name, matmul_precision(), spec.op, *size)


@cache
def _proof(name: str, precision: Precision, op: str, *size: Any) -> str | None:
    """Return what the self-check finds; it depends on how matrices are multiplied."""
    known = OPERATIONS[op]
    if known.example is None or known.by_kernels is None:
        return "it has no self-check"
    found = deviation(known.example, known.reference, known.served_by(name), Size(*size), precision)
    if found is None:
        return None
    logger.warning(
        "the %s kernels of %s failed their self-check (%s) and plain torch serves it; "
        "ATOMEQ_BACKEND=%s takes them nevertheless",
        name,
        op,
        found,
        name,
    )
    return f"its self-check failed: {found}"


@constant_in_traces
def _distrust(name: str, precision: Precision, op: str, *size: Any) -> str | None:
    with use_precision(precision):
        return distrust(name, OpSpec(op, *size))


@constant_in_traces
def _left(name: str, op: str, *size: Any) -> bool:
    """Whether a backend leaves a call that it does not refuse to plain torch."""
    return by_torch(name, OpSpec(op, *size))


def _triton_is_missing() -> str | None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton's kernels need CUDA, which this machine has not "
            "(torch.cuda.is_available() is False); TRITON_INTERPRET=1 in the environment runs "
            "them on a CPU, for tests"
        )
    if find_spec("triton") is None:
        return "Triton is not installed: pip install atomeq[cuda]"
    return None


@cache
def _announce(op: str, name: str) -> None:
    logger.debug("%s is served by the %s backend", op, name)  # once for each pair


def _check_name(name: str, source: str) -> None:
    if name == "auto" or name in BACKENDS:  # each call of an operation asks
        return
    known = ("auto", *backends())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{source} asks for backend {name!r}; the backends are: {', '.join(known)}{meant}"
        )
