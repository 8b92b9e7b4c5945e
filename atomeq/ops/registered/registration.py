"""How an operation is registered with torch: its value, its shapes, its gradient by formula.

A gradient formula calls registered operations and plain torch only, so it can be differentiated in
its turn: force training needs the gradient of a gradient, in eager mode as in a traced graph.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from atomeq.ops.registered.direct import may_call

NAMESPACE = "atomeq"

# From the saved inputs by name, the names whose gradient is wanted, and the gradients of the
# outputs (None for one that nothing depends on), to the gradients by name; a missing name is zero.
Gradient = Callable[..., Mapping[str, Tensor | list[Tensor] | list[Tensor | None] | None]]


def registered(
    *,
    fake: Callable[..., Any],
    gradient: Gradient | None = None,
    only_for: Mapping[str, tuple[str, ...]] | None = None,
    keeps: tuple[int, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``torch.ops.atomeq.<its name>``.

    Args:
        fake: Takes the same arguments and returns empty tensors of the right shapes.
        gradient: ``gradient(saved, wanted, *grads)``, see :data:`Gradient`. ``saved`` has every
            input as an attribute; None leaves the operation without a derivative.
        only_for: Inputs kept for the gradient only if one of the named inputs requires one.
        keeps: Numbers of outputs that only the gradient reads, as ``saved.outputs``; nothing can
            be differentiated through them.

    Returns:
        A decorator; the decorated function is the operation.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=())
        operation = _Operation(NAMESPACE, function.__name__, schema, function)
        operation.register_kernel(None)(function)
        operation.register_fake(fake)
        if gradient is not None:
            tape = _Tape(tuple(inspect.signature(function).parameters), only_for or {}, keeps)
            operation.register_autograd(partial(tape.gradients, gradient), setup_context=tape.save)
        return operation

    return decorate


class _Operation(CustomOpDef):
    """What ``torch.library.custom_op`` makes, with a short way for calls that need no more."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and may_call((*args, *kwargs.values())):
            return self._init_fn(*args, **kwargs)
        return self._opoverload(*args, **kwargs)


class _Place(NamedTuple):
    """Where the tensors of an input lie among those saved."""

    single: bool
    start: int
    length: int


class _Tape:
    """Keeps the inputs of a call by name, and hands them to its gradient formula."""

    def __init__(
        self,
        names: tuple[str, ...],
        only_for: Mapping[str, tuple[str, ...]],
        keeps: tuple[int, ...],
    ) -> None:
        self.names = names
        self.only_for = only_for
        self.keeps = keeps

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        required = {
            name
            # torch appends an entry of its own
            for name, needs in zip(self.names, ctx.needs_input_grad, strict=False)
            if (any(needs) if isinstance(needs, list | tuple) else needs)
        }
        tensors: list[Tensor] = []
        ctx.layout, ctx.tensor_counts = {}, []
        for name, value in zip(self.names, inputs, strict=True):
            members = [value] if isinstance(value, Tensor) else value
            if not isinstance(members, list | tuple) or not _all_tensors(members):
                ctx.layout[name] = value
                ctx.tensor_counts.append(0)
                continue
            ctx.tensor_counts.append(len(members))
            if name in self.only_for and not required.intersection(self.only_for[name]):
                ctx.layout[name] = None
                continue
            ctx.layout[name] = _Place(isinstance(value, Tensor), len(tensors), len(members))
            tensors += members
        if self.keeps:
            kept = [output[number] for number in self.keeps]
            ctx.mark_non_differentiable(*kept)
            tensors += kept
        ctx.required = required
        ctx.save_for_backward(*tensors)

    def gradients(self, gradient: Gradient, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        saved = SimpleNamespace(outputs=tensors[len(tensors) - len(self.keeps) :])
        for name in self.names:
            value = ctx.layout[name]
            if isinstance(value, _Place):
                members = tensors[value.start : value.start + value.length]
                value = members[0] if value.single else members
            setattr(saved, name, value)
        found: Mapping[str, Any] = {}
        if any(grad is not None for grad in grads):
            found = gradient(saved, ctx.required & _on_the_way(ctx, self.names), *grads)
        return tuple(
            found.get(name) or [None] * count
            if isinstance(ctx.needs_input_grad[number], list | tuple)
            else found.get(name)
            for number, (name, count) in enumerate(zip(self.names, ctx.tensor_counts, strict=True))
        )


def _on_the_way(ctx: Any, names: tuple[str, ...]) -> set[str]:
    """Return the inputs whose gradient leads to something the running backward pass is asked for.

    Torch tells a Python function which inputs require a gradient, not which of them are wanted:
    forces would pay for the gradient of every weight.
    """
    nodes = iter(ctx.next_functions)
    if torch.compiler.is_compiling() or sum(ctx.tensor_counts) != len(ctx.next_functions):
        return set(names)
    return {
        name
        for name, count in zip(names, ctx.tensor_counts, strict=True)
        if any([_will_run(next(nodes)[0]) for _ in range(count)])
    }


def _will_run(node: Any) -> bool:
    if node is None:
        return False
    if node.name().endswith("AccumulateGrad"):  # torch cannot tell for leaves
        return True
    return torch._C._will_engine_execute_node(node)


def _all_tensors(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(value, Tensor) for value in values)
