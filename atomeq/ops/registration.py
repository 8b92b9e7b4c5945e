"""How an operation is registered with torch: its value, its outputs, its gradient by formula.

A gradient formula calls registered operations and plain torch only, so it can be differentiated in
its turn: force training needs the gradient of a gradient, in eager mode as in a traced graph.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, wraps
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atomeq.ops.precision import PRECISIONS, use_precision

NAMESPACE = "atomeq"
# Kernels that sum on sorted edges; the others add as they go.
WANT_SEGMENTS = frozenset({"triton", *(f"triton:{one}" for one in PRECISIONS)})
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# What torch itself takes to come to the value of an operation, and has no public name for.
_BELOW_AUTOGRAD: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)

# From the saved inputs by name, the names whose gradient is wanted, and the gradients of the
# outputs (None for one that nothing depends on), to the gradients by name; a missing name is zero.
Gradient = Callable[..., Mapping[str, Tensor | list[Tensor] | list[Tensor | None] | None]]
functions: dict[str, Callable[..., Any]] = {}  # what the operations are made of, by their names
Outputs = Callable[[SimpleNamespace], Tensor | tuple[Tensor, ...] | list[Tensor]]


@cache
def kernels_of(family: str, name: str) -> ModuleType:
    """Return raw kernels, which take tensors, give tensors and know nothing of autograd.

    A string names them, since that is what an operation of a traced graph can carry.

    Args:
        family: Folder of ops.
        name: ``cpu`` or ``triton``, whose kernels need not have every operation of the family; a
            precision may follow, ``triton:high``.
    """
    return import_module(f"atomeq.ops.{family}.{name.partition(':')[0]}.kernels")


def kernel(
    *,
    outputs: Outputs,
    gradient: Gradient | None = None,
    only_for: Mapping[str, tuple[str, ...]] | None = None,
    keeps: tuple[int, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what kernels of the family have by the same name; the function has but a signature.

    A kernel takes one argument, the call: the operation's arguments by their names. Its tensors are
    contiguous, those in lists too.

    Args:
        outputs: As in :func:`registered`.
        gradient: Likewise.
        only_for: Likewise.
        keeps: Likewise.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(function).parameters)
        family = function.__module__.split(".")[-2]
        of_kernels = names.index("kernels")

        @wraps(function)
        def run(*values: Any) -> Any:
            by = kernels_of(family, values[of_kernels])
            plain = [contiguous(v) if isinstance(v, Tensor | list) else v for v in values]
            call = SimpleNamespace(**dict(zip(names, plain, strict=True)))
            return getattr(by, function.__name__)(call)

        return registered(outputs=outputs, gradient=gradient, only_for=only_for, keeps=keeps)(run)

    return decorate


def below_autograd() -> AbstractContextManager[None]:
    """Return a context in which operations are computed and autograd does not hear of them."""
    return torch.no_grad() if _BELOW_AUTOGRAD is None else _BELOW_AUTOGRAD()


class DispatchMode(TorchDispatchMode):
    """Sees what is sent below autograd, without torch's compiler, a second of time to import."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch that the compiler, which never sees it, need not be told to leave it alone."""
        return False


def contiguous(value: Any) -> Any:
    """Return a tensor, or some, in the order of their axes; anything else as it is."""
    if isinstance(value, Tensor):
        return value if value.is_contiguous() else value.contiguous()
    return [*map(contiguous, value)] if _is_list_of_tensors(value) else value


def registered(
    *,
    outputs: Outputs,
    gradient: Gradient | None = None,
    only_for: Mapping[str, tuple[str, ...]] | None = None,
    keeps: tuple[int, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``torch.ops.atomeq.<its name>``; its signature is the schema.

    Args:
        outputs: From the inputs as attributes to empty tensors like the results: all that a trace
            needs to know.
        gradient: ``gradient(saved, wanted, *grads)``, see :data:`Gradient`. ``saved`` has every
            input as an attribute; without one a backward pass through the operation is refused.
        only_for: Inputs kept for the gradient only if one of the named inputs requires one.
        keeps: Numbers of outputs that the gradient reads, as ``saved.outputs``.

    Returns:
        A decorator that gives the operation in the place of the function.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        names = tuple(signature.parameters)
        operation = f"{NAMESPACE}::{function.__name__}"
        schema = torch.library.infer_schema(function, mutates_args=())
        if "kernels" in names:
            function = _with_its_precision(function, names.index("kernels"))

        def fake(*values: Any) -> Any:
            return outputs(SimpleNamespace(**dict(zip(names, values, strict=True))))

        functions[operation] = function
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        torch.library.define(operation, schema, tags=tags)
        torch.library.impl(operation, "default", function)
        torch.library.register_fake(operation, fake)
        tape = _Tape(function.__name__, names, gradient, only_for or {}, keeps)
        registered = getattr(getattr(torch.ops, NAMESPACE), function.__name__).default
        if _BELOW_AUTOGRAD is None:
            torch.library.register_autograd(operation, tape.nested, setup_context=tape.save)
        else:
            taped = _taped(registered, tape, in_list=signature.return_annotation == list[Tensor])
            _library.impl(function.__name__, taped, "Autograd")
        for key in ("AutocastCPU", "AutocastCUDA"):
            _library.impl(function.__name__, _outside_autocast(registered), key)
        return registered

    return decorate


def _taped(registered: Any, tape: "_Tape", *, in_list: bool) -> Callable[..., Any]:
    """Return what torch calls of an operation first: its value, on the tape where it is wanted.

    torch.library.register_autograd does the same at three times the price, and calls of a small
    structure are not worth much more.

    Args:
        registered: The operation.
        tape: Its own.
        in_list: Whether it returns a list of tensors.
    """

    def forward(ctx: Any, values: tuple[Any, ...], *tensors: Tensor) -> Any:
        with _BELOW_AUTOGRAD():
            output = registered(*values)
        tape.save(ctx, values, output)
        return tuple(output) if in_list else output

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, *tape.gradients(ctx, *([list(grads)] if in_list else grads))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    taped = type(tape.operation, (torch.autograd.Function,), methods)

    def run(*values: Any) -> Any:
        if torch.is_grad_enabled():
            tensors = [one for value in values for one in _tensors_of(value)]
            if any([tensor.requires_grad for tensor in tensors]):
                output = taped.apply(values, *tensors)
                return list(output) if in_list else output
        with _BELOW_AUTOGRAD():
            return registered(*values)

    return run


def _with_its_precision(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Run kernels at the precision that follows their name, in whichever thread that is.

    Gradients run in threads of torch's own, which know nothing of what a caller asked for.
    """

    @wraps(function)
    def run(*values: Any) -> Any:
        _, named, precision = values[place].partition(":")
        if not named:
            return function(*values)
        with use_precision(precision):
            return function(*values)

    return run


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast out of an operation and its formula: kernels read no mixed numbers.

    Of an operation torch calls this where autocast is on, and nobody where it is off.
    """

    def run(*values: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*values)

    return run


class _Place(NamedTuple):
    """Where the tensors of an input lie among those saved."""

    single: bool
    start: int
    length: int


class _Tape:
    """Keeps the inputs of a call by name, and hands them to its gradient formula."""

    def __init__(
        self,
        operation: str,
        names: tuple[str, ...],
        gradient: Gradient | None,
        only_for: Mapping[str, tuple[str, ...]],
        keeps: tuple[int, ...],
    ) -> None:
        self.operation = operation
        self.names = names
        # Without a formula torch would give no gradient at all, and no more than a warning.
        self.gradient = self._refuse if gradient is None else gradient
        self.only_for = only_for
        self.keeps = keeps

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        members = [_tensors_of(value) for value in inputs]
        required = _requiring_grad(self.names, members)
        tensors: list[Tensor] = []
        layout: dict[str, Any] = {}
        for name, value, own in zip(self.names, inputs, members, strict=True):
            single = isinstance(value, Tensor)
            if not single and not _is_list_of_tensors(value):
                layout[name] = value
            elif name in self.only_for and not required.intersection(self.only_for[name]):
                layout[name] = None
            else:
                layout[name] = _Place(single, len(tensors), len(own))
                tensors += own
        tensors += [output[number] for number in self.keeps]
        ctx.layout, ctx.required = layout, required
        ctx.tensor_counts = [len(own) for own in members]
        ctx.save_for_backward(*tensors)

    def _refuse(self, *_: Any) -> Mapping[str, Any]:
        raise NotImplementedError(
            f"{NAMESPACE}::{self.operation} has no derivative; with use_backend('reference') the "
            f"same function is plain torch, with derivatives of any order"
        )

    def gradients(self, ctx: Any, *grads: Any) -> list[Tensor | None]:
        """Return the gradient of each tensor among the inputs, those in lists one by one."""
        tensors = list(ctx.saved_tensors)
        saved = SimpleNamespace(outputs=tensors[len(tensors) - len(self.keeps) :])
        for name, value in ctx.layout.items():
            if isinstance(value, _Place):
                members = tensors[value.start : value.start + value.length]
                value = members[0] if value.single else members
            setattr(saved, name, value)
        found: Mapping[str, Any] = {}
        if any([grad is not None for grad in grads]):
            wanted = ctx.required & _on_the_way(ctx, self.names)
            mixed = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
            found = (_outside_autocast(self.gradient) if mixed else self.gradient)(
                saved, wanted, *grads
            )
        results: list[Tensor | None] = []
        for name, count in zip(self.names, ctx.tensor_counts, strict=True):
            own = found.get(name)
            if isinstance(own, list | tuple):  # to compare a tensor with [] takes torch 30 µs
                results += own or [None] * count
            else:
                results += [own] * count
        return results

    def nested(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Return the gradients as torch.library wants them: those of a list in a list."""
        flat = iter(self.gradients(ctx, *grads))
        return tuple(
            [next(flat) for _ in range(count)] if isinstance(need, list | tuple)
            else next(flat) if count else None
            for count, need in zip(ctx.tensor_counts, ctx.needs_input_grad, strict=True)
        )  # fmt: skip


def _requiring_grad(names: tuple[str, ...], members: list[Sequence[Tensor]]) -> set[str]:
    """Return the inputs that require a gradient, and the members of lists as ``weights.0``."""
    required: set[str] = set()
    for name, own in zip(names, members, strict=True):
        for n, member in enumerate(own):
            if member.requires_grad:
                required |= {name, f"{name}.{n}"}
    return required


def _on_the_way(ctx: Any, names: tuple[str, ...]) -> set[str]:
    """Return the inputs whose gradient leads to something the running backward pass is asked for.

    Of a list of tensors each member has a name too, ``weights.0`` and so on.

    Torch tells a Python function which inputs require a gradient, not which of them are wanted:
    forces would pay for the gradient of every weight.
    """
    if torch.compiler.is_compiling() or sum(ctx.tensor_counts) != len(ctx.next_functions):
        return ctx.required
    nodes, found = iter(ctx.next_functions), set()
    for name, count in zip(names, ctx.tensor_counts, strict=True):
        for n in range(count):
            if _will_run(next(nodes)[0]):
                found |= {name, f"{name}.{n}"}
    return found


def _will_run(node: Any) -> bool:
    """Ask the running backward pass, by the one private function of torch that can tell.

    Where it cannot, a gradient is made that may be thrown away.
    """
    if node is None:
        return False
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    if ask is None or node.name().endswith("AccumulateGrad"):  # torch cannot tell for leaves
        return True
    return ask(node)


def _tensors_of(value: Any) -> Sequence[Tensor]:
    """Return the tensors of an input: itself, or those of a list."""
    if isinstance(value, Tensor):
        return (value,)
    return value if _is_list_of_tensors(value) else ()


def _is_list_of_tensors(value: Any) -> bool:
    """Say whether an input is a list of tensors, or empty: the schema mixes no kinds in a list."""
    return isinstance(value, list | tuple) and (not value or isinstance(value[0], Tensor))


def differentiable_gradient(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor
) -> Tensor:
    """Return the gradient of <grad, function(x)>, itself differentiable in x and ``grad``.

    For formulas of operations whose first gradient has a kernel, and whose others are rare.
    """
    with torch.enable_grad():
        twin = x.view_as(x)
        if not twin.requires_grad:
            twin.requires_grad_()
        (found,) = torch.autograd.grad(function(twin), twin, grad, create_graph=True)
    return found
