"""Tensor field network layers and the attention of the SE(3)-Transformer, on features by degree.

Thomas et al., arXiv:1802.08219; Fuchs et al., arXiv:2006.10503. Features are a dictionary, degree l
-> (n, 2l + 1, channels), without parity. The kernel between two degrees is a sum over the harmonics
of the edge, J = |l_in - l_out| ... l_in + l_out, each with a matrix of the channels that is a
function of the edge's length and scalars. With ``chiral=False`` only paths of even l_in + l_out + J
stay: then degree l has parity (-1)^l and the layer is exact in mirrors too.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.nn.attention import smooth_softmax
from atomeq.ops.coupling.operations import tensor_product
from atomeq.ops.paths import Path
from atomeq.ops.segment.operations import segment_mean, segment_softmax, segment_sum
from atomeq.typing import EdgeIndex

Degrees = dict[int, int]  # degree -> channels
DegreeFeatures = dict[int, Tensor]  # degree -> (n, 2l + 1, channels)
SelfInteraction = Literal["1x1", "att"]
_RADIAL_CHANNELS = 32
_SMALLEST = 1e-12  # norms and inner products are not less, as published


class EdgeData:
    """What layers are told of edges.

    Attributes:
        index: Row 0 is the source, row 1 the target.
        scalars: Given ones and the length or functions of it, (n_edges, n_scalars).
        harmonics: ``integral`` normalised, (n_edges, n_sph).
        vectors: From the source to the target, (n_edges, 3).
        envelope: (n_edges,); None where edges are given from outside and stay.
    """

    def __init__(
        self,
        index: EdgeIndex,
        scalars: Tensor,
        harmonics: Tensor,
        vectors: Tensor,
        envelope: Tensor | None = None,
    ) -> None:
        self.index, self.scalars, self.harmonics = index, scalars, harmonics
        self.vectors, self.envelope = vectors, envelope


class PairKernel(nn.Module):
    """Messages of all edges: the kernels of all pairs of degrees applied to the sources' features.

    Args:
        inputs: Degrees and channels in.
        outputs: Degrees and channels out.
        n_scalars: Scalars of an edge.
        chiral: Keep the paths of odd l_in + l_out + J, as published.
        smooth: SiLU in the radial networks in place of ReLU.
    """

    def __init__(
        self, inputs: Degrees, outputs: Degrees, n_scalars: int, *, chiral: bool, smooth: bool
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.paths: dict[tuple[int, int], list[Path]] = {}
        self.radial = nn.ModuleDict()
        for l_out, n_out in outputs.items():
            for l_in, n_in in inputs.items():
                some = range(abs(l_in - l_out), l_in + l_out + 1)
                kept = [J for J in some if chiral or (l_in + l_out + J) % 2 == 0]
                self.paths[l_in, l_out] = [Path(l_in, J, l_out) for J in kept]
                n_weights = n_out * n_in * len(kept)
                self.radial[f"{l_in}_{l_out}"] = radial_network(n_scalars, n_weights, smooth)

    def forward(self, x: DegreeFeatures, edges: EdgeData) -> DegreeFeatures:
        """Return the messages by degree, of features of the sources (n_edges, 2l + 1, C)."""
        found: DegreeFeatures = {}
        for l_in, n_in in self.inputs.items():
            paths = [path for l_out in self.outputs for path in self.paths[l_in, l_out]]
            rows = nn.functional.pad(x[l_in], (0, 0, l_in * l_in, 0))
            n_sph = (max(path.l2 for path in paths) + 1) ** 2
            coupled = tensor_product(
                rows, edges.harmonics[:, :n_sph].contiguous(), None, paths, output="paths"
            )
            sizes = [len(self.paths[l_in, l]) * (2 * l + 1) for l in self.outputs]
            parts = coupled.split(sizes, dim=1)
            for (l_out, n_out), part in zip(self.outputs.items(), parts, strict=True):
                weights = self.radial[f"{l_in}_{l_out}"](edges.scalars)
                n_paths = len(self.paths[l_in, l_out])
                weights = weights.view(weights.shape[0], n_out, n_in, n_paths)
                part = part.unflatten(1, (n_paths, 2 * l_out + 1)) / math.sqrt(2 * l_out + 1)
                message = torch.einsum("ejmi,eoij->emo", part, weights)
                found[l_out] = found[l_out] + message if l_out in found else message
        return found


def radial_network(n_in: int, n_out: int, smooth: bool) -> nn.Sequential:
    """Return the network of a pair of degrees."""
    layers: list[nn.Module] = []
    for width in (n_in, _RADIAL_CHANNELS):
        activation = nn.SiLU() if smooth else nn.ReLU()
        layers += [nn.Linear(width, _RADIAL_CHANNELS), nn.LayerNorm(_RADIAL_CHANNELS), activation]
    return nn.Sequential(*layers, nn.Linear(_RADIAL_CHANNELS, n_out))


class DegreeLinear(nn.Module):
    """Mix the channels of each degree, without biases; degrees that are not in ``inputs`` get none.

    Args:
        inputs: Degrees and channels in.
        outputs: Degrees and channels out.
    """

    def __init__(self, inputs: Degrees, outputs: Degrees) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                str(l): nn.Parameter(torch.randn(inputs[l], n) / math.sqrt(inputs[l]))
                for l, n in outputs.items()
                if l in inputs
            }
        )

    def forward(self, x: DegreeFeatures) -> DegreeFeatures:
        """Map features."""
        return {int(l): x[int(l)] @ weight for l, weight in self.weights.items()}


class DegreeAttention(nn.Module):
    """Mix the channels of each degree by shares that their inner products give.

    Args:
        inputs: Degrees and channels in.
        outputs: Degrees and channels out.
    """

    def __init__(self, inputs: Degrees, outputs: Degrees) -> None:
        super().__init__()
        self.outputs = outputs
        self.networks = nn.ModuleDict(
            {
                str(l): nn.Sequential(
                    nn.LayerNorm(inputs[l] ** 2),
                    nn.LeakyReLU(),
                    nn.Linear(inputs[l] ** 2, inputs[l] * n),
                )
                for l, n in outputs.items()
            }
        )

    def forward(self, x: DegreeFeatures) -> DegreeFeatures:
        """Map features."""
        found = {}
        for l, n_out in self.outputs.items():
            products = (x[l].mT @ x[l]).flatten(1)
            sign = torch.where(products < 0, -1.0, 1.0).to(products)
            products = sign * products.abs().clamp(min=_SMALLEST)
            shares = (
                self.networks[str(l)](products).view(products.shape[0], n_out, -1).softmax(dim=2)
            )
            found[l] = x[l] @ shares.mT
        return found


class TensorFieldLayer(nn.Module):
    """A convolution: the mean of messages, and a self-interaction of the atom's own features.

    Args:
        inputs: Degrees and channels in.
        outputs: Degrees and channels out.
        n_scalars: Scalars of an edge.
        flavor: ``skip`` adds a map of the atom's own features, ``TFN`` maps the messages.
        chiral: See :class:`PairKernel`.
        smooth: See :class:`PairKernel`.
    """

    def __init__(
        self,
        inputs: Degrees,
        outputs: Degrees,
        n_scalars: int,
        *,
        flavor: Literal["skip", "TFN"] = "skip",
        chiral: bool = False,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        self.flavor = flavor
        self.kernel = PairKernel(inputs, outputs, n_scalars, chiral=chiral, smooth=smooth)
        self.own = DegreeLinear(inputs if flavor == "skip" else outputs, outputs)

    def forward(self, h: DegreeFeatures, edges: EdgeData) -> DegreeFeatures:
        """Convolve the features of the atoms."""
        source, target = edges.index
        n_atoms = next(iter(h.values())).shape[0]
        sources = {l: x.index_select(0, source) for l, x in h.items()}
        messages = self.kernel(sources, edges)
        messages = self.own(messages) if self.flavor == "TFN" else messages
        if edges.envelope is None:
            total = {l: segment_mean(x, target, n_atoms) for l, x in messages.items()}
        else:
            envelope = edges.envelope[:, None, None]
            total = {l: segment_sum(x * envelope, target, n_atoms) for l, x in messages.items()}
        own = self.own(h) if self.flavor == "skip" else {}
        return {l: x + own[l] if l in own else x for l, x in total.items()}


class SE3Attention(nn.Module):
    """Attention over neighbours by invariant logits, and its skip connection.

    Args:
        inputs: Degrees and channels in.
        outputs: Degrees and channels out.
        n_scalars: Scalars of an edge.
        div: Values and keys have 1/div of the channels out.
        num_heads: Heads; channels of all degrees are divided among them.
        self_interaction: How the attention and the atom's own features are joined.
        x_ij: Whether sources have the vector of the edge: ``cat`` as a channel more of degree 1,
            ``add`` added to the first if there are more than one, as published.
        chiral: See :class:`PairKernel`.
        smooth: See :class:`PairKernel`; the softmax then has an empty seat.
    """

    def __init__(
        self,
        inputs: Degrees,
        outputs: Degrees,
        n_scalars: int,
        *,
        div: int = 1,
        num_heads: int = 1,
        self_interaction: SelfInteraction = "1x1",
        x_ij: Literal["cat", "add"] | None = None,
        chiral: bool = False,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        values = {l: n // div for l, n in outputs.items()}
        keys = {l: n for l, n in values.items() if l in inputs}
        self.num_heads, self.x_ij = num_heads, x_ij
        uneven = [n for n in values.values() if n == 0 or n % num_heads]
        if uneven or not keys:
            raise ValueError(f"{num_heads} heads can not share {values} channels by degree")
        seen = dict(inputs)
        if x_ij == "cat":
            seen[1] = seen.get(1, 0) + 1
        self.adds = x_ij == "add" and inputs.get(1, 0) > 1
        options = {"chiral": chiral, "smooth": smooth}
        self.value = PairKernel(seen, values, n_scalars, **options)
        self.key = PairKernel(seen, keys, n_scalars, **options)
        self.query = DegreeLinear(inputs, keys)
        self.temperature = math.sqrt(sum(n * (2 * l + 1) for l, n in keys.items()))
        joined = {l: n + inputs.get(l, 0) for l, n in values.items()}
        mixer = DegreeAttention if self_interaction == "att" else DegreeLinear
        self.project = mixer(joined, outputs)

    def forward(self, h: DegreeFeatures, edges: EdgeData) -> DegreeFeatures:
        """Attend to the neighbours of the atoms."""
        source, target = edges.index
        n_atoms = next(iter(h.values())).shape[0]
        sources = {l: x.index_select(0, source) for l, x in h.items()}
        if self.x_ij == "cat":
            own = [sources[1]] if 1 in sources else []
            sources[1] = torch.cat([*own, edges.vectors[:, :, None]], dim=2)
        elif self.adds:
            first = sources[1][:, :, :1] + edges.vectors[:, :, None]
            sources[1] = torch.cat([first, sources[1][:, :, 1:]], dim=2)
        keys, queries = self.key(sources, edges), self.query(h)
        terms = [(keys[l] * q.index_select(0, target)).sum(dim=1) for l, q in queries.items()]
        by_head = [t.view(t.shape[0], self.num_heads, t.shape[1] // self.num_heads) for t in terms]
        logits = torch.cat(by_head, dim=2).sum(dim=2) / self.temperature
        if edges.envelope is None:
            weights = segment_softmax(logits, target, n_atoms)  # (n_edges, num_heads)
        else:
            weights = smooth_softmax(logits, edges.envelope, target, n_atoms)
        joined = {}
        for l, value in self.value(sources, edges).items():
            share = weights.repeat_interleave(value.shape[2] // self.num_heads, dim=1)
            total = segment_sum(value * share[:, None, :], target, n_atoms)
            joined[l] = torch.cat([total, h[l]], dim=2) if l in h else total
        return self.project(joined)


class NormNonlinearity(nn.Module):
    """Act on the norms of features and keep their directions.

    Args:
        degrees: Degrees and channels.
        normalize: Layer-normalise the norms, as in the published QM9 network; else they have
            biases.
        smooth: SiLU in place of ReLU, and a norm that is smooth where a feature vanishes.
    """

    def __init__(self, degrees: Degrees, *, normalize: bool = False, smooth: bool = False) -> None:
        super().__init__()
        self.smooth = smooth
        self.norms = nn.ModuleDict()
        self.biases = nn.ParameterDict()
        for l, n in degrees.items():
            if normalize:
                self.norms[str(l)] = nn.LayerNorm(n)
            else:
                self.biases[str(l)] = nn.Parameter(torch.zeros(n) if smooth else torch.randn(n))

    def forward(self, x: DegreeFeatures) -> DegreeFeatures:
        """Map features."""
        found = {}
        for l, y in x.items():
            squares = y.square().sum(dim=1, keepdim=True)
            if self.smooth:
                norms = (squares + 1.0).sqrt()
            else:  # the gradient of a root at 0 is none
                norms = squares.clamp(min=_SMALLEST**2).sqrt()
            if str(l) in self.norms:
                sizes = self.norms[str(l)](norms)
            else:
                sizes = norms + self.biases[str(l)]
            sizes = nn.functional.silu(sizes) if self.smooth else sizes.relu()
            found[l] = y * (sizes / norms)
        return found
