"""Published potentials of MACE (.model) become ordinary potentials of the model MACE.

Weights keep their float32 values, those of the over-complete couplings of the products included:
the independent ones are worked out as the model runs. Files whose couplings are other ones get
weights of the independent couplings here, which rounds them once.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomeq.models.mace import MACE, Interaction, MACELayer
from atomeq.nn.irreps import SCALAR, Irreps, linear_blocks
from atomeq.nn.symmetric_product import SymmetricProduct
from atomeq.ops.coupling.symmetric_contraction_basis import (
    published_columns,
    symmetric_basis,
    symmetrised,
)
from atomeq.potential.heads import HeadedPotential
from atomeq.potential.inert_modules import read_module
from atomeq.potential.official_names import OfficialError
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.repulsion import ZBL

_SAME_COUPLINGS = 1e-5  # float32 couplings of norm up to 18 against ours

# What published files name, and so may stand in one: see inert_modules.py, none of it is made.
_ALLOWED = """\
__builtin__: set
builtins: set
_codecs: encode
collections: OrderedDict
e3nn.math._normalize_activation: normalize2mom
e3nn.nn._activation: Activation
e3nn.nn._extract: Extract
e3nn.nn._fc: FullyConnectedNet _Layer
e3nn.nn._gate: Gate _Sortcut
e3nn.o3._irreps: Irrep Irreps _MulIr
e3nn.o3._linear: Instruction Linear
e3nn.o3._spherical_harmonics: SphericalHarmonics
e3nn.o3._tensor_product._instruction: Instruction
e3nn.o3._tensor_product._sub: ElementwiseTensorProduct FullyConnectedTensorProduct
e3nn.o3._tensor_product._tensor_product: TensorProduct
mace.modules.blocks: AtomicEnergiesBlock EquivariantProductBasisBlock LinearNodeEmbeddingBlock \
LinearReadoutBlock NonLinearBiasReadoutBlock NonLinearReadoutBlock RadialEmbeddingBlock \
RealAgnosticDensityInteractionBlock RealAgnosticDensityResidualInteractionBlock \
RealAgnosticInteractionBlock RealAgnosticResidualInteractionBlock \
RealAgnosticResidualNonLinearInteractionBlock ScaleShiftBlock
mace.modules.gate: GatedEquivariantBlock
mace.modules.irreps_tools: mask_head reshape_irreps
mace.modules.models: MACE ScaleShiftMACE
mace.modules.radial: AgnesiTransform BesselBasis PolynomialCutoff RadialMLP SoftTransform ZBLBasis
mace.modules.symmetric_contraction: Contraction SymmetricContraction
torch: BoolStorage DoubleStorage FloatStorage IntStorage LongStorage
torch._utils: _rebuild_parameter _rebuild_tensor_v2
torch.fx._symbolic_trace: Tracer
torch.fx.graph_module: reduce_graph_module
torch.nn.functional: sigmoid silu
torch.nn.modules.activation: SiLU
torch.nn.modules.container: ModuleList ParameterList Sequential
torch.nn.modules.linear: Linear
torch.nn.modules.normalization: LayerNorm
"""
ALLOWED = frozenset(
    f"{module} {name}"
    for module, _, names in (line.partition(":") for line in _ALLOWED.splitlines())
    for name in names.split()
)

_INTERACTIONS = {  # class -> interaction, density
    "RealAgnosticInteractionBlock": ("agnostic", False),
    "RealAgnosticResidualInteractionBlock": ("residual", False),
    "RealAgnosticDensityInteractionBlock": ("agnostic", True),
    "RealAgnosticDensityResidualInteractionBlock": ("residual", True),
    "RealAgnosticResidualNonLinearInteractionBlock": ("nonlinear", True),
}
_TRANSFORMS = {"None": None, "Agnesi": "agnesi", "Soft": "soft"}


def is_module_file(path: Path) -> bool:
    """Say whether a file's name is that of a pickled module of MACE."""
    return path.suffix == ".model"


def read_mace(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a .model file without running anything in it.

    Returns:
        What its classes and attributes say, as the options of :func:`mace_potential`, and the
        state dict.

    Raises:
        OfficialError: It names something that is not known, or is no MACE.
    """
    module = read_module(path, ALLOWED)
    if module.name not in ("MACE", "ScaleShiftMACE"):
        raise OfficialError(f"{path} holds a {module.name}; MACE and ScaleShiftMACE are known here")
    parts = module.modules()
    blocks = list(parts["interactions"].modules().values())
    embedding = parts["radial_embedding"]
    transform = embedding.modules().get("distance_transform")
    options = {
        "interactions": [block.name for block in blocks],
        "avg_num_neighbors": [float(block.state.get("avg_num_neighbors", 1.0)) for block in blocks],
        "heads": [str(head) for head in module.state.get("heads") or ["Default"]],
        "apply_cutoff": bool(embedding.state.get("apply_cutoff", True)),
        "distance_transform": transform.name.removesuffix("Transform") if transform else "None",
    }
    basis = embedding.modules()["bessel_fn"].name
    if basis != "BesselBasis":
        raise OfficialError(f"the radial basis is {basis}; BesselBasis is known here")
    return options, dict(module.tensors())


def mace_potential(
    options: Mapping[str, Any], state: Mapping[str, Tensor], *, head: str | None = None
) -> Potential:
    """Build the potential of a state dict, in its dtype and with all numbers as they are there.

    Args:
        options: What a state dict does not say: ``interactions``, the classes of the layers,
            ``avg_num_neighbors``, one number or one for each, and where they are not the usual ones
            ``heads``, ``apply_cutoff`` and ``distance_transform``.
        state: Parameters and buffers.
        head: Which head of several, by its name.

    Raises:
        OfficialError: Something is not known or does not fit, or the head is missing.
    """
    heads = list(options.get("heads") or ["Default"])
    number = _head(heads, head)
    weights = _Weights(state, number, len(heads))
    try:
        model = MACE(**_arguments(options, weights, len(heads)))
        model = model.to(weights.take("node_embedding.linear.weight").dtype)
        model.load_state_dict(dict(weights.ours(model)))
    except (KeyError, RuntimeError, ValueError) as error:
        raise OfficialError(f"the weights do not fit the options: {error}") from error
    energies = weights.take("atomic_energies_fn.atomic_energies").double()
    energies = energies.reshape(-1, energies.shape[-1])
    energies = energies[number if len(energies) > 1 else 0]
    scale = weights.of_head("scale_shift.scale", 1.0)
    shift = weights.of_head("scale_shift.shift", 0.0)
    elements = weights.take("atomic_numbers").tolist()
    known = {int(z): e + shift for z, e in zip(elements, energies.tolist(), strict=True)}
    potential = Potential(model, AtomicReferences(known, scale=scale))
    return potential.requires_grad_(False).eval()


class _Weights:
    """A state dict of MACE, read in our order."""

    def __init__(self, state: Mapping[str, Tensor], head: int, n_heads: int) -> None:
        self.state = {name: tensor.detach() for name, tensor in state.items()}
        self.head, self.n_heads = head, n_heads
        self.n_layers = int(self.take("num_interactions")) if "num_interactions" in state else 0

    def take(self, name: str) -> Tensor:
        """Return a tensor of the file.

        Raises:
            OfficialError: It is not there.
        """
        if name not in self.state:
            raise OfficialError(f"the file has no weights {name!r}")
        return self.state[name]

    def of_head(self, name: str, default: float) -> float:
        """Return the head's own one of numbers that all heads share or have."""
        if name not in self.state:
            return default
        values = self.state[name].double().flatten()
        return float(values[self.head if len(values) > 1 else 0])

    def contraction(self, k: int, i: int) -> list[tuple[Tensor, Tensor | None]]:
        """Return weights and couplings of order 1, 2, … of a product, in the file's columns."""
        prefix = f"products.{k}.symmetric_contractions.contractions.{i}"
        names = [f"{prefix}.weights_max"]
        while f"{prefix}.weights.{len(names) - 1}" in self.state:
            names.append(f"{prefix}.weights.{len(names) - 1}")
        return [
            (self.take(name), self.state.get(f"{prefix}.U_matrix_{n}"))
            for n, name in enumerate(reversed(names), start=1)
        ]

    def n_degrees(self, k: int) -> int:
        """Return how many degrees the features after a layer have."""
        contractions = f"products.{k}.symmetric_contractions.contractions."
        return len({n.removeprefix(contractions).split(".")[0] for n in self.state
                    if n.startswith(contractions)})  # fmt: skip

    def ours(self, model: MACE) -> Iterator[tuple[str, Tensor]]:
        """Yield the state dict of our model."""
        scalars = {SCALAR: model.channels}
        species = {SCALAR: model.n_species}
        yield from self._linear("embedding", "node_embedding.linear", species, scalars)
        waves = self.take("radial_embedding.bessel_fn.bessel_weights").flatten()
        harmonics = torch.arange(1, len(waves) + 1) * (math.pi / model.cutoff)
        if not torch.allclose(waves.double(), harmonics.double(), rtol=1e-5):
            raise OfficialError(f"the wave numbers of the basis are {waves.tolist()}, not nπ/r_max")
        if model.radii is not None:
            names = [n for n in self.state if n.endswith("covalent_radii")]
            yield "radii", self.state[names[0]].flatten() if names else _covalent_radii()
        for k, layer in enumerate(model.layers):
            assert isinstance(layer, MACELayer)
            ours, theirs = f"layers.{k}.interaction", f"interactions.{k}"
            if isinstance(layer.interaction, Interaction):
                yield from self._interaction(ours, theirs, layer.interaction, model)
            else:
                yield from self._nonlinear(ours, theirs, layer.interaction, model)
            yield from self._product(k, layer.product)
        for k in range(len(model.energy)):
            yield from self._readout(k, model.channels)

    def _interaction(
        self, ours: str, theirs: str, block: Interaction, model: MACE
    ) -> Iterator[tuple[str, Tensor]]:
        inputs = dict.fromkeys(block.up.fans, model.channels)
        sent = block.up.outputs
        yield from self._linear(f"{ours}.up", f"{theirs}.linear_up", inputs, sent)
        yield from self._linear(f"{ours}.mix", f"{theirs}.linear", block.mix.fans, model.target)
        last = len(block.radial.weights) - 1
        for k in range(last + 1):
            weight = self.take(f"{theirs}.conv_tp_weights.layer{k}.weight")
            yield (
                f"{ours}.radial.weights.{k}",
                weight[:, _columns(block.paths, sent)] if k == last else weight,
            )
        if block.density is not None:
            yield f"{ours}.density.weights.0", self.take(f"{theirs}.density_fn.layer0.weight")
        flat, start = self.take(f"{theirs}.skip_tp.weight"), 0
        for irrep, weight in block.skip.weights.items():
            size = weight.numel()
            own = flat[start : start + size].reshape(weight.shape)
            yield f"{ours}.skip.weights.{irrep}", own
            start += size
        _all_read(theirs + ".skip_tp", flat, start)

    def _nonlinear(
        self, ours: str, theirs: str, block: Any, model: MACE
    ) -> Iterator[tuple[str, Tensor]]:
        species, scalars = {SCALAR: model.n_species}, {SCALAR: model.channels}
        gated = block.gate.inputs
        maps = {
            "source": ("source_embedding", species, scalars),
            "receiver": ("target_embedding", species, scalars),
            "up": ("linear_up", block.up.fans, block.up.outputs),
            "keep": ("linear_res", block.up.outputs, gated),
            "mix": ("linear_1", block.mix.fans, gated),
            "out": ("linear_2", block.gate.outputs, model.target),
            "skip": ("skip_tp", block.skip.fans, block.skip.outputs),
        }
        for own, (name, inputs, outputs) in maps.items():
            yield from self._linear(f"{ours}.{own}", f"{theirs}.{name}", inputs, outputs)
        for own, name in (("radial", "conv_tp_weights"), ("density", "density_fn")):
            blocks = getattr(block, own)
            for parameter in dict(blocks.named_parameters()):
                value = self.take(f"{theirs}.{name}.net.{parameter}")
                if own == "radial" and parameter.startswith(f"{len(blocks) - 1}."):
                    value = value[_columns(block.paths, block.up.outputs)]
                yield f"{ours}.{own}.{parameter}", value
        for name in ("alpha", "beta"):
            yield f"{ours}.{name}", self.take(f"{theirs}.{name}").reshape(())

    def _product(self, k: int, product: SymmetricProduct) -> Iterator[tuple[str, Tensor]]:
        outputs, blocks = product.linear.outputs, []
        for i, irrep in enumerate(outputs):
            for n, (weight, coupling) in enumerate(self.contraction(k, i), start=1):
                if not product.all_couplings:
                    assert coupling is not None
                    weight = _independent(weight, coupling, product.form.lmax, irrep.l, n)
                blocks.append(weight)
        yield f"layers.{k}.product.weights", torch.cat(blocks, dim=1)
        ours = f"layers.{k}.product.linear"
        yield from self._linear(ours, f"products.{k}.linear", outputs, outputs)

    def _readout(self, k: int, channels: int) -> Iterator[tuple[str, Tensor]]:
        theirs, ours, h = f"readouts.{k}", f"energy.{k}", self.n_heads
        if f"{theirs}.linear.weight" in self.state:
            columns = self.take(f"{theirs}.linear.weight").view(channels, h)
            yield f"{ours}.weights.0", columns[:, self.head : self.head + 1]
            return
        names = [n for n in ("linear_1", "linear_mid", "linear_2")
                 if f"{theirs}.{n}.weight" in self.state]  # fmt: skip
        for j, name in enumerate(names):
            weight = self.take(f"{theirs}.{name}.weight")
            if j == 0:
                own = weight.view(channels, h, -1)[:, self.head]
            elif name == "linear_mid":
                m = round((weight.numel()) ** 0.5) // h
                own = weight.view(h, m, h, m)[self.head, :, self.head]
            else:
                own = weight.view(h, -1, h)[self.head, :, self.head, None]
            yield f"{ours}.weights.{j}", own
            bias = self.state.get(f"{theirs}.{name}.bias")
            if j and bias is not None and bias.numel():
                yield f"{ours}.biases.{j - 1}", bias.view(h, -1)[self.head]

    def _linear(
        self, ours: str, theirs: str, inputs: Mapping[Any, int], outputs: Irreps
    ) -> Iterator[tuple[str, Tensor]]:
        """Cut a flat weight into blocks, in the order of the inputs."""
        flat = self.take(f"{theirs}.weight")
        blocks, start = linear_blocks(flat, dict(inputs), outputs)
        for irrep, block in blocks.items():
            yield f"{ours}.weights.{irrep}", block
        _all_read(theirs, flat, start)


def _all_read(name: str, flat: Tensor, read: int) -> None:
    if read != flat.numel():
        raise OfficialError(f"{name} has {flat.numel()} weights, expected {read}")


def _columns(paths: Mapping[Any, list[Any]], sent: Irreps) -> Tensor:
    """Return which of the file's columns, sorted by (l3, l1, l2), each of ours is."""
    ours = [path for some in paths.values() for path, _ in some]
    channels = next(iter(sent.values()))
    theirs = sorted(ours, key=lambda path: (path.l3, path.l1, path.l2))
    return torch.cat([torch.arange(channels) + theirs.index(path) * channels for path in ours])


def _independent(weight: Tensor, coupling: Tensor, lmax: int, l: int, order: int) -> Tensor:
    """Turn weights of a file's couplings into those of the independent ones."""
    if l == 0:
        coupling = coupling[None]
    basis = symmetric_basis(lmax, l, order).flatten(0, 1)
    theirs = symmetrised(coupling.double(), order).flatten(0, 1)
    reduction = torch.linalg.lstsq(basis, theirs).solution
    if float((basis @ reduction - theirs).abs().max()) > _SAME_COUPLINGS:
        raise OfficialError(f"couplings of degree {l} and order {order} are none of O(3)")
    return (reduction @ weight.double()).to(weight.dtype)


def _same_couplings(weights: _Weights, lmax: int) -> bool:
    """Say whether the file's couplings are those that :func:`published_columns` works out."""
    for k in range(weights.n_layers):
        for l in range(weights.n_degrees(k)):
            for n, (weight, coupling) in enumerate(weights.contraction(k, l), start=1):
                ours = published_columns(lmax, l, n)
                if weight.shape[1] != ours.shape[2]:
                    return False
                if coupling is not None:
                    theirs = symmetrised(coupling[None] if l == 0 else coupling, n).double()
                    if float((theirs - ours).abs().max()) > _SAME_COUPLINGS:
                        return False
    return True


def _arguments(options: Mapping[str, Any], weights: _Weights, n_heads: int) -> dict[str, Any]:
    """Return the constructor arguments that options and shapes of weights say."""
    kinds = [_interaction_kind(name) for name in options["interactions"]]
    n_layers = len(kinds)
    weights.n_layers = n_layers
    elements = [int(z) for z in weights.take("atomic_numbers").tolist()]
    channels = weights.take("node_embedding.linear.weight").numel() // len(elements)
    nonlinear = kinds[0][0] == "nonlinear"
    sent = weights.take("interactions.0.linear_up.weight").numel() // channels
    last = weights.take(f"interactions.0.linear{'_1' if nonlinear else ''}.weight")
    lmax = last.numel() // (sent * channels) - 1
    lmax = lmax // 2 if nonlinear else lmax  # gates of all degrees but 0 beside them
    name = "interactions.0.conv_tp_weights." + ("net.{}.weight" if nonlinear else "layer{}.weight")
    widths = []
    while (layer := name.format(len(widths) * (3 if nonlinear else 1))) in weights.state:
        widths.append(weights.take(layer).shape[0 if nonlinear else 1])
    n_degrees = weights.n_degrees(0) if n_layers > 1 else 1
    later = sent  # channels that layers after the first one send
    if n_layers > 1:
        up = weights.take("interactions.1.linear_up.weight")
        later = up.numel() // (channels * n_degrees)
    irreps = "+".join(f"{channels}x{l}{'eo'[l % 2]}" for l in range(n_degrees))
    edge_irreps = irreps.replace(f"{channels}x", f"{later}x") if later != channels else None
    orders = [len(weights.contraction(k, 0)) for k in range(n_layers)]
    read = sorted({int(n.split(".")[1]) for n in weights.state if n.startswith("readouts.")})
    final = f"readouts.{read[-1]}"
    hidden = [n for n in ("linear_1", "linear_mid") if f"{final}.{n}.weight" in weights.state]
    width = 16
    if hidden:
        width = weights.take(f"{final}.linear_1.weight").numel() // (channels * n_heads)
    agnostic = weights.contraction(0, 0)[0][0].shape[0] == 1 and len(elements) > 1
    form = {
        "interactions": [kind for kind, _ in kinds],
        "density": [density for _, density in kinds],
        "transform": _TRANSFORMS[options.get("distance_transform") or "None"],
        "repulsion": any(n.startswith("pair_repulsion_fn.") for n in weights.state),
        "envelope_on_weights": not options.get("apply_cutoff", True),
        "edge_irreps": edge_irreps,
        "edge_irreps_first": sent == later,
        "element_products": not agnostic,
        "all_couplings": _same_couplings(weights, lmax),
        "last_readout": len(read) == 1 and n_layers > 1,
        "readout_layers": len(hidden),
        "n_heads": n_heads,
    }
    return {
        "cutoff": float(weights.take("r_max")),
        "irreps": irreps,
        "num_layers": n_layers,
        "lmax_edge": lmax,
        "correlation": orders,
        "num_radial": weights.take("radial_embedding.bessel_fn.bessel_weights").numel(),
        "radial_channels": widths[:-1],
        "readout_channels": width,
        "envelope_exponent": int(weights.take("radial_embedding.cutoff_fn.p")),
        "avg_num_neighbors": _one(options["avg_num_neighbors"]),
        "elements": elements,
        "published": form,
    }


def _interaction_kind(name: str) -> tuple[str, bool]:
    if name not in _INTERACTIONS:
        known = ", ".join(_INTERACTIONS)
        raise OfficialError(f"interaction {name!r} is not known here; known are {known}")
    return _INTERACTIONS[name]


def _one(numbers: Any) -> float:
    found = {float(n) for n in (numbers if isinstance(numbers, list) else [numbers])}
    if len(found) != 1:
        raise OfficialError(f"layers divide by different numbers of neighbours, {sorted(found)}")
    return found.pop()


def _head(heads: list[str], head: str | None) -> int:
    if head is None and len(heads) == 1:
        return 0
    if head not in heads:
        what = "has to be chosen" if head is None else f"{head!r} does not exist"
        raise OfficialError(
            f"the head {what}: the file has {', '.join(heads)}; give one, as in --head {heads[-1]}"
        )
    return heads.index(head)


def _covalent_radii() -> Tensor:
    """Return the radii that files bring along, 0.2 Å where there are none."""
    radii = torch.full((119,), 0.2, dtype=torch.float64)
    own = ZBL().radii
    radii[1 : len(own)] = own[1:]
    return radii


def mace_card(name: str, origin: Mapping[str, Any], potential: Potential) -> str:
    """Return a README that says what the potential is, from what the file says."""
    model = potential.model
    assert isinstance(model, MACE)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    head = f", head {origin['head']}" if origin.get("head") else ""
    chosen = f"@{potential.names[0]}" if isinstance(potential, HeadedPotential) else ""
    repulsion = "ZBL, inside the model" if model.form.repulsion else "none"
    return f"""# {name}

Converted from the published MACE file `{origin["file"]}` (SHA-256
{origin["sha256"]}){head}.
Licence and citation are those of the file's authors; the network: I. Batatia, D. P. Kovács,
G. N. C. Simm, C. Ortner and G. Csányi, NeurIPS 2022, arXiv:2206.07697.

| | |
|---|---|
| model | MACE, {n_parameters:,} parameters |
| features | {model.irreps}, {len(model.layers)} layers, products of {model.correlation} factors |
| interactions | {", ".join(origin["interactions"])} |
| cutoff | {model.cutoff} Å |
| elements | {len(potential.elements)}, atomic numbers up to {max(potential.elements)} |
| repulsion | {repulsion} |

Energies are total energies in the convention of the training data.

```python
from atomeq import AtomeqCalculator

atoms.calc = AtomeqCalculator("{name}{chosen}")
```
"""
