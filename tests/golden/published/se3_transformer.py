"""The SE(3)-Transformer's QM9 network as published, and the names of the reference's weights."""

import re

import torch
from torch import Tensor, nn

from atomeq.models.se3_transformer import Trunk, edges_of, equal_channels
from atomeq.nn.tensor_field import TensorFieldLayer
from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.typing import EdgeIndex, Positions


class MoleculeSE3Transformer(nn.Module):
    """One number of a molecule: attention, a convolution to scalars, the largest of all atoms.

    Args:
        n_inputs: Features of an atom.
        n_edge_features: Scalars of an edge.
        lmax: Highest degree.
        channels: Channels of each degree.
        num_layers: Attentions.
        div: Values and keys have 1/div of the channels.
        num_heads: Heads.
    """

    def __init__(
        self,
        n_inputs: int,
        n_edge_features: int,
        *,
        lmax: int,
        channels: int,
        num_layers: int,
        div: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.lmax = lmax
        self.trunk = Trunk(
            {0: n_inputs},
            lmax,
            channels,
            n_edge_features + 1,
            num_layers=num_layers,
            div=div,
            num_heads=num_heads,
            chiral=True,
            normalize=True,
        )
        width = (lmax + 1) * channels
        self.last = TensorFieldLayer(
            equal_channels(lmax, channels), {0: width}, n_edge_features + 1, chiral=True
        )
        self.readout = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(
        self, features: Tensor, pos: Positions, edge_index: EdgeIndex, edge_features: Tensor
    ) -> Tensor:
        """Return the number of one molecule, (1, 1)."""
        edges = edges_of(pos, edge_index, edge_features, self.lmax)
        h = self.last(self.trunk({0: features[:, None, :]}, edges), edges)
        return self.readout(h[0][:, 0].amax(dim=0, keepdim=True))


def our_name(name: str, last: int | None) -> str:
    """Return our name of a weight of the reference.

    Args:
        name: Of the reference.
        last: Number of the block that is the last layer; None for names of the iterative form.
    """
    inside = _inside(name)
    if found := re.match(r"Gblock\.(\d+)\.", name):
        number = int(found[1])
        if number == last:
            return f"last.{inside}"
        kind = "nonlinearities" if number % 2 else "attentions"
        return f"trunk.{kind}.{number // 2}.{inside}"
    if found := re.match(r"blocks\.(\d+)\.(\d+)\.", name):
        block, number = int(found[1]), int(found[2])
        if number == last and block > 0:
            return f"last.{inside}"
        kind = "nonlinearities" if number % 2 else "attentions"
        return f"blocks.{block}.{kind}.{number // 2}.{inside}"
    return name.replace("FCblock", "readout")


def _inside(name: str) -> str:
    if found := re.search(r"(GMAB\.[vk]\.)?kernel_unary\.\((\d),(\d)\)\.rp\.net\.(.*)$", name):
        part = {"GMAB.v.": "value", "GMAB.k.": "key", None: "kernel"}[found[1]]
        return f"{part}.radial.{found[2]}_{found[3]}.{found[4].replace('bn.', '')}"
    for pattern, ours in (
        (r"GMAB\.q\.transform\.(\d)$", "query.weights.{}"),
        (r"project\.transform\.(\d)$", "project.weights.{}"),
        (r"project\.transform\.(\d\..*)$", "project.networks.{}"),
        (r"transform\.(\d)\.0\.bn\.(.*)$", "norms.{}.{}"),
        (r"bias\.(\d)$", "biases.{}"),
        (r"kernel_self\.(\d)$", "own.weights.{}"),
    ):
        if found := re.search(pattern, name):
            return ours.format(*found.groups())
    return name


def in_our_layout(name: str, weight: Tensor, couplings: dict[str, Tensor]) -> Tensor:
    """Return a weight, or the gradient by one, with our axes and the signs of our couplings.

    Args:
        name: Of the reference.
        weight: Of the reference.
        couplings: Its ``Q.Jj.inl.outk``, whose signs come from LAPACK.
    """
    if re.search(r"(q|project)\.transform\.\d$", name):
        return weight.T
    if "kernel_self" in name:
        return weight[0].T
    if re.search(r"bias\.\d$", name) and "kernel" not in name:
        return weight.flatten()
    found = re.search(r"\((\d),(\d)\)\.rp\.net\.6\.(weight|bias)$", name)
    if found is None:
        return weight
    l_in, l_out = int(found[1]), int(found[2])
    signs = [
        _sign(couplings[f"Q.J{J}.in{l_in}.out{l_out}"], l_in, J, l_out)
        for J in range(abs(l_in - l_out), l_in + l_out + 1)
    ]
    factors = torch.tensor(signs, dtype=weight.dtype).repeat(len(weight) // len(signs))
    return weight * factors.view(-1, *[1] * (weight.ndim - 1))


def _sign(coupling: Tensor, l_in: int, J: int, l_out: int) -> float:
    """Return the sign of Q_J against ours, times that of the harmonics, (-1)^J."""
    overlap = float((coupling.permute(1, 2, 0) * clebsch_gordan(l_in, J, l_out)).sum())
    assert abs(abs(overlap) - 1) < 1e-12
    return (-1) ** J * (1.0 if overlap > 0 else -1.0)
