"""Reads what flows through the modules of a model while it computes."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from checkers.cases import Tensors


class Taps:
    """Hooks on modules, for the time of a ``with``; ``found`` has what they read, as ``mid.*``."""

    def __init__(self) -> None:
        self.found: Tensors = {}
        self._hooks: list[Any] = []

    def read(self, module: nn.Module | None, read: Callable[[tuple, Any], Tensors]) -> None:
        """Keep what a function makes of a module's inputs and result, by name."""

        def hook(_module: nn.Module, given: tuple, result: Any) -> None:
            values = read(given, result)
            self.found.update({f"mid.{name}": value.detach() for name, value in values.items()})

        if module is not None:
            self._hooks.append(module.register_forward_hook(hook))

    def keep(self, module: nn.Module | None, name: str, rows: int | None = None) -> None:
        """Keep a module's result, or its first rows."""
        self.read(module, lambda _given, result: {name: result[:rows]})

    def keep_block(self, block: nn.Module, name: str) -> None:
        """Keep what goes into a block and comes out."""
        self.read(block, lambda given, result: {f"{name}.in": given[0], f"{name}.out": result})

    def __enter__(self) -> Tensors:
        return self.found

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()


def first_rows(
    name: str, rows: int, order: Callable[[Tensor], Tensor]
) -> Callable[[tuple, tuple[Tensor, Tensor]], Tensors]:
    """Return what reads the first edges of an SO(2) map, and its extra scalars."""

    def read(_given: tuple, result: tuple[Tensor, Tensor]) -> Tensors:
        features, scalars = (tensor[:rows] for tensor in result)
        return {f"{name}_out": order(features), f"{name}_extra_m0": scalars}

    return read
