"""Published eSCN and EquiformerV2 in our words: options of their configuration, names of weights.

What a published configuration or file says that is not known here is refused by its name: a model
built from half of its options would compute something else in silence.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from atomeq.models.base import AtomisticModel
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.escn_published import PublishedESCN, sphere_points

AVG_NUM_NODES = 77.81317  # atoms of a structure of OC20, dividing EquiformerV2's energy
AVG_DEGREE = 23.395238876342773  # neighbours within 12 Å, at most 500
NUM_GAUSSIANS = 600  # of EquiformerV2, whatever its num_distance_basis says

_SAME_POINT = 1e-4  # float32 made the stored points; they are off by 6e-6


class OfficialError(ValueError):
    """A published configuration or file says something that is not known here."""


# What a configuration may say without effect on the network once its weights are there.
_NO_EFFECT = {
    "otf_graph", "use_pbc", "use_pbc_single", "num_atoms", "bond_feat_dim", "num_targets",
    "weight_init", "show_timing_info", "scale_file", "num_distance_basis", "attn_activation",
    "ffn_activation", "activation_checkpoint",
}  # fmt: skip


def build_official(name: str, config: Mapping[str, Any]) -> AtomisticModel:
    """Build the published model of a name and configuration, with weights not yet loaded.

    Args:
        name: ``escn`` or ``equiformer_v2``, also with ``_backbone`` behind it.
        config: The constructor arguments as published; absent ones have the published defaults.

    Raises:
        OfficialError: The name, an option or its value is not known.
    """
    builders: dict[str, Callable[[dict[str, Any]], AtomisticModel]] = {
        "escn": _escn,
        "equiformer_v2": _equiformer_v2,
    }
    kind = name.removesuffix("_backbone")
    if kind not in builders:
        raise OfficialError(f"model {name!r} is not known; known are {', '.join(builders)}")
    options = {key: value for key, value in config.items() if key not in _NO_EFFECT}
    return builders[kind](options)


def official_weights(model: AtomisticModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give published weights the names and shapes of ours; buffers are left out.

    Args:
        model: What :func:`build_official` returned.
        weights: As published, without prefixes of parallel training.

    Raises:
        OfficialError: Weights are missing, or there are ones that the model does not have.
    """
    _refuse_other_points(model, weights)
    wanted = model.state_dict()
    names = our_names(model, weights)
    unknown = [
        f"{official} {tuple(weights[official].shape)}"
        for official, ours in names.items()
        if ours not in wanted or weights[official].numel() != wanted[ours].numel()
    ]
    missing = sorted(set(wanted) - set(names.values()))
    if unknown or missing:
        raise OfficialError(
            f"weights do not fit {type(model).__name__}: not known {_some(unknown)}; "
            f"missing {_some(missing)}"
        )
    return {ours: weights[official].reshape(wanted[ours].shape) for official, ours in names.items()}


def our_names(model: AtomisticModel, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the published name of each parameter to ours, in the published order."""
    rules = _ESCN_NAMES if isinstance(model, PublishedESCN) else _EQUIFORMER_V2_NAMES
    return {
        official: _translate(official, rules)
        for official, tensor in weights.items()
        if not _is_unused(official, tensor, model)
    }


def strip_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take away what parallel training and the split in backbone and heads put before names."""
    prefix = re.compile(r"^(module\.)*(backbone\.|output_heads\.[^.]+\.)?")
    return {prefix.sub("", name): tensor for name, tensor in weights.items()}


def _escn(options: dict[str, Any]) -> AtomisticModel:
    taken = _Options("escn", options)
    taken.only("use_grid", True)
    arguments = {
        "cutoff": float(taken("cutoff", 8.0)),
        "lmax": [int(l) for l in taken("lmax_list", [6])],
        "mmax": [int(m) for m in taken("mmax_list", [2])],
        "num_layers": taken("num_layers", 8),
        "sphere_channels": taken("sphere_channels", 128),
        "hidden_channels": taken("hidden_channels", 256),
        "edge_channels": taken("edge_channels", 128),
        "num_sphere_samples": taken("num_sphere_samples", 128),
        "radial_basis": taken("distance_function", "gaussian"),
        "basis_width": float(taken("basis_width_scalar", 1.0)),
        "distance_resolution": float(taken("distance_resolution", 0.02)),
        "num_elements": taken("max_num_elements", 90),
        "grid_resolution": taken("resolution", None),
        "max_neighbors": taken("max_neighbors", 40),
        "strict_neighbors": taken("enforce_max_neighbors_strictly", True),
        "direct_forces": taken("regress_forces", True),
        "energy_reduce": taken("reduce", "sum"),
    }
    taken.refuse_the_rest()
    return PublishedESCN(**arguments)


def _equiformer_v2(options: dict[str, Any]) -> AtomisticModel:
    taken = _Options("equiformer_v2", options)
    taken.only("distance_function", "gaussian")
    taken.only("use_s2_act_attn", False)
    taken.only("reduce", "sum")
    taken("num_sphere_samples", None)  # never used
    separable = "separable_" if taken("use_sep_s2_act", True) else ""
    gate = taken("use_gate_act", False)
    activation = "gate" if gate else f"{separable}s2"
    per_block = "shared" if taken("share_atom_edge_embedding", False) else "per_block"
    taken("load_energy_lin_ref", False)  # makes room for weights that may go unused
    arguments = {
        "cutoff": float(taken("max_radius", 5.0)),
        "lmax": taken.single("lmax_list", 6),
        "mmax": taken.single("mmax_list", 2),
        "num_layers": taken("num_layers", 12),
        "sphere_channels": taken("sphere_channels", 128),
        "attn_hidden_channels": taken("attn_hidden_channels", 128),
        "num_heads": taken("num_heads", 8),
        "attn_alpha_channels": taken("attn_alpha_channels", 32),
        "attn_value_channels": taken("attn_value_channels", 16),
        "ffn_hidden_channels": taken("ffn_hidden_channels", 512),
        "edge_channels": taken("edge_channels", 128),
        "num_elements": taken("max_num_elements", 90),
        "radial_basis": "gaussian",
        "num_radial": NUM_GAUSSIANS,
        "norm": taken("norm_type", "rms_norm_sh"),
        "activation": activation,
        "feed_forward": f"{separable}grid_mlp" if taken("use_grid_mlp", False) else activation,
        "grid_resolution": taken("grid_resolution", None),
        "element_pairs": per_block if taken("use_atom_edge_embedding", True) else "none",
        "shared_radial": taken("use_m_share_rad", False),
        "attn_renorm": taken("use_attn_renorm", True),
        "chiral": True,
        "envelope": False,
        "max_neighbors": taken("max_neighbors", 500),
        "strict_neighbors": taken("enforce_max_neighbors_strictly", True),
        "direct_forces": taken("regress_forces", True),
        "linear_reference": taken("use_energy_lin_ref", False),
        "avg_degree": taken("avg_degree", None) or AVG_DEGREE,
        "energy_divisor": taken("avg_num_nodes", None) or AVG_NUM_NODES,
        "alpha_drop": taken("alpha_drop", 0.1),
        "drop_path": taken("drop_path_rate", 0.05),
        "proj_drop": taken("proj_drop", 0.0),
    }
    taken.refuse_the_rest()
    return EquiformerV2(**arguments)


class _Options:
    """The options of a configuration, each of which somebody must have asked for."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self.model = model
        self.options = dict(options)

    def __call__(self, name: str, default: Any) -> Any:
        value = self.options.pop(name, default)
        return default if value is None else value

    def only(self, name: str, known: Any) -> None:
        value = self(name, known)
        if value != known:
            raise OfficialError(f"{self.model} with {name}={value!r} is not known, only {known!r}")

    def single(self, name: str, default: int) -> int:
        values = self(name, [default])
        if len(values) != 1:
            raise OfficialError(f"{self.model} has one resolution, not {name}={values!r}")
        return int(values[0])

    def refuse_the_rest(self) -> None:
        if self.options:
            rest = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            raise OfficialError(f"options of {self.model} that are not known: {rest}")


# Names of parameters: patterns are tried in turn and all that match are applied, in this order.
_Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

_EQUIFORMER_V2_NAMES: _Rules = (
    (r"^sphere_embedding\.", "embedding."),
    (r"^(source|target)_embedding\.", r"pairs.\1."),
    (r"^energy_lin_ref$", "linear_energies"),
    (r"^edge_degree_embedding\.", "degree_embedding."),
    (r"^force_block\.", "forces."),
    (r"^energy_block\.", "energy."),
    (r"^norm\.", "norm_out."),
    (r"\.ga\.", ".attention."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\.(source|target)_embedding\.", r".radial.elements.\1."),
    (r"\.(so2_conv_1\.)?rad_func\.net\.", ".radial.layers."),
    (r"\.so2_conv_1\.", ".first."),
    (r"\.so2_conv_2\.", ".second."),
    (r"\.fc_m0\.weight$", ".weights.0"),
    (r"\.fc_m0\.bias$", ".bias"),
    (r"\.so2_m_conv\.(\d+)\.fc\.weight$", lambda match: f".weights.{int(match[1]) + 1}"),
    (r"\.alpha_dot$", ".logit_weight"),
    (r"\.alpha_norm\.", ".logit_norm."),
    (r"\.proj\.", ".projection."),
    (r"\.so3_linear_1\.", ".first."),
    (r"\.so3_linear_2\.", ".second."),
    (r"\.(scalar_mlp\.0|gating_linear)\.", ".scalars."),
    (r"\.grid_mlp\.0\.", ".activation.first."),
    (r"\.grid_mlp\.2\.", ".activation.second."),
    (r"\.grid_mlp\.4\.", ".activation.third."),
    (r"\.affine_(weight|bias)$", r".\1"),
    (r"\.norm_l0\.", ".scalar_norm."),
)

_ESCN_NAMES: _Rules = (
    (r"^sphere_embedding\.", "embedding."),
    (
        r"^(layer_blocks\.\d+\.message_block\.edge_block\.)?distance_expansion\.fc1\.",
        "basis.affine.",
    ),
    (r"^energy_block\.", "energy."),
    (r"^force_block\.", "forces."),
    (r"^layer_blocks\.", "layers."),
    (r"\.message_block\.edge_block\.", ".edge_network."),
    (r"\.message_block\.so2_block_(source|target)\.", r".\1."),
    (r"\.edge_network\.(source|target)_embedding\.", r".edge_network.\1."),
    (r"\.fc1_dist0\.", ".orders.0.radial."),
    (r"\.fc1_m0\.", ".orders.0.first."),
    (r"\.fc2_m0\.", ".orders.0.second."),
    (r"\.so2_conv\.(\d+)\.", lambda match: f".orders.{int(match[1]) + 1}."),
    (r"\.edge_network\.fc1_dist\.", ".edge_network.first."),
    (r"\.edge_network\.fc1_edge_attr\.", ".edge_network.second."),
    (r"\.fc1_dist\.", ".radial."),
    (r"\.fc1_r\.", ".real_first."),
    (r"\.fc2_r\.", ".real_second."),
    (r"\.fc1_i\.", ".imag_first."),
    (r"\.fc2_i\.", ".imag_second."),
    (r"\.fc1_sphere\.", ".update.first."),
    (r"\.fc2_sphere\.", ".update.second."),
    (r"\.fc3_sphere\.", ".update.third."),
    (r"\.fc1\.", ".first."),
    (r"\.fc2\.", ".second."),
    (r"\.fc3\.", ".third."),
)

_BUFFER = re.compile(
    r"(^|\.)(SO3_rotation|SO3_grid|mappingReduced|mapping)\.|"
    r"(^|\.)(expand_index|balance_degree_weight|distance_expansion\.offset)$|"
    r"^(sphere_points|sphharm_weights\.\d+)$"
)


def _translate(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _is_unused(name: str, tensor: Tensor, model: AtomisticModel) -> bool:
    """Whether a tensor is made again (grids, Wigner matrices, indices) or switched off."""
    if name == "energy_lin_ref":
        return getattr(model, "linear_energies", None) is None
    return _BUFFER.search(name) is not None or not tensor.is_floating_point()


def _refuse_other_points(model: AtomisticModel, weights: Mapping[str, Tensor]) -> None:
    """The points from which eSCN's output is read are made again; they must be the same ones."""
    stored = weights.get("sphere_points")
    if not isinstance(model, PublishedESCN) or stored is None:
        return
    points = sphere_points(model.num_sphere_samples)
    if stored.shape != points.shape or float((stored.double() - points).abs().max()) > _SAME_POINT:
        raise OfficialError("sphere_points are not the published ones (Fibonacci, density-scaled)")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
