"""Which parameters an optimizer trains, and which of them its weight decay pulls to zero."""

from typing import Any, Literal

from torch import nn

from atomeq.nn.message_norms import GraphNorm
from atomeq.nn.norms import EquivariantLayerNorm, EquivariantRMSNorm, SeparableLayerNorm

#: ``all`` parameters decay, or the ``weights`` alone: neither biases nor those of normalisations.
Decay = Literal["all", "weights"]

_NORMS = (
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
    GraphNorm,
    EquivariantLayerNorm,
    EquivariantRMSNorm,
    SeparableLayerNorm,
)


def parameter_groups(module: nn.Module, decay: Decay = "all") -> list[dict[str, Any]]:
    """Return the groups an optimizer is made of; frozen parameters are left out.

    EquiformerV2's published runs decay ``weights``: those of linear maps, of attention logits and
    of element embeddings.

    Args:
        module: What is trained.
        decay: Which parameters decay.

    Returns:
        One group, or two of which the second has ``weight_decay`` 0.

    Raises:
        ValueError: ``decay`` is unknown.
    """
    if decay not in ("all", "weights"):
        raise ValueError(f"decay is all or weights, not {decay!r}")
    trained = [p for p in module.parameters() if p.requires_grad]
    if decay == "all":
        return [{"params": trained}]
    kept = {
        id(parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(part, _NORMS) or name == "bias"
    }
    groups = [
        {"params": [p for p in trained if id(p) not in kept]},
        {"params": [p for p in trained if id(p) in kept], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
