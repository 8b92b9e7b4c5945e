"""Published eSCN and EquiformerV2, of the Open Catalyst Project and of OMat24, in our words."""

from collections.abc import Mapping

from torch import Tensor

from atomeq.models.base import AtomisticModel
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.escn_published import PublishedESCN, sphere_points
from atomeq.potential.official_family import Family, OfficialError, Options, Rules

AVG_NUM_NODES = 77.81317  # atoms of a structure of OC20, dividing EquiformerV2's energy
AVG_DEGREE = 23.395238876342773  # neighbours within 12 Å, at most 500
NUM_GAUSSIANS = 600  # of EquiformerV2, whatever its num_distance_basis says

_WITHOUT_EFFECT = (
    "num_sphere_samples", "num_distance_basis", "attn_activation", "ffn_activation",  # never used
    "load_energy_lin_ref",  # makes room for weights that may go unused
    # of denoising, in training: structures come without noise and forces here, and what a force
    # embedding adds to such an atom is a constant
    "use_force_encoding", "use_noise_schedule_sigma_encoding", "use_denoising_energy",
    "use_denoising_stress",
)  # fmt: skip

_SAME_POINT = 1e-4  # float32 made the stored points; they are off by 6e-6


def _escn(taken: Options) -> AtomisticModel:
    taken.only("use_grid", True)
    taken("num_distance_basis", None)
    heads = _heads(taken)
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
        "direct_forces": "forces" in heads,
        "energy_reduce": heads["energy"]("reduce", "sum"),
    }
    return PublishedESCN(**arguments)


def _equiformer_v2(taken: Options) -> AtomisticModel:
    taken.only("distance_function", "gaussian")
    taken.only("use_s2_act_attn", False)
    for name in _WITHOUT_EFFECT:
        taken(name, None)
    heads = _heads(taken)
    separable = "separable_" if taken("use_sep_s2_act", True) else ""
    gate = taken("use_gate_act", False)
    activation = "gate" if gate else f"{separable}s2"
    per_block = "shared" if taken("share_atom_edge_embedding", False) else "per_block"
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
        "direct_forces": "forces" in heads,
        "stress_head": rank2_options(heads["stress"]) if "stress" in heads else None,
        "linear_reference": taken("use_energy_lin_ref", False),
        "avg_degree": taken("avg_degree", None) or AVG_DEGREE,
        "energy_divisor": taken("avg_num_nodes", None) or AVG_NUM_NODES,
        "energy_reduce": heads["energy"]("reduce", "sum"),
        "alpha_drop": taken("alpha_drop", 0.1),
        "drop_path": taken("drop_path_rate", 0.05),
        "proj_drop": taken("proj_drop", 0.0),
    }
    return EquiformerV2(**arguments)


def _heads(taken: Options) -> dict[str, Options]:
    """Return the options of each head; a model that is not made of parts has energy and forces."""
    heads = taken("heads", None)
    forces = taken("regress_forces", True)  # of a model in parts the heads say it
    taken("regress_stress", None)
    if heads is None:
        return {"energy": Options("energy", {}), **({"forces": Options("", {})} if forces else {})}
    return heads


def rank2_options(taken: Options) -> dict[str, bool | int | float]:
    """Return the options of :class:`~atomeq.nn.stress.Rank2Stress`."""
    taken("default_norm_type", None)  # of backbones without a norm_type
    decompose, extensive = taken("decompose", False), taken("extensive", False)
    divisor = float(taken("avg_num_nodes", 1.0))
    return {
        "decompose": decompose,
        "edge_level": taken("edge_level_mlp", False),
        "num_layers": taken("num_mlp_layers", 2),
        "source_and_target": taken("use_source_target_embedding", False),
        "extensive": extensive,
        "divisor": divisor if decompose and extensive else 1.0,  # elsewhere it divides nothing
    }


def fold_denoising(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add to the embedding of elements what a structure without noise gets from those of noise.

    Forces and noise are zero then, but the biases of their embeddings stay.
    """
    folded = dict(weights)
    for name in ("force_embedding", "noise_schedule_sigma_embedding"):
        bias = weights.get(f"{name}.bias")
        if bias is not None:
            embedding = folded["sphere_embedding.weight"].double()  # a sum of two float32 numbers
            folded["sphere_embedding.weight"] = embedding + bias
    return folded


def _refuse_other_points(model: AtomisticModel, weights: Mapping[str, Tensor]) -> None:
    """The points from which eSCN's output is read are made again; they must be the same ones."""
    stored = weights.get("sphere_points")
    if not isinstance(model, PublishedESCN) or stored is None:
        return
    points = sphere_points(model.num_sphere_samples)
    if stored.shape != points.shape or float((stored.double() - points).abs().max()) > _SAME_POINT:
        raise OfficialError("sphere_points are not the published ones (Fibonacci, density-scaled)")


STRESS_NAMES: Rules = (
    (r"^sphharm_norm\.", "stress.harmonics_norm."),
    (r"^xedge_layer_norm\.", "stress.edge_norm."),
    (r"^block\.scalar_MLP\.", "stress.trace."),
    (r"^block\.irrep2_MLP\.", "stress.traceless."),
    (r"^block\.r2tensor_MLP\.", "stress.tensor."),
)

_EQUIFORMER_V2_NAMES: Rules = (
    (r"^sphere_embedding\.", "embedding."),
    (r"^(source|target)_embedding\.", r"pairs.\1."),
    (r"^energy_lin_ref$", "linear_energies"),
    (r"^edge_degree_embedding\.", "degree_embedding."),
    (r"^(force|vector)_block\.", "forces."),
    (r"^(energy|scalar)_block\.", "energy."),
    *STRESS_NAMES,
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

_ESCN_NAMES: Rules = (
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


ESCN = Family(
    title="escn",
    names=frozenset({"escn", "escn_backbone", "eSCNBackbone"}),
    heads={
        **dict.fromkeys(("escn_energy_head", "eSCNEnergyHead"), "energy"),
        **dict.fromkeys(("escn_force_head", "eSCNForceHead"), "forces"),
    },
    model=PublishedESCN,
    build=_escn,
    rules=_ESCN_NAMES,
    unused=r"^backbone\.(energy|force)_block\.",  # left in the backbone where there is no such head
    refuse=_refuse_other_points,
)

EQUIFORMER_V2 = Family(
    title="equiformer_v2",
    names=frozenset(
        {
            *("equiformer_v2", "equiformer_v2_backbone", "EquiformerV2Backbone"),
            *("equiformer_v2_dens_backbone", "EqV2DeNSBackbone"),
        }
    ),
    heads={
        **dict.fromkeys(
            (
                *("equiformer_v2_energy_head", "EquiformerV2EnergyHead"),
                *("equiformerV2_scalar_head", "EqV2ScalarHead"),
                *("eqV2_DeNS_scalar_head", "DeNSScalarHead"),
                *("equiformer_v2_dens_energy_head", "DeNSEnergyHead"),
            ),
            "energy",
        ),
        **dict.fromkeys(
            (
                *("equiformer_v2_force_head", "EquiformerV2ForceHead"),
                *("equiformerV2_vector_head", "EqV2VectorHead"),
                *("eqV2_DeNS_vector_head", "DeNSVectorHead"),
                *("equiformer_v2_dens_force_head", "DeNSForceHead"),
            ),
            "forces",
        ),
        **dict.fromkeys(
            (
                *("rank2_symmetric_head", "Rank2SymmetricTensorHead"),
                *("dens_rank2_symmetric_head", "DeNSRank2Head"),
            ),
            "stress",
        ),
    },
    model=EquiformerV2,
    build=_equiformer_v2,
    rules=_EQUIFORMER_V2_NAMES,
    scales_parts=True,
    unused=r"^(force_embedding|noise_schedule_sigma_embedding|denoising_pos_block)\.",
    fold=fold_denoising,
)
