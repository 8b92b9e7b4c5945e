"""LoRA: fine-tuning by low-rank updates of linear maps, merged as the potential is saved.

Hu et al., ICLR 2022, arXiv:2106.09685. A map W becomes W + B A with B starting at zero, so that
training begins with what the potential knows and has few parameters to do it with. Maps between
irreps keep their symmetry, for what is updated is the matrix of channels of each degree or order.
"""

import copy
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atomeq.nn.irreps import IrrepsLinear, NormalisedMLP, SpeciesLinear
from atomeq.nn.so3 import SO2Convolution, SO3Linear
from atomeq.training.parameters import is_part

#: The linear maps, and where they keep their matrices: a parameter, or a list or dict of them.
MAPS: dict[type[nn.Module], str] = {
    nn.Linear: "weight",
    SO3Linear: "weight",
    SO2Convolution: "weights",
    IrrepsLinear: "weights",
    SpeciesLinear: "weights",
    NormalisedMLP: "weights",
}

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class LoRA:
    """Which maps are updated by matrices of low rank; all else is frozen.

    Attributes:
        rank: Of the updates, at most that of a map.
        parts: Names of parts of the network as in ``rates``; by default every linear map.
    """

    rank: int = 8
    parts: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of an update is 1 or more, not {self.rank}")


class LowRankUpdate(nn.Module):
    """W + B A for a matrix, or for each of a stack of them.

    Args:
        weight: W, (*, rows, columns); (rows, n, columns) where ``stacked_by`` is 1.
        rank: Columns of B and rows of A.
        stacked_by: The dimension that counts the matrices of a stack.
        generator: Of A, which has the spread of W: a step of B moves W by the same fraction
            whatever the network divides it by.
    """

    def __init__(
        self, weight: Tensor, rank: int, *, stacked_by: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.stacked_by = stacked_by
        *stack, rows, columns = _stacked(weight, stacked_by).shape
        rank = min(rank, rows, columns)
        spread = float(weight.detach().square().mean().sqrt()) or 1.0 / math.sqrt(columns)
        down = torch.randn(*stack, rank, columns, generator=generator, dtype=torch.float64)
        self.down = nn.Parameter((down * spread).to(weight))
        self.up = nn.Parameter(weight.new_zeros(*stack, rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        update = self.up @ self.down
        return weight + (update.movedim(0, self.stacked_by) if self.stacked_by else update)


def add_low_rank_updates(network: nn.Module, lora: LoRA) -> None:
    """Freeze a network and give its linear maps updates that are trained in their place.

    Args:
        network: Changed in place; what it computes stays the same.
        lora: Which maps, and the rank.

    Raises:
        ValueError: None of its linear maps is in one of the parts.
    """
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, module in network.named_modules():
        kept_in = next((MAPS[kind] for kind in MAPS if isinstance(module, kind)), None)
        if kept_in is not None:
            stacked_by = int(isinstance(module, SpeciesLinear))
            holder, keys = module, [kept_in]
            if kept_in == "weights":
                holder = module.get_submodule("weights")
                keys = [key for key, _ in holder.named_parameters(recurse=False)]
            prefix = f"{name}.weights" if kept_in == "weights" else name
            found += [(prefix, holder, key, stacked_by) for key in keys]
    chosen = [entry for entry in found if any(is_part(entry[0], part) for part in lora.parts)]
    unmet = [p for p in lora.parts if not any(is_part(prefix, p) for prefix, *_ in found)]
    if unmet or not chosen:
        raise ValueError(
            f"no linear map of the {type(network).__name__} is in the part {unmet or lora.parts}; "
            f"there are {', '.join(sorted({prefix.split('.')[0] for prefix, *_ in found}))}"
        )
    for _, holder, key, stacked_by in chosen:
        weight: Tensor = getattr(holder, key)
        update = LowRankUpdate(weight, lora.rank, stacked_by=stacked_by, generator=generator)
        parametrize.register_parametrization(holder, key, update)


def merged(network: Network) -> Network:
    """Return a network with its low-rank updates added to its weights; one without is itself."""
    if not any(isinstance(module, LowRankUpdate) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for key in list(module.parametrizations):  # pyright: ignore[reportArgumentType]
                parametrize.remove_parametrizations(module, key)
    return network


def _stacked(weight: Tensor, stacked_by: int) -> Tensor:
    return weight.movedim(stacked_by, 0) if stacked_by else weight
