"""Files of MACE become potentials with all their heads; state dicts by a YAML of what they lack."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from atomeq.potential.heads import HeadedPotential
from atomeq.potential.import_mace import mace_potential, read_mace
from atomeq.potential.official_names import OfficialError
from atomeq.potential.potential import Potential
from atomeq.potential.untrusted import read_yaml

_NEEDED = ("interactions", "avg_num_neighbors")
_KNOWN = (*_NEEDED, "heads", "apply_cutoff", "distance_transform")
_EXAMPLE = """\
interactions: [RealAgnosticResidualInteractionBlock, RealAgnosticResidualInteractionBlock]
avg_num_neighbors: 61.96
heads: [Default]            # of several, their names in their order
distance_transform: None    # or Agnesi, Soft
apply_cutoff: true          # false where the cutoff multiplies the weights"""


def is_mace_state(document: Mapping[str, Any]) -> bool:
    """Say whether a file holds a state dict of MACE."""
    return "node_embedding.linear.weight" in document


def convert_mace_state(
    state: Mapping[str, Tensor],
    path: Path,
    digest: str,
    config: Path | None,
    *,
    head: str | None = None,
) -> tuple[Potential, dict[str, Any]]:
    """Return the potential of a state dict, and where it comes from.

    Args:
        state: Parameters and buffers.
        path: The file they are of.
        digest: Its SHA-256.
        config: YAML with the options of :func:`~atomeq.potential.import_mace.mace_potential`.
        head: Which head of several.

    Raises:
        OfficialError: The options are missing, not known, or do not fit the weights.
    """
    if config is None:
        raise OfficialError(
            f"{path} is a state dict of MACE, which does not say its interactions or its average "
            f"number of neighbours; say them by --config FILE, a YAML such as\n{_EXAMPLE}"
        )
    options = read_yaml(config)
    unknown = [name for name in options if name not in _KNOWN]
    missing = [name for name in _NEEDED if name not in options]
    if unknown or missing:
        raise OfficialError(
            f"{config}: {', '.join(map(str, unknown or missing))} "
            f"{'is unknown' if unknown else 'is missing'}; it is to be like\n{_EXAMPLE}"
        )
    return mace_heads(options, state, head=head), mace_origin(options, path, digest, head)


def convert_mace(
    path: Path, digest: str, *, head: str | None = None
) -> tuple[Potential, dict[str, Any]]:
    """Return the potential of a .model file, and where it comes from."""
    options, state = read_mace(path)
    return mace_heads(options, state, head=head), mace_origin(options, path, digest, head)


def mace_heads(
    options: Mapping[str, Any], state: Mapping[str, Tensor], *, head: str | None
) -> Potential:
    """Return the potential of the head that is chosen or, where none is, one of all heads."""
    heads = list(options.get("heads") or ["Default"])
    if head is not None or len(heads) == 1:
        return mace_potential(options, state, head=head)
    return HeadedPotential.of({h: mace_potential(options, state, head=h) for h in heads})


def mace_origin(
    options: Mapping[str, Any], path: Path, digest: str, head: str | None
) -> dict[str, Any]:
    """Return what a potential's metadata say of its file."""
    heads = list(options.get("heads") or ["Default"])
    origin = {"file": path.name, "sha256": digest, "interactions": list(options["interactions"])}
    return {**origin, "heads": heads, "head": head or (heads[0] if len(heads) == 1 else None)}
