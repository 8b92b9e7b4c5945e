"""Published models of fairchem 1.x in our words: whose configuration it is, names of weights.

A model is one class with its arguments, or ``hydra``: a backbone and heads with names of their own.
A family of models is one more file with its :class:`Family`, named in :data:`FAMILIES`.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from atomeq.models.base import AtomisticModel
from atomeq.potential.official_equiformer_v3 import EQUIFORMER_V3
from atomeq.potential.official_esen import ESEN
from atomeq.potential.official_family import Family, OfficialError, Options
from atomeq.potential.official_oc20 import EQUIFORMER_V2, ESCN

FAMILIES = (ESCN, EQUIFORMER_V2, ESEN, EQUIFORMER_V3)

# What a configuration may say without effect on the network once its weights are there.
_NO_EFFECT = {
    "otf_graph", "use_pbc", "use_pbc_single", "num_atoms", "bond_feat_dim", "num_targets",
    "weight_init", "show_timing_info", "scale_file", "activation_checkpoint",
}  # fmt: skip

_HYDRA = {"name", "otf_graph", "pass_through_head_outputs", "freeze_backbone", "finetune_config"}
_PROPERTIES = ("energy", "forces", "stress")


def build_official(name: str, config: Mapping[str, Any]) -> AtomisticModel:
    """Build the published model of a name and configuration, with weights not yet loaded.

    Args:
        name: ``escn`` or ``equiformer_v2``, also with ``_backbone`` behind it, the path of a class,
            or ``hydra``.
        config: The constructor arguments as published; absent ones have the published defaults. Of
            hydra ``backbone`` and ``heads``.

    Raises:
        OfficialError: The name, an option or its value is not known.
    """
    if name == "hydra":
        return build_official(*hydra_backbone(config))
    family = family_named(name)
    taken = Options(family.title, {k: v for k, v in config.items() if k not in _NO_EFFECT})
    heads: dict[str, Options] = {}
    if taken.options.get("heads"):
        heads = taken.options["heads"] = _head_options(taken.options["heads"], family)
    model = family.build(taken)
    for options in (taken, *heads.values()):
        options.refuse_the_rest()
    return model


def family_named(name: str) -> Family:
    """Return the family of a registered name, or of a class by its path.

    Raises:
        OfficialError: There is none.
    """
    for family in FAMILIES:
        if name.rpartition(".")[2] in family.names:
            return family
    known = ", ".join(family.title for family in FAMILIES)
    raise OfficialError(f"model {name!r} is not known; known are {known}")


def hydra_backbone(node: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of the backbone of hydra, the ``heads`` among the latter.

    Raises:
        OfficialError: There is no backbone, or an option is not known.
    """
    rest = set(node) - _HYDRA - {"backbone", "heads"}
    if rest:
        raise OfficialError(f"options of hydra that are not known: {', '.join(sorted(rest))}")
    if not node.get("backbone"):
        start = (node.get("finetune_config") or {}).get("starting_checkpoint")
        raise OfficialError(
            "hydra without a backbone, as fine-tuning writes it: the architecture is that of the "
            f"checkpoint it started from, {start!r}; copy model.backbone and model.heads of that "
            "one's config into this one's, in place of finetune_config"
        )
    backbone = dict(node["backbone"])
    heads = node.get("heads")
    if not heads:
        raise OfficialError("hydra without heads computes no energy")
    return str(backbone.pop("model", "")), {**backbone, "heads": heads}


def _head_options(heads: Mapping[str, Any], family: Family) -> dict[str, Options]:
    """Return the options of heads by what they compute, whatever their names are."""
    found: dict[str, Options] = {}
    for title, head in heads.items():
        options = dict(head)
        module = str(options.pop("module", "")).rpartition(".")[2]
        computed = family.heads.get(module)
        if computed is None:
            raise OfficialError(f"head {title!r} of {family.title} is not known: {dict(head)!r}")
        if options.pop("output_name", None) not in (None, computed):
            raise OfficialError(
                f"head {title!r} predicts {head['output_name']!r}; heads that are read predict "
                f"{', '.join(_PROPERTIES)}"
            )
        if computed in found:
            raise OfficialError(f"two heads of {family.title} compute {computed}")
        options.pop("use_denoising", None)  # in training
        found[computed] = Options(f"head {title!r}", options, module)
    if "energy" not in found:
        raise OfficialError(f"no head of {family.title} computes the energy: {list(heads)}")
    return found


def official_weights(model: AtomisticModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give published weights the names and shapes of ours; buffers are left out.

    Args:
        model: What :func:`build_official` returned.
        weights: As published, without prefixes of parallel training.

    Raises:
        OfficialError: Weights are missing, or there are ones that the model does not have.
    """
    family = family_of(model)
    family.refuse(model, weights)
    wanted = model.state_dict()
    weights = family.fold(strip_prefixes(weights))
    names = {k: v for k, v in our_names(model, weights).items() if not re.search(family.unused, k)}
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
    family = family_of(model)
    return {
        official: family.our_name(official)
        for official, tensor in weights.items()
        if not _is_buffer(official, tensor, model)
    }


def family_of(model: AtomisticModel) -> Family:
    """Return the family of a model that :func:`build_official` returned."""
    return next(family for family in FAMILIES if family.model is type(model))


def strip_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take away what parallel training, compilation and the split in parts put before names.

    Raises:
        OfficialError: Two names become one.
    """
    prefix = re.compile(
        r"^((module|_orig_mod)\.)*(backbone\.(?!(energy|force)_block\.)|output_heads\.[^.]+\.)?"
    )
    stripped = {prefix.sub("", name): tensor for name, tensor in weights.items()}
    if len(stripped) != len(weights):
        raise OfficialError("two heads, or a head and the backbone, have weights of one name")
    return stripped


_BUFFER = re.compile(
    r"(^|\.)(SO3_rotation|SO3_grid|so3_rotation|so3_grid|mappingReduced|mapping)\.|"
    r"(^|\.)(expand_index|balance_degree_weight|distance_expansion\.offset|Jd_\d+)$|"
    r"^(sphere_points|sphharm_weights\.\d+|stress_block\.zero_padded_change_matrix)$"
)


def _is_buffer(name: str, tensor: Tensor, model: AtomisticModel) -> bool:
    """Whether a tensor is made again (grids, Wigner matrices, indices) or switched off."""
    if name == "energy_lin_ref":
        return getattr(model, "linear_energies", None) is None
    return _BUFFER.search(name) is not None or not tensor.is_floating_point()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
