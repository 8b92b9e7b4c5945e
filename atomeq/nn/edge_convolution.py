"""Messages of eSCN and eSEN: SO(2) maps in the frame of each edge, summed on its target."""

from torch import Tensor, nn

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
            return escn_conv(
                x,
                frame,
                list(self.first.weights),
                list(self.second.weights),
                radial=self.radial.hidden(edge_scalars),
                radial_map=self.radial.last_linear,
                envelope=envelope,
                biases=(self.first.bias, self.second.bias),
            )
        rows = rotate_to_edge(x, frame, side="both")  # (n_edges, n_rows, 2 channels)
        rows, scalars = self.first(rows, self.radial(edge_scalars))  # (n_edges, n_rows, hidden)
        rows, _ = self.second(self.activation(rows, scalars))
        return rotate_from_edge(rows, frame, envelope=envelope)
