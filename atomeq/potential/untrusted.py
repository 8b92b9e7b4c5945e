"""What is checked of a checkpoint from elsewhere before, while and after a network is built of it.

A file may be damaged or written to do harm: YAML that expands without end, a network that needs all
memory, weights that are not what they are said to be. Each is one line that names the file.
"""

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from atomeq.ops.registration import DispatchMode
from atomeq.potential.folders import CheckpointError

_MAX_BYTES = 10_000_000
_MAX_DEPTH = 32
_MAX_VALUES = 100_000  # with every alias written out


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping of plain values.

    Raises:
        CheckpointError: It holds no mapping, or :func:`read_plain` refuses it.
    """
    document = read_plain(path)
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, and no mapping of names")
    return document


def read_plain(path: Path) -> Any:
    """Read a YAML file of plain values.

    Raises:
        CheckpointError: It is not there, no YAML, too large, nested too deeply, holds itself, or
            grows beyond measure where aliases are written out.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(
                f"{path} has more than {_MAX_BYTES:,} bytes, which no description has"
            )
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None:
            _n_values(node, {})
        return None if node is None else loader.construct_document(node)
    except (OSError, yaml.YAMLError, ValueError) as error:  # ValueError: dates, digits, UTF-8
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not readable YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """Plain values, nested so deep that Python's stack holds."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _n_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return how many values a node holds, an alias counted each time."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise yaml.YAMLError("a part of it holds itself")
        return counted[id(node)]
    counted[id(node)] = 0
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inside = [one for pair in node.value for one in pair]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    total = counted[id(node)] = 1 + sum(_n_values(one, counted) for one in inside)
    if total > _MAX_VALUES:
        raise yaml.YAMLError(f"its aliases make more than {_MAX_VALUES:,} values of it")
    return total


class FitsWeights(DispatchMode):
    """While it is entered, what a network allocates must be in proportion to its weights.

    So a description of a huge network fails at the first tensor that is out of proportion, before
    memory is touched: tensors reach here as sizes.

    Args:
        weights: Those that will be loaded into it.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        # Generous: initialisations allocate several times, and tables are no weights.
        self.n_tensors = 10_000 + 100 * len(weights)
        self.n_numbers = 20_000_000 + 8 * sum(value.numel() for value in weights.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count what a call creates, then let it."""
        if args and not any(isinstance(one, Tensor) for one in args):
            lists = [one for one in args if isinstance(one, list | tuple)]
            # Lists of tensors, which are joined, are no larger than what made them.
            shapes = [math.prod(one) for one in lists if all(isinstance(n, int) for n in one)]
            lengths = [one for one in args if isinstance(one, int)]  # arange, linspace
            self.n_tensors -= 1
            self.n_numbers -= max(shapes or lengths, default=0)
            if min(self.n_tensors, self.n_numbers) < 0:
                raise ValueError("this network is far larger than the weights saved with it")
        return func(*args, **(kwargs or {}))


def refuse_unfit_weights(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Refuse weights of another dtype than the module's, and weights that are NaN or infinite.

    Args:
        module: In the dtype that its description declares.
        weights: By name; whether names and shapes fit is not looked at.
        path: Where they were read.

    Raises:
        CheckpointError: Naming the tensor.
    """
    expected = module.state_dict()
    for name, tensor in weights.items():
        if name in expected and tensor.dtype != expected[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}, where its description says "
                f"{expected[name].dtype}; one of the two files was exchanged"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity, so all results would; the training that "
                "wrote it has diverged"
            )


def refuse_meta_device() -> None:
    """Raise ``ValueError`` where torch's default device is ``meta``, whose tensors hold nothing."""
    if torch.get_default_device().type == "meta":
        raise ValueError(
            "torch's default device is 'meta', whose tensors hold no numbers; load and use "
            "potentials outside of it, with torch.set_default_device('cpu')"
        )
