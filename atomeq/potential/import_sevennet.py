"""Published checkpoints of SevenNet (.pth) become ordinary potentials of the model NequIP.

Weights keep their float32 values: what the reference computes from them on the way (signs of the
coupling, the order of columns, one modality of several) is undone here, never rounded.
"""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomeq.graph.convert import element_symbols
from atomeq.models.nequip import NequIP
from atomeq.nn.convolution import convolution_paths
from atomeq.nn.irreps import SCALAR, Irrep, Irreps, linear_blocks, parse_irreps, sorted_irreps
from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.potential.distances import SHORTEST
from atomeq.potential.official_names import OfficialError
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

_OLD_NAMES = {
    "EdgeEmbedding": "edge_embedding",
    "reducing_nn_input_to_hidden": "reduce_input_to_hidden",
    "reducing_nn_hidden_to_energy": "reduce_hidden_to_energy",
    "denumerator": "denominator",
}
_DEFAULTS: dict[str, Any] = {
    "cutoff": 4.5,
    "channel": 32,
    "irreps_manual": False,
    "lmax": 1,
    "lmax_edge": -1,
    "lmax_node": -1,
    "is_parity": True,
    "num_convolution_layer": 3,
    "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 8},
    "cutoff_function": {"cutoff_function_name": "poly_cut"},
    "act_radial": "silu",
    "act_scalar": {"e": "silu", "o": "tanh"},
    "act_gate": {"e": "silu", "o": "tanh"},
    "weight_nn_hidden_neurons": [64, 64],
    "use_bias_in_linear": False,
    "self_connection_type": "nequip",
    "interaction_type": "nequip",
    "optimize_by_reduce": True,
    "readout_as_fcn": False,
    "readout_fcn_hidden_neurons": [30, 30],
    "readout_fcn_activation": "relu",
    "use_modality": False,
    "use_modal_node_embedding": False,
    "use_modal_self_inter_intro": False,
    "use_modal_self_inter_outro": False,
    "use_modal_output_block": False,
    "use_modal_wise_shift": False,
    "use_modal_wise_scale": False,
}
_MODAL_MAPS = {
    "embedding": "use_modal_node_embedding",
    "intro": "use_modal_self_inter_intro",
    "outro": "use_modal_self_inter_outro",
    "readout": "use_modal_output_block",
}


_NO_PARITY = """\
The network has no parity: energies of mirror images may differ, by up to 5e-4 eV/atom and 3e-2 eV/Å
in chiral or low-symmetry structures; crystals with a centre of inversion are exact.
"""


def is_sevennet(document: Mapping[str, Any]) -> bool:
    """Say whether what a file holds is a checkpoint of SevenNet."""
    config = document.get("config")
    return "model_state_dict" in document and isinstance(config, dict) and "_type_map" in config


def sevennet_potential(
    config: Mapping[str, Any], state: Mapping[str, Tensor], *, modal: str | None = None
) -> Potential:
    """Build the potential of a checkpoint.

    Args:
        config: The ``config`` of the file.
        state: Its ``model_state_dict``.
        modal: Which modality of a potential of several, by its name in the file.

    Raises:
        OfficialError: An option that is not known, a modality that is missing or does not exist,
            or weights that do not fit.
    """
    given = {**_DEFAULTS, **config}
    _refuse_unknown(given)
    number = _modality(given, modal)
    irreps = layer_irreps(given)
    elements = [z for z, _ in sorted(_type_map(given).items(), key=lambda item: item[1])]
    weights = _Weights(state, given, number, irreps, len(elements))
    scale = _by_element(weights.take("rescale_atomic_energy.scale"), given, "scale", number)
    shift = _by_element(weights.take("rescale_atomic_energy.shift"), given, "shift", number)
    one_scale = len(scale.unique()) == 1
    model = NequIP(
        float(given["cutoff"]),
        irreps=irreps,
        parity=bool(given["is_parity"]),
        num_radial=int(given["radial_basis"].get("bessel_basis_num", 8)),
        radial_channels=[int(n) for n in given["weight_nn_hidden_neurons"]],
        envelope_exponent=int(given["cutoff_function"].get("poly_cut_p_value", 6)),
        self_connection=_self_connections(given, len(irreps) - 1),
        elements=elements,
        sevennet=_form(given, element_scale=not one_scale),
    )
    try:
        ours = dict(weights.ours(model))
        if not one_scale:
            ours["element_scale"] = scale.expand(len(elements)).contiguous()
        model.load_state_dict(ours)
    except (KeyError, RuntimeError) as error:
        raise OfficialError(f"the weights do not fit the options: {error}") from error
    shifts = shift.double().expand(len(elements)).tolist()
    known = {z: s for z, s in zip(elements, shifts, strict=True) if z > 0}
    references = AtomicReferences(known, scale=float(scale[0]) if one_scale else 1.0)
    return Potential(model, references).requires_grad_(False).eval()


def layer_irreps(config: Mapping[str, Any]) -> list[str]:
    """Return the features of the embedding and after each layer, given or worked out."""
    if config["irreps_manual"]:
        return [str(text).replace(" ", "") for text in config["irreps_manual"]]
    channels, n_layers = int(config["channel"]), int(config["num_convolution_layer"])
    features: list[Irreps] = [{SCALAR: channels}]
    for t in range(n_layers):
        reached = _reachable(features[-1], config)
        last = t == n_layers - 1
        lmax = config["lmax"] if config["lmax_node"] < 0 else config["lmax_node"]
        kept = [ir for ir in reached if (ir == SCALAR if last else ir.l <= lmax)]
        features.append(sorted_irreps(dict.fromkeys(kept, channels)))
    return ["+".join(f"{n}x{ir}" for ir, n in entry.items()) for entry in features]


def _lmax_edge(config: Mapping[str, Any]) -> int:
    return int(config["lmax"] if config["lmax_edge"] < 0 else config["lmax_edge"])


def _reachable(inputs: Irreps, config: Mapping[str, Any]) -> set[Irrep]:
    lmax_edge = _lmax_edge(config)
    top = max(ir.l for ir in inputs) + lmax_edge
    everything = {Irrep(l, p): 1 for l in range(top + 1) for p in (-1, 1)}
    paths = convolution_paths(inputs, everything, lmax_edge, bool(config["is_parity"]))
    return {irrep for some in paths.values() for _, irrep in some}


class _Weights:
    """The state dict of a file, read in our order."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any],
        modality: int | None,
        irreps: list[str],
        n_species: int,
    ) -> None:
        self.state = {_new_name(name): tensor for name, tensor in state.items()}
        self.config = config
        self.modality = modality
        self.features = [parse_irreps(text) for text in irreps]
        self.n_species = n_species

    def take(self, name: str) -> Tensor:
        """Return a tensor of the file.

        Raises:
            OfficialError: It is not there.
        """
        if name not in self.state:
            raise OfficialError(f"the checkpoint has no weights {name!r}")
        return self.state[name].detach().to(torch.float32)

    def ours(self, model: NequIP) -> Iterator[tuple[str, Tensor]]:
        """Yield the state dict of our model."""
        yield "basis.wave_numbers", self.take("edge_embedding.basis_function.coeffs").flatten()
        inputs = {SCALAR: self.n_species}
        yield from self._linear(
            "embedding", "onehot_to_feature_x", inputs, self.features[0], "embedding"
        )
        for t, layer in enumerate(model.layers):
            yield from self._layer(t, layer)
        if self.config["readout_as_fcn"]:
            for k in range(len(list(model.readout.parameters()))):
                yield f"readout.weights.{k}", self.take(f"readout_FCN.fcn.layer{k}.weight")
            return
        channels = self.features[-1][SCALAR]
        hidden = {SCALAR: channels // 2}
        yield from self._linear(
            "readout.0", "reduce_input_to_hidden", {SCALAR: channels}, hidden, "readout"
        )
        yield from self._linear("readout.1", "reduce_hidden_to_energy", hidden, {SCALAR: 1})

    def _layer(self, t: int, layer: Any) -> Iterator[tuple[str, Tensor]]:
        x, gated, ours = self.features[t], layer.gate.inputs, f"layers.{t}"
        yield f"{ours}.denominator", self.take(f"{t}_convolution.denominator").reshape(())
        yield from self._linear(f"{ours}.intro", f"{t}_self_interaction_1", x, x, "intro")
        columns, coupled = self._columns(t, layer)
        radial = [
            f"{t}_convolution.weight_nn.layer{k}.weight" for k in range(len(layer.radial.weights))
        ]
        for k, name in enumerate(radial):
            weight = self.take(name)
            yield f"{ours}.radial.weights.{k}", weight if k < len(radial) - 1 else columns(weight)
        yield from self._linear(f"{ours}.outro", f"{t}_self_interaction_2", coupled, gated, "outro")
        own = f"{t}_self_connection_intro"
        if f"{own}.linear.weight" in self.state:
            yield from self._linear(f"{ours}.self_connection", own, x, gated)
            return
        flat, start = self.take(f"{own}.fc_tensor_product.weight"), 0
        for irrep in x:
            if irrep in gated:
                shape = (x[irrep], self.n_species, gated[irrep])
                size = shape[0] * shape[1] * shape[2]
                yield (
                    f"{ours}.self_connection.weights.{irrep}",
                    flat[start : start + size].view(shape),
                )
                start += size

    def _linear(
        self, ours: str, theirs: str, inputs: Irreps, outputs: Irreps, modal: str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Cut a flat weight into blocks, in the order of the inputs; modalities come last."""
        flat = self.take(f"{theirs}.linear.weight")
        blocks, start = linear_blocks(flat, inputs, outputs)
        for irrep, block in blocks.items():
            yield f"{ours}.weights.{irrep}", block
        if self.modality is not None and modal and self.config[_MODAL_MAPS[modal]]:
            rows = flat[start:].view(-1, outputs[SCALAR])
            yield f"{ours}.folded", rows[self.modality].clone()
            start = flat.numel()
        if start != flat.numel():
            raise OfficialError(f"{theirs} has {flat.numel()} weights, expected {start}")
        if self.config["use_bias_in_linear"] and (modal or theirs.startswith("reduce")):
            yield f"{ours}.bias", self.take(f"{theirs}.linear.bias")

    def _columns(self, t: int, layer: Any) -> tuple[Any, Irreps]:
        """Return what puts the columns of the last radial layer in our order, and the irreps after.

        Files of versions before 0.11 have the paths in the order of the loops, later ones sorted
        by what they give. A path whose coupling had another sign is turned.
        """
        x, top = self.features[t], max(irrep.l for irrep in self.features[t + 1])
        last = t == len(self.features) - 2
        coupled = {
            irrep: 0
            for irrep in sorted(_reachable(x, self.config))
            if irrep.l <= top and (irrep.p == 1 or not last)
        }
        found = convolution_paths(
            x, coupled, _lmax_edge(self.config), bool(self.config["is_parity"])
        )
        theirs = [(entry, path, to) for entry, some in found.items() for path, to in some]
        for entry, _, irrep in theirs:
            coupled[irrep] += x[entry]
        if not _before(self.config, (0, 11)):
            theirs.sort(key=lambda item: item[2])
        starts, start = {}, 0
        for entry, path, irrep in theirs:
            starts[entry, path, irrep] = start
            start += x[entry]
        wanted = [(entry, path, to) for entry, some in layer.paths.items() for path, to in some]

        def columns(weight: Tensor) -> Tensor:
            if weight.shape[1] != start:
                raise OfficialError(f"layer {t} has {weight.shape[1]} radial columns, not {start}")
            parts = [
                weight[:, starts[key] : starts[key] + x[key[0]]] * self._sign(t, key[1])
                for key in wanted
            ]
            return torch.cat(parts, dim=1)

        return columns, coupled

    def _sign(self, t: int, path: tuple[int, int, int]) -> float:
        """Return -1 where the file's 3j symbol is minus ours; those with an l = 0 are not kept."""
        degrees = "_".join(map(str, path))
        name = f"{t}_convolution.convolution._compiled_main_left_right._w3j_{degrees}"
        if name not in self.state:
            return 1.0
        theirs, ours = self.state[name].double(), clebsch_gordan(*path).double()
        agreement = float((theirs * ours).sum())
        if theirs.shape != ours.shape or abs(abs(agreement) - 1.0) > 1e-4:
            raise OfficialError(f"the coupling {tuple(path)} of layer {t} is none of SO(3)")
        return 1.0 if agreement > 0 else -1.0


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    required = {
        "interaction_type": config["interaction_type"] == "nequip",
        "radial_basis": config["radial_basis"].get("radial_basis_name") == "bessel",
        "optimize_by_reduce": bool(config["optimize_by_reduce"]),
        "cutoff_function": config["cutoff_function"].get("cutoff_function_name")
        in ("poly_cut", "XPLOR"),
    }
    for name, known in required.items():
        if not known:
            raise OfficialError(f"{name} is {config[name]!r}, which is not known here")


def _modality(config: Mapping[str, Any], modal: str | None) -> int | None:
    names = dict(config.get("_modal_map") or {}) if config["use_modality"] else {}
    if not names:
        if modal is not None:
            raise OfficialError(f"modality {modal!r} was asked for, but the file has none")
        return None
    if modal not in names:
        what = "has to be chosen" if modal is None else f"{modal!r} does not exist"
        raise OfficialError(
            f"the modality {what}: the file has {', '.join(names)}, whose energies have different "
            f"zeros; give one, as in --modal {next(iter(names))}"
        )
    return int(names[modal])


def _form(config: Mapping[str, Any], *, element_scale: bool) -> dict[str, Any]:
    switch = config["cutoff_function"]
    n_modalities = int(config.get("_number_of_modalities", 0))
    folded = {
        name: n_modalities
        for name, option in _MODAL_MAPS.items()
        if config["use_modality"] and config[option]
    }
    hidden = [int(n) for n in config["readout_fcn_hidden_neurons"] or ()]
    fcn = bool(config["readout_as_fcn"])
    return {
        "lmax_edge": _lmax_edge(config),
        "normalize_harmonics": bool(config.get("_normalize_sph", not _before(config, (0, 10)))),
        "envelope_onset": float(switch["cutoff_on"])
        if switch["cutoff_function_name"] == "XPLOR"
        else None,
        "radial_activation": config["act_radial"],
        "scalar_activations": [config["act_scalar"][p] for p in "eo"],
        "gate_activations": [config["act_gate"][p] for p in "eo"],
        "linear_bias": bool(config["use_bias_in_linear"]),
        "readout": hidden if fcn else "linear",
        "readout_activation": config["readout_fcn_activation"] if fcn else "silu",
        "element_scale": element_scale,
        "folded": folded,
    }


def _self_connections(config: Mapping[str, Any], n_layers: int) -> list[str]:
    kinds = config["self_connection_type"]
    kinds = [kinds] * n_layers if isinstance(kinds, str) else list(kinds)
    names = {"linear": "linear", "nequip": "species"}
    if unknown := set(kinds) - set(names):
        raise OfficialError(f"self_connection_type {sorted(unknown)} is not known here")
    return [names[kind] for kind in kinds]


def _by_element(values: Tensor, config: Mapping[str, Any], name: str, number: int | None) -> Tensor:
    """Return one number for each element, or one for all, of the chosen modality."""
    if number is not None and config[f"use_modal_wise_{name}"]:
        values = values[number]
    return values.flatten()


def _type_map(config: Mapping[str, Any]) -> dict[int, int]:
    return {int(z): int(index) for z, index in config["_type_map"].items()}


def _before(config: Mapping[str, Any], version: tuple[int, int]) -> bool:
    """Say whether the file is older; development versions count as before their release."""
    words = str(config.get("version", "0.9")).split(".")
    own = (int(words[0]), int(words[1]))
    return own < version or (own == version and "dev" in str(config["version"]))


def _new_name(name: str) -> str:
    name = name.replace(" ", "_")
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def sevennet_card(name: str, origin: Mapping[str, Any], potential: Potential) -> str:
    """Return a README that says what the potential is, from what the checkpoint says."""
    model = potential.model
    assert isinstance(model, NequIP)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    modal = f", modality {origin['modal']}" if origin.get("modal") else ""
    mirror = "" if model.parity else _NO_PARITY
    return f"""# {name}

Converted from the published SevenNet checkpoint `{origin["file"]}` (SHA-256
{origin["sha256"]}), version {origin["version"]}{modal}.
Licence and citation are those of the checkpoint's authors: Y. Park, J. Kim, S. Hwang and S. Han,
J. Chem. Theory Comput. 20, 4857 (2024).

| | |
|---|---|
| model | NequIP as in SevenNet, {n_parameters:,} parameters |
| features | {", then ".join(dict.fromkeys(model.irreps))} |
| cutoff | {model.cutoff} Å, {len(model.layers)} layers |
| elements | {len(potential.elements)}, atomic numbers up to {max(potential.elements)} |
| trained until | epoch {origin["epoch"]} |

{mirror}{_limits(potential)}

```python
from atomeq import AtomeqCalculator

atoms.calc = AtomeqCalculator("{name}")
```
"""


def _limits(potential: Potential) -> str:
    """Return what the card says of energies, elements and distances."""
    heaviest = max(potential.elements)
    missing = sorted(set(range(1, heaviest)) - set(potential.elements))
    *symbols, last = element_symbols(torch.tensor([*missing, heaviest]))
    there = (
        "the repulsion of nuclei (ZBL) is added, and elsewhere the numbers are the published ones."
        if len(potential.terms)
        else "it knows nothing, warns once and may be off by thousands of eV: keep away, or add "
        "the repulsion of nuclei (`--zbl` of `atomeq potentials install` and `atomeq convert`)."
    )
    return textwrap.fill(
        "Energies are total energies in the convention of the training data. Structures with "
        f"{', '.join([*symbols, f'anything beyond {last}'])} are refused. Where atoms are closer "
        f"than {SHORTEST:g} of the sum of their covalent radii {there}",
        100,
        break_on_hyphens=False,
    )


def convert_sevennet(
    document: Mapping[str, Any], path: Path, digest: str, *, modal: str | None = None
) -> tuple[Potential, dict[str, Any]]:
    """Return the potential of what a file holds, and where it comes from."""
    potential = sevennet_potential(document["config"], document["model_state_dict"], modal=modal)
    origin = {
        "file": path.name,
        "sha256": digest,
        "version": str(document["config"].get("version", "unknown")),
        "epoch": document.get("epoch"),
        "modal": modal,
    }
    return potential, origin
