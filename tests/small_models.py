"""One node of each model, as a YAML file has it, so small that anything can be done with all."""

from typing import Any

_SPHERE = {"lmax": 1, "mmax": 1, "num_layers": 1, "sphere_channels": 4, "edge_channels": 4}
_TRANSFORMER = {
    **_SPHERE, "attn_hidden_channels": 4, "num_heads": 2, "attn_alpha_channels": 4,
    "attn_value_channels": 2, "ffn_hidden_channels": 4,
}  # fmt: skip
_ONE_L = {"lmax": [1], "mmax": [1], "num_layers": 1, "sphere_channels": 4, "edge_channels": 4}
_LIGHT = {"num_radial": 4, "hidden_channels": 8}
_FAENET = {
    "hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 4,
    "phys_embeds": False, "pg_channels": 2,
}  # fmt: skip


def node(module: str, name: str, **init_args: Any) -> dict[str, Any]:
    """The node of a model with a cutoff that makes few neighbours of copper."""
    path = f"atomeq.models.{module}.{name}"
    return {"class_path": path, "init_args": {"cutoff": 3.5, **init_args}}


def wrapped(module: str, name: str, **init_args: Any) -> dict[str, Any]:
    """The node of a model around others, whose cutoff it takes."""
    return {"class_path": f"atomeq.models.{module}.{name}", "init_args": init_args}


EGNN = node("egnn", "EGNN", num_layers=2, **_LIGHT)
FAENET = node("faenet", "FAENet", **_FAENET)
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "egnn": EGNN,
    "segno": node("segno", "SEGNO", num_steps=2, **_LIGHT),
    "escn": node("escn", "ESCN", hidden_channels=4, **_SPHERE),
    "escn published": node(
        "escn_published", "PublishedESCN", hidden_channels=4, num_sphere_samples=8, **_ONE_L
    ),
    "equiformer_v2": node("equiformer_v2", "EquiformerV2", **_TRANSFORMER),
    "equiformer_v3": node("equiformer_v3", "EquiformerV3", **_TRANSFORMER),
    "esen": node("esen", "ESEN", hidden_channels=4, **_SPHERE),
    "clifford": node("clifford", "CGENN", num_layers=1, hidden_channels=4, num_radial=4),
    "geometric_algebra": node(
        "geometric_algebra",
        "GeometricAlgebraAttention",
        num_layers=1,
        hidden_channels=4,
        num_radial=4,
    ),
    "se3_transformer": node(
        "se3_transformer",
        "SE3Transformer",
        num_layers=1,
        hidden_channels=4,
        num_heads=2,
        num_radial=4,
    ),
    "faenet": wrapped("frame_averaged", "FrameAveraged", model=FAENET),
    "mace": node(
        "mace", "MACE", irreps="4x0e+4x1o", lmax_edge=1, radial_channels=[4], num_radial=4
    ),
    "nequip": node(
        "nequip", "NequIP", irreps=["4x0e", "4x0e+3x1o", "4x0e"], radial_channels=[4], num_radial=4
    ),
    "ponita": node(
        "ponita", "PONITA", direction_cutoff=2.5, num_layers=1, basis_channels=4, **_LIGHT
    ),
    "equihgnn": wrapped(
        "equihgnn", "EquiHGNN", encoder=EGNN, num_layers=1, hidden_channels=6, perceive=False
    ),
}
