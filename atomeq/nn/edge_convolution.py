"""Messages of eSCN and eSEN: SO(2) maps in the frame of each edge, summed on its target.

The whole edge layer as one operation has no biases. That of the first map is the weight of one more
channel, 1 in l = 0 and 0 elsewhere, and what that of the second adds to an atom is one sum over its
edges for all channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from atomeq.nn.activations import ActivationName, activation_of
from atomeq.nn.pair_mlp import Pairs, RadialMLP
from atomeq.nn.so3 import Gate, SO2Convolution
from atomeq.nn.sphere import GridResolution
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.operations import escn_conv, rotate_from_edge, rotate_to_edge
from atomeq.typing import NodeFeatures


class EdgeConvolution(nn.Module):
    """The eSCN convolution: rotate to the edge, SO(2) map, gate, SO(2) map, rotate back, sum.

    Args:
        lmax: Highest degree of the features.
        mmax: Highest order in the edge frame.
        channels: Channels in and out.
        hidden_channels: Channels between the two maps.
        edge_channels: Width of the radial network.
        n_edge_scalars: Numbers of an edge that it is given.
        activation: Of messages (:func:`~atomeq.nn.activations.activation_of`).
        chiral: See :class:`~atomeq.nn.so3.SO2Convolution`.
        bias: Likewise.
        grid_resolution: Of the grid (:class:`~atomeq.nn.sphere.SphereBlock`).
    """

    def __init__(
        self,
        lmax: int,
        mmax: int,
        channels: int,
        hidden_channels: int,
        edge_channels: int,
        n_edge_scalars: int,
        *,
        activation: ActivationName = "gate",
        chiral: bool = False,
        bias: bool = False,
        grid_resolution: GridResolution = None,
    ) -> None:
        super().__init__()
        between = activation_of(
            *(activation, lmax, mmax, hidden_channels),
            order="m",
            normalization="integral",
            grid_resolution=grid_resolution,
        )
        self.first = SO2Convolution(
            lmax,
            mmax,
            2 * channels,
            between.in_channels,
            extra_scalars=between.n_scalars,
            chiral=chiral,
            bias=bias,
        )
        self.radial = RadialMLP(
            (n_edge_scalars, edge_channels, edge_channels, self.first.n_radial_weights),
            layer_norm=True,
        )
        self.second = SO2Convolution(
            lmax, mmax, hidden_channels, channels, chiral=chiral, bias=bias
        )
        # a gate is part of one operation for it all
        self.activation = None if isinstance(between, Gate) else between

    def forward(
        self, x: NodeFeatures, frame: EdgeFrame, edge_scalars: Pairs, envelope: Tensor | None
    ) -> NodeFeatures:
        """Return the sum of messages on each atom, (n_atoms, n_sph, channels)."""
        if self.activation is None:
            weights, radial_map = list(self.first.weights), self.radial.last_linear
            if self.first.bias is not None:
                x = with_constant(x)
                weights = with_bias(weights, self.first.bias, frame.lmax)
                radial_map = with_unscaled_constant(radial_map, self.first.in_channels)
            total = escn_conv(
                x,
                frame,
                weights,
                list(self.second.weights),
                radial=self.radial.hidden(edge_scalars),
                radial_map=radial_map,
                envelope=envelope,
            )
            bias = self.second.bias
            return total if bias is None else total + sum_of_biases(bias, frame, envelope)
        rows = rotate_to_edge(x, frame, side="both")  # (n_edges, n_rows, 2 channels)
        rows, scalars = self.first(rows, self.radial(edge_scalars))  # (n_edges, n_rows, hidden)
        rows, _ = self.second(self.activation(rows, scalars))
        return rotate_from_edge(rows, frame, envelope=envelope)


def with_constant(x: NodeFeatures) -> NodeFeatures:
    """Return ``x`` (n_atoms, n_sph, channels) and behind it the channel of the constant."""
    one = x.new_ones(len(x), 1, 1)
    return torch.cat((x, pad(one, (0, 0, 0, x.shape[1] - 1))), dim=2)


def with_bias(weights: list[Tensor], bias: Tensor, lmax: int) -> list[Tensor]:
    """Return weights of a map that has the constant of the source as its bias.

    Args:
        weights: One for each order, (n_out, n_in) or (2, n_out, n_in), of the features of both
            atoms of an edge, source first.
        bias: Of m = 0, (n_out,).
        lmax: Highest degree.
    """
    wider = []
    for m, weight in enumerate(weights):
        degrees = lmax + 1 - m
        weight = weight.unflatten(-1, (degrees, 2, -1))
        if m == 0:
            column = pad(bias[:, None, None, None], (0, 0, 0, 1, 0, degrees - 1))
            weight = torch.cat((weight, column), dim=-1)
        else:
            weight = pad(weight, (0, 1))
        wider.append(weight.flatten(-3))
    return wider


def with_unscaled_constant(
    radial_map: tuple[Tensor, Tensor | None], in_channels: int
) -> tuple[Tensor, Tensor]:
    """Return the linear layer of radial factors, that of the constant being 1.

    Args:
        radial_map: Weight (n_scales, k) and bias (n_scales,).
        in_channels: Channels of both atoms.
    """
    weight, bias = radial_map
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    weight = pad(weight.unflatten(0, (-1, 2, in_channels // 2)), (0, 0, 0, 1))
    bias = pad(bias.view(-1, 2, in_channels // 2), (0, 1))
    one = pad(bias.new_ones(1), (bias.shape[2] - 1, bias.numel() - bias.shape[2]))
    return weight.flatten(0, 2), bias.flatten() + one


def sum_of_biases(bias: Tensor, frame: EdgeFrame, envelope: Tensor | None) -> NodeFeatures:
    """Return what a bias on m = 0 of every message adds to the atoms, (n_atoms, n_sph, channels).

    Args:
        bias: ((lmax + 1) * channels,).
        frame: Of the edges.
        envelope: Of the messages, (n_edges,).
    """
    n_edges, n_rows, _ = frame.wigner.shape
    lmax = frame.lmax
    ones = pad(frame.wigner.new_ones(n_edges, lmax + 1, 1), (0, 0, 0, n_rows - lmax - 1))
    along = rotate_from_edge(ones, frame, envelope=envelope)  # (n_atoms, n_sph, 1)
    of_degrees = enumerate(bias.view(lmax + 1, -1))
    return along * torch.cat([own.expand(2 * l + 1, -1) for l, own in of_degrees])
