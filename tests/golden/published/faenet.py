"""FAENet as published, from the reference's own constructor arguments."""

from typing import Any

from atomeq.models.faenet import EnergyHead, FAENet, SkipConnection
from atomeq.nn.force_decoder import DecoderNorm

_SKIP_CONNECTIONS: dict[Any, SkipConnection] = {
    False: "none",
    None: "none",
    "": "none",
    "add": "add",
    "concat": "concat",
    "concat_atom": "concat_atom",
}
_ENERGY_HEADS: dict[Any, EnergyHead] = {
    None: "sum",
    "": "sum",
    False: "sum",
    "weighted-av-initial-embeds": "weighted_initial",
    "weighted-av-final-embeds": "weighted_final",
}
_PUBLISHED_NORMS: dict[Any, DecoderNorm] = {"batch1d": "batch", "layer": "layer", "": "none"}


def published(config: dict[str, Any]) -> FAENet:
    """Build the model as published from the reference's own constructor arguments.

    Its state dict loads with ``strict=False``: only ``embed_block.phys_emb`` stands elsewhere.

    Args:
        config: As in the reference's YAML, ``preprocess`` and ``act`` (SiLU) aside.

    Raises:
        ValueError: An activation other than ``"swish"`` or ``"silu"``.
    """
    if config.get("act", "swish") not in ("swish", "silu"):
        raise ValueError(f"act {config['act']!r}: every published configuration has 'swish'")
    kind = config.get("force_decoder_type", "mlp")
    decoder = (config.get("force_decoder_model_config") or {}).get(kind, {})
    return FAENet(
        config.get("cutoff", 6.0),
        hidden_channels=config.get("hidden_channels", 128),
        num_filters=config.get("num_filters", 128),
        num_interactions=config.get("num_interactions", 4),
        num_gaussians=config.get("num_gaussians", 50),
        mp_type=config.get("mp_type", "updownscale_base"),
        complex_mp=config.get("complex_mp", False),
        second_layer_mlp=config.get("second_layer_MLP", True),
        skip_connection=_SKIP_CONNECTIONS[config.get("skip_co", "concat")],
        energy_head=_ENERGY_HEADS[config.get("energy_head")],
        tag_channels=config.get("tag_hidden_channels", 32),
        pg_channels=config.get("pg_hidden_channels", 32),
        phys_embeds=config.get("phys_embeds", True),
        phys_channels=config.get("phys_hidden_channels", 0),
        force_head=kind if "direct" in (config.get("regress_forces") or "") else None,
        decoder_channels=decoder.get("hidden_channels", 128),
        decoder_norm=_PUBLISHED_NORMS[decoder.get("norm", "batch1d") or ""],
        normalisation="batch" if config.get("graph_norm", True) else "none",
        envelope=False,
        energy_bias="graph",
        max_neighbors=config.get("max_num_neighbors", 40),
        out_dim=config.get("out_dim", 1),
        num_elements=85,
    )
