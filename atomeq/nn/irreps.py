"""Features as lists of irreps, with channels per degree and parity, and the blocks that keep them.

Features are a dictionary, irrep -> (n, 2l + 1, channels): degrees may have different numbers of
channels, and nothing is padded. Weights have unit variance and every sum is divided by the root of
its number of terms, as in e3nn (arXiv:2207.09453), whose trained weights so mean the same here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atomeq.traces import known_to_the_host

# Roots of the inverse second moments over a normal variable, as e3nn 0.6 draws them: 10^6 samples
# of a seeded generator, and not the exact integrals, which differ in the fourth digit.
SECOND_MOMENTS = {
    "silu": 1.6791767923989418,
    "tanh": 1.5937334472592695,
    "ssp": 1.878204668541552,
    "relu": 1.4163393446331365,
    "sigmoid": 1.8467055342154763,
    "elu": 1.2467863885570512,
    "abs": 1.001110600838467,
}


class Irrep(NamedTuple):
    """Degree l and parity p, 1 for even (e) and -1 for odd (o)."""

    l: int
    p: int

    def __str__(self) -> str:
        return f"{self.l}{'e' if self.p == 1 else 'o'}"


Irreps = dict[Irrep, int]  # irrep -> channels, in the order of the text
Features = dict[Irrep, Tensor]  # irrep -> (n, 2l + 1, channels)
SCALAR = Irrep(0, 1)


def parse_irreps(text: str) -> Irreps:
    """Read irreps such as ``128x0e+64x1o``.

    Raises:
        ValueError: An entry is none, has no channels, or stands there twice.
    """
    found: Irreps = {}
    for entry in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(\d+)x(\d+)([eo])", entry)
        if match is None or int(match[1]) == 0:
            raise ValueError(f"irreps {text!r}: {entry!r} is not like 64x1o, channels x degree e|o")
        irrep = Irrep(int(match[2]), 1 if match[3] == "e" else -1)
        if irrep in found:
            raise ValueError(f"irreps {text!r} name {irrep} twice; add its channels up")
        found[irrep] = int(match[1])
    return found


def sorted_irreps(irreps: Mapping[Irrep, int]) -> Irreps:
    """Return them by degree, odd before even."""
    return {irrep: irreps[irrep] for irrep in sorted(irreps)}


def activation(name: str, x: Tensor) -> Tensor:
    """Apply an activation scaled to unit second moment over a normal variable.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in SECOND_MOMENTS:
        raise ValueError(f"activation {name!r} is unknown; choose from {', '.join(SECOND_MOMENTS)}")
    if name == "ssp":
        values = nn.functional.softplus(x) - math.log(2.0)
    elif name == "abs":
        values = x.abs()
    elif name in ("tanh", "sigmoid"):
        values = getattr(torch, name)(x)
    else:
        values = getattr(nn.functional, name)(x)
    return values * SECOND_MOMENTS[name]


def linear_blocks(flat: Tensor, inputs: Irreps, outputs: Irreps) -> tuple[dict[Irrep, Tensor], int]:
    """Cut e3nn's flat weights of a linear map into the blocks of :class:`IrrepsLinear`.

    Args:
        flat: Block after block, in the order of the inputs.
        inputs: Irreps of x.
        outputs: Irreps of y.

    Returns:
        irrep -> (channels of x, channels of y), and how many numbers were read.
    """
    blocks, start = {}, 0
    for irrep, n_in in inputs.items():
        if irrep in outputs:
            size = n_in * outputs[irrep]
            blocks[irrep] = flat[start : start + size].reshape(n_in, outputs[irrep])
            start += size
    return blocks, start


class IrrepsLinear(nn.Module):
    """Mix the channels of each irrep: y = (x W + folded) / √fan, and a bias of the even scalars.

    Args:
        inputs: Irreps of x.
        outputs: Irreps of y; those that x lacks become zeros.
        bias: Add a bias to the even scalars.
        folded: Even scalars of the input that are the same for all atoms and whose product with
            their weights is kept as one vector; they count in the fan.
    """

    def __init__(
        self, inputs: Irreps, outputs: Irreps, *, bias: bool = False, folded: int = 0
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.fans = {irrep: n + (folded if irrep == SCALAR else 0) for irrep, n in inputs.items()}
        shared = [irrep for irrep in outputs if irrep in inputs]
        self.weights = nn.ParameterDict(
            {str(ir): nn.Parameter(torch.randn(inputs[ir], outputs[ir])) for ir in shared}
        )
        n_scalars = outputs.get(SCALAR, 0)
        self.folded = nn.Parameter(torch.zeros(n_scalars)) if folded and n_scalars else None
        self.bias = nn.Parameter(torch.zeros(n_scalars)) if bias and n_scalars else None

    def forward(self, x: Features) -> Features:
        """Map features, irrep -> (n, 2l + 1, channels)."""
        result = {}
        for irrep, channels in self.outputs.items():
            if str(irrep) not in self.weights:
                some = next(iter(x.values()))
                result[irrep] = some.new_zeros(some.shape[0], 2 * irrep.l + 1, channels)
                continue
            weight = self.weights[str(irrep)] / math.sqrt(self.fans[irrep])
            y = x[irrep] @ weight
            if irrep == SCALAR and self.folded is not None:
                y = y + self.folded / math.sqrt(self.fans[irrep])
            if irrep == SCALAR and self.bias is not None:
                y = y + self.bias
            result[irrep] = y
        return result


class SpeciesLinear(nn.Module):
    """Mix the channels of each irrep by weights of the atom's element: y = x W[element] / √fan.

    Args:
        inputs: Irreps of x.
        outputs: Irreps of y; those that x lacks are left out.
        n_species: Number of elements, which counts in the fan.
    """

    def __init__(self, inputs: Irreps, outputs: Irreps, n_species: int) -> None:
        super().__init__()
        self.n_species = n_species
        self.weights = nn.ParameterDict(
            {
                str(irrep): nn.Parameter(torch.randn(inputs[irrep], n_species, channels))
                for irrep, channels in outputs.items()
                if irrep in inputs
            }
        )

    def forward(self, x: Features, species: Tensor) -> Features:
        """Map features by ``species`` (n,), the index of each atom's element."""
        result = {}
        for irrep, y in x.items():
            if str(irrep) in self.weights:
                weight = self.weights[str(irrep)]
                fan = weight.shape[0] * self.n_species
                result[irrep] = _by_species(y, weight, species) / math.sqrt(fan)
        return result


def _by_species(x: Tensor, weight: Tensor, species: Tensor) -> Tensor:
    """Multiply each row of x (n, m, C_in) by the matrix of its species, (C_in, n_species, C_out).

    On a CPU it is one product for each element that there is. A trace and a GPU, which should not
    wait for the host, take a matrix for each atom, which costs memory.
    """
    if not known_to_the_host(species):
        return torch.bmm(x, weight.index_select(1, species).transpose(0, 1))
    order = species.argsort()
    counts = torch.bincount(species, minlength=weight.shape[1]).tolist()
    groups = zip(x.index_select(0, order).split(counts), weight.unbind(1), strict=True)
    products = [own @ matrix for own, matrix in groups if len(own)]
    return torch.cat(products).index_select(0, order.argsort()) if products else x @ weight[:, 0]


class IrrepsGate(nn.Module):
    """Activations on scalars, and gates, one for each channel, on all else.

    Args:
        outputs: Irreps after the gate.
        scalars: Activations of even and of odd scalars.
        gates: Activations of even and of odd gates.
    """

    def __init__(self, outputs: Irreps, *, scalars: Sequence[str], gates: Sequence[str]) -> None:
        super().__init__()
        self.outputs = outputs
        self.scalars, self.gates = tuple(scalars), tuple(gates)
        self.gated = {irrep: n for irrep, n in outputs.items() if irrep.l > 0}
        self.gate = SCALAR if SCALAR in outputs else Irrep(0, -1)
        self.inputs = dict(outputs)
        if self.gated:  # their scalars come after the others of the same parity
            self.inputs[self.gate] = outputs.get(self.gate, 0) + sum(self.gated.values())
            self.inputs = sorted_irreps(self.inputs)

    def forward(self, x: Features) -> Features:
        """Apply the gate to features with the irreps of ``inputs``."""
        own = self.outputs.get(self.gate, 0)
        gates = dict.fromkeys(self.gated, x[self.gate])
        if self.gated:
            values = activation(self.gates[self.gate.p < 0], x[self.gate][..., own:])
            gates = dict(
                zip(self.gated, values.split(list(self.gated.values()), dim=-1), strict=True)
            )
        result = {}
        for irrep, channels in self.outputs.items():
            if irrep.l == 0:
                result[irrep] = activation(self.scalars[irrep.p < 0], x[irrep][..., :channels])
            else:
                result[irrep] = x[irrep] * gates[irrep]
        return result


class NormalisedMLP(nn.Module):
    """Linear layers without biases, x W / √fan, with one activation between them.

    Args:
        channels: Width of input, hidden layers and output.
        activation: Name of the activation, of unit second moment.
        zero_output: Start the last layer at zero.
    """

    def __init__(
        self, channels: Sequence[int], activation: str, *, zero_output: bool = False
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(n_in, n_out)) for n_in, n_out in pairwise(channels)
        )
        if zero_output:
            nn.init.zeros_(self.weights[-1])

    def hidden(self, x: Tensor) -> Tensor:
        """Return what the last layer is given."""
        for weight in list(self.weights)[:-1]:
            x = activation(self.activation, x @ (weight / math.sqrt(weight.shape[0])))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (*, channels)."""
        weight = self.weights[-1]
        return self.hidden(x) @ (weight / math.sqrt(weight.shape[0]))
