"""Published eSEN in our words."""

from atomeq.models.base import AtomisticModel
from atomeq.models.esen import ESEN as Model
from atomeq.potential.official_family import Family, Options, Rules
from atomeq.potential.official_oc20 import STRESS_NAMES, fold_denoising, rank2_options

_WITHOUT_EFFECT = (
    # heads decide what is computed, and how
    "direct_forces", "regress_forces", "regress_stress",
    # of denoising, in training
    "use_force_encoding", "use_noise_schedule_sigma_encoding", "use_denoising_energy",
    "use_denoising_stress",
)  # fmt: skip


def _esen(taken: Options) -> AtomisticModel:
    for name in _WITHOUT_EFFECT:
        taken(name, None)
    gated = taken.only("act_type", "s2", "gate") == "gate"
    spectral = taken.only("mlp_type", "grid", "spectral") == "spectral"
    heads = taken("heads", {"energy": Options("energy", {})})
    basis = taken("distance_function", "gaussian")
    arguments = {
        "cutoff": float(taken("cutoff", 5.0)),
        "lmax": taken("lmax", 2),
        "mmax": taken("mmax", 2),
        "num_layers": taken("num_layers", 2),
        "sphere_channels": taken("sphere_channels", 128),
        "hidden_channels": taken("hidden_channels", 128),
        "edge_channels": taken("edge_channels", 128),
        "num_elements": taken("max_num_elements", 100),
        "radial_basis": "enveloped_bessel" if basis == "bessel" else basis,
        "num_radial": taken("num_distance_basis", 512),
        "norm": taken("norm_type", "rms_norm_sh"),
        "activation": "gate" if gated else "separable_s2",
        "feed_forward": "silu_gate" if spectral else "grid_mlp",
        "grid_resolution": taken("grid_resolution", None),
        "chiral": True,
        "bias": True,
        "envelope": taken("use_envelope", False),
        "max_neighbors": taken("max_neighbors", 300),
        "skip_isolated": True,
        "direct_forces": "forces" in heads,
        "stress_head": rank2_options(heads["stress"]) if "stress" in heads else None,
        "energy_reduce": heads["energy"]("reduce", "sum"),
    }
    return Model(**arguments)


_NAMES: Rules = (
    (r"^sphere_embedding\.", "embedding."),
    (r"^distance_expansion\.rbf\.", "basis."),
    (r"^edge_degree_embedding\.", "neighborhood."),
    (r"^energy_block\.", "energy."),
    (r"^linear\.", "forces."),
    *STRESS_NAMES,
    (r"^norm\.", "norm_out."),
    (r"\.norm_1\.", ".message_norm."),
    (r"\.norm_2\.", ".update_norm."),
    (r"\.edge_wise\.", ".message."),
    (r"\.atom_wise\.", ".update."),
    (r"\.(so2_conv_1\.)?rad_func\.net\.", ".radial."),
    (r"\.so2_conv_1\.", ".first."),
    (r"\.so2_conv_2\.", ".second."),
    (r"\.fc_m0\.weight$", ".weights.0"),
    (r"\.fc_m0\.bias$", ".bias"),
    (r"\.so2_m_conv\.(\d+)\.fc\.weight$", lambda match: f".weights.{int(match[1]) + 1}"),
    (r"\.so3_linear_1\.", ".first."),
    (r"\.so3_linear_2\.", ".second."),
    (r"\.scalar_mlp\.0\.", ".scalars."),
    (r"\.grid_mlp\.0\.", ".activation.first."),
    (r"\.grid_mlp\.2\.", ".activation.second."),
    (r"\.grid_mlp\.4\.", ".activation.third."),
    (r"\.affine_(weight|bias)$", r".\1"),
    (r"\.norm_l0\.", ".scalar_norm."),
)


def _with_denoising(*names: str) -> tuple[str, ...]:
    return (*names, *(f"{name}_dens" for name in names))


ESEN = Family(
    title="esen",
    names=frozenset(_with_denoising("esen_backbone")),
    heads={
        **dict.fromkeys(_with_denoising("esen_mlp_efs_head", "esen_mlp_energy_head"), "energy"),
        **dict.fromkeys(_with_denoising("esen_linear_force_head"), "forces"),
        **dict.fromkeys(_with_denoising("esen_rank2_head"), "stress"),
    },
    model=Model,
    build=_esen,
    rules=_NAMES,
    derives=True,
    unused=r"^(force_embedding|noise_schedule_sigma_embedding|denoising_linear)\.",
    fold=fold_denoising,
)
