"""Published EquiformerV3 in our words."""

from atomeq.models.base import AtomisticModel
from atomeq.models.equiformer_v3 import EquiformerV3
from atomeq.potential.official_family import Family, OfficialError, Options, Rules
from atomeq.potential.official_oc20 import AVG_DEGREE, AVG_NUM_NODES

_WITHOUT_EFFECT = (
    "gradient_checkpointing_block_list", "use_head_reg",
    "attn_mask_rate", "value_drop", "ffn_drop",  # in training
)  # fmt: skip

# The normalisation of features, and that of the invariants from which attention is made.
_NORMS = {
    "merge_layer_norm": ("rms_norm_sh", "layer_norm"),
    "merge_layer_norm_attn_rms_norm": ("rms_norm_sh", "rms_norm"),
    "merge_rms_norm": ("bare_rms_norm_sh", "rms_norm"),
    "sep_layer_norm": ("layer_norm_sh", "layer_norm"),
    "equivariant_layer_norm": ("layer_norm", "layer_norm"),
}
_ACTIVATIONS = {
    "sep-merge_gates2_swiglu": "product",
    "gate": "gate",
    "s2": "s2",
    "sep_s2": "separable_s2",
    "s2_swiglu": "s2_swiglu",
    "sep_s2_swiglu": "separable_s2_swiglu",
    "sep-merge_s2_swiglu": "merged_s2_swiglu",
    "sep_s2_square": "separable_s2_square",
}
# With linear maps on the grid these are perceptrons of the channels there.
_GRID_MLP = {"gate": "grid_mlp", "s2": "grid_mlp", "separable_s2": "separable_grid_mlp"}


def _equiformer_v3(taken: Options) -> AtomisticModel:
    for name in _WITHOUT_EFFECT:
        taken(name, None)
    direct = taken("direct_prediction", True)
    norm, logit_norm = _NORMS[taken.only("norm_type", *_NORMS)]
    renorm = taken("use_attn_renorm", True)  # RMSNorm is there without it
    feed_forward, grid_mlp = _activation(taken, "ffn_activation"), taken("use_grid_mlp", True)
    arguments = {
        "cutoff": float(taken("max_radius", 12.0)),
        "lmax": taken("lmax", 6),
        "mmax": taken("mmax", 2),
        "num_layers": taken("num_layers", 12),
        "sphere_channels": taken("num_channels", 128),
        "attn_hidden_channels": taken("attn_hidden_channels", 64),
        "num_heads": taken("num_heads", 8),
        "attn_alpha_channels": taken("attn_alpha_channels", 32),
        "attn_value_channels": taken("attn_value_channels", 16),
        "ffn_hidden_channels": taken("ffn_hidden_channels", 128),
        "edge_channels": taken("edge_channels", 128),
        "num_elements": taken("max_num_elements", 128),
        "radial_basis": "gaussian",
        "num_radial": taken("num_radial_basis", 600),
        "norm": norm,
        "logit_norm": "none" if logit_norm == "layer_norm" and not renorm else logit_norm,
        "activation": _activation(taken, "attn_activation"),
        "feed_forward": _GRID_MLP.get(feed_forward, feed_forward) if grid_mlp else feed_forward,
        "grid_mlp": grid_mlp and feed_forward not in _GRID_MLP,
        "attn_grid": list(taken("attn_grid_resolution_list", [20, 8])),
        "ffn_grid": list(taken("ffn_grid_resolution_list", [20, 20])),
        "element_pairs": taken("use_atom_edge_embedding", True),
        "shared_radial": taken("use_rad_l_parametrization", True),
        "add_merge": taken("use_add_merge", False),
        "softcap": taken("softcap", None),
        "silu_logits": taken("alpha_drop", 0.0) != 0.0,  # the published code, in inference too
        "attn_epsilon": taken("attn_eps", 1e-16),
        "chiral": True,
        "envelope": taken("use_envelope", True),
        "max_neighbors": taken("max_neighbors", 20),
        "strict_neighbors": taken("enforce_max_neighbors_strictly", True),
        "direct_forces": taken("regress_forces", True) and direct,
        "force_activation": "gate" if taken("use_gate_force_head", True) else "separable_s2",
        "direct_stress": taken("regress_stress", False) and direct,
        "avg_degree": taken("avg_degree", AVG_DEGREE),
        "energy_divisor": float(taken("avg_num_nodes", AVG_NUM_NODES)),
        "alpha_drop": taken("attn_weights_drop", 0.1),
        "drop_path": taken("drop_path_rate", 0.05),
        "proj_drop": taken("proj_drop", 0.0),
    }
    return EquiformerV3(**arguments)


def _activation(taken: Options, name: str) -> str:
    published = taken(name, "sep-merge_gates2_swiglu")
    # computed once more in the backward pass: the same function
    known = _ACTIVATIONS.get(str(published).removesuffix("_mem"))
    if known is None:
        allowed = ", ".join(_ACTIVATIONS)
        raise OfficialError(f"{taken.model} with {name}={published!r} is not known, only {allowed}")
    return known


_NAMES: Rules = (
    (r"^sphere_embedding\.", "embedding."),
    (r"^edge_degree_embedding\.", "degree_embedding."),
    (r"^energy_block\.linear_1\.", "energy.0."),
    (r"^energy_block\.linear_2\.", "energy.2."),
    (r"^force_block\.", "forces."),
    (r"^stress_block\.", "stress.network."),
    (r"^norm\.", "norm_out."),
    (r"\.ga\.", ".attention."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\.(source|target)_embedding\.", r".radial.elements.\1."),
    (r"\.rad_func\.net\.", ".radial.layers."),
    (r"\.so2_linear_1\.", ".first."),
    (r"\.so2_linear_2\.", ".second."),
    (r"\.fc_m0\.weight$", ".weights.0"),
    (r"\.fc_m0\.bias$", ".bias"),
    (r"\.so2_m_linear\.(\d+)\.fc\.weight$", lambda match: f".weights.{int(match[1]) + 1}"),
    (r"\.alpha_dot$", ".logit_weight"),
    (r"\.alpha_norm\.", ".logit_norm."),
    (r"\.proj\.", ".projection."),
    (r"\.so3_linear_1\.", ".first."),
    (r"\.so3_linear_2\.", ".second."),
    (r"\.grid_mlp\.gating_linear\.", ".gates."),
    (r"\.grid_mlp\.(grid_linear_1|0\.linear)\.", ".grid_first."),
    (r"\.grid_mlp\.(grid_linear_2|2)\.", ".grid_second."),
    (r"\.grid_mlp\.0\.", ".activation.first."),
    (r"\.grid_mlp\.3\.", ".activation.second."),
    (r"\.grid_mlp\.6\.", ".activation.third."),
    (r"\.(scalar_mlp\.0(\.linear)?|gating_linear)\.", ".scalars."),
    (r"\.affine_(weight|bias)$", r".\1"),
    (r"\.norm_l0\.", ".scalar_norm."),
)

EQUIFORMER_V3 = Family(
    title="equiformer_v3",
    names=frozenset({"equiformer_v3", "equiformer_v3_dens"}),
    heads={},
    model=EquiformerV3,
    build=_equiformer_v3,
    rules=_NAMES,
    derives=True,
    unused=r"^(force_embedding|dens_block)\.",  # of denoising: a structure without noise has none
)
