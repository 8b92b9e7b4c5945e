"""Equivariant layers: linear maps per degree, SO(2) convolutions in the edge frame, gates."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atomeq.ops.atoms.operations import Linear, so3_linear
from atomeq.ops.edge.operations import so2_linear_with_scalars


class SO3Linear(nn.Module):
    """A linear map of channels, one matrix per degree l, with a bias on l = 0.

    Args:
        lmax: Highest degree of the features.
        in_channels: Channels in.
        out_channels: Channels out.
    """

    def __init__(self, lmax: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lmax = lmax
        self.weight = nn.Parameter(
            torch.randn(lmax + 1, out_channels, in_channels) / math.sqrt(in_channels)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (n_atoms, n_sph, in_channels) to (n_atoms, n_sph, out_channels)."""
        return so3_linear(x, self.weight, self.bias)

    @property
    def parts(self) -> Linear:
        """Weight and bias, as operations take them."""
        return self.weight, self.bias


class SO2Convolution(nn.Module):
    """The linear map of eSCN in the edge frame: one matrix for each order m.

    Rotations about the edge leave m = 0 alone and turn (+m, -m) as a pair, so the general map that
    commutes with them is a real matrix for m = 0 and a complex one for each m > 0 (Passaro &
    Zitnick 2023, arXiv:2302.03655). Reflections through the edge turn the sign of -m alone; what
    commutes with them too is a real matrix for every m, our default. Rows are in m-primary order.

    Args:
        lmax: Highest degree of the features.
        mmax: Highest order kept in the edge frame.
        in_channels: Channels in.
        out_channels: Channels out.
        extra_scalars: Further invariant outputs, read from m = 0 (gates, attention logits).
        chiral: Let +m and -m mix, as published. The map then commutes with rotations alone, and a
            molecule and its mirror image get different energies.
        bias: Add a bias to the outputs with m = 0, extra scalars included.
    """

    def __init__(
        self,
        lmax: int,
        mmax: int,
        in_channels: int,
        out_channels: int,
        *,
        extra_scalars: int = 0,
        chiral: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.lmax = lmax
        self.mmax = mmax
        self.in_channels = in_channels
        self.extra_scalars = extra_scalars
        weights = []
        for m in range(mmax + 1):
            n_in, n_out = (lmax + 1 - m) * in_channels, (lmax + 1 - m) * out_channels
            if m == 0:
                shape, fan_in = (extra_scalars + n_out, n_in), n_in
            elif chiral:
                shape, fan_in = (2, n_out, n_in), 2 * n_in  # both parts feed each row
            else:
                shape, fan_in = (n_out, n_in), n_in
            weights.append(nn.Parameter(torch.randn(shape) / math.sqrt(fan_in)))
        self.weights = nn.ParameterList(weights)
        self.bias = nn.Parameter(torch.zeros(len(weights[0]))) if bias else None

    @property
    def n_radial_weights(self) -> int:
        """Numbers that scale one edge's input: one for each (l, |m|, channel)."""
        pairs = sum(self.lmax + 1 - m for m in range(self.mmax + 1))
        return pairs * self.in_channels

    def forward(self, x: Tensor, radial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map features in the edge frame.

        Args:
            x: (n_edges, n_rows, in_channels), m-primary rows.
            radial: Multiplies the input, (n_edges, n_radial_weights): m-primary, +m and -m share.

        Returns:
            Features (n_edges, n_rows, out_channels), and the extra scalars
            (n_edges, extra_scalars).
        """
        return so2_linear_with_scalars(
            x,
            list(self.weights),
            lmax=self.lmax,
            mmax=self.mmax,
            bias=self.bias,
            scale=radial,
            n_scalars=self.extra_scalars,
        )


class Gate(nn.Module):
    """SiLU on scalars, and sigmoid gates of invariants on everything of degree l > 0.

    Args:
        rows: The number l*l + l + m of each row of the features; that of l = 0 comes first.
        channels: Channels of the features.

    Attributes:
        in_channels: Channels of what it is given.
        n_scalars: Numbers of gates.
    """

    gate_of_row: Tensor

    def __init__(self, rows: Sequence[int], channels: int) -> None:
        super().__init__()
        degrees = [math.isqrt(row) for row in rows]
        gate_of_row = torch.tensor(degrees[1:], dtype=torch.int64) - 1
        self.register_buffer("gate_of_row", gate_of_row, persistent=False)
        self.lmax = max(degrees)
        self.in_channels = channels
        self.n_scalars = self.lmax * channels

    def forward(self, x: Tensor, gates: Tensor | None) -> Tensor:
        """Apply the gates.

        Args:
            x: (n, n_rows, channels).
            gates: (n, lmax · channels), before the sigmoid; None where there is no l > 0.

        Returns:
            (n, n_rows, channels).
        """
        scalars, higher = x.split([1, x.shape[1] - 1], dim=1)
        scalars = nn.functional.silu(scalars)
        if gates is None or not self.lmax:
            return scalars
        gates = torch.sigmoid(gates).view(x.shape[0], self.lmax, x.shape[2])
        return torch.cat([scalars, higher * gates.index_select(1, self.gate_of_row)], dim=1)
