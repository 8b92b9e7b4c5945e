"""Published checkpoints of fairchem 1.x (.pt) become ordinary potential folders.

Both layouts of fairchem 1.x are read: the legacy one of the Open Catalyst Project (``model`` a name
beside ``model_attributes``, normalizers ``target`` and ``grad_target``) and the current one, of
OMat24's models too. A .pt
file is a pickle, so it is read with ``weights_only=True``, which builds tensors and plain values
and calls nothing else.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atomeq.models.base import AtomisticModel
from atomeq.nn.stress import symmetric_tensor
from atomeq.potential.checkpoint import save_potential, sha256
from atomeq.potential.official_names import (
    OfficialError,
    build_official,
    family_of,
    hydra_backbone,
    official_weights,
    our_names,
    strip_prefixes,
)
from atomeq.potential.potential import Potential
from atomeq.potential.references import MAX_ATOMIC_NUMBER, AtomicReferences

CARD_FILE = "README.md"

# Normalizers by their old and new names; those of trace and rest of a stress; of noise in training.
_NORMALIZERS = {
    "target": "energy",
    "grad_target": "forces",
    **{name: name for name in ("energy", "forces", "stress")},
    **{name: name for name in ("stress_isotropic", "stress_anisotropic")},
    "denoising_pos_target": None,
}
_SPREADS = ("rmsd", "std", "stdev")
_NONE = (0.0, 1.0)

_OC20_ENERGY = """\
Models of OC20 and OC22 predict what their data set calls the energy: for OC20 the adsorption
energy, relative to the clean slab and gas-phase references, no total energy. The offset is one for
every structure, so energies are not extensive."""
_TOTAL_ENERGY = """\
The energy is a total energy of the data set's functional: to the output is added a reference of the
element of every atom."""

# Scalars and arrays of numpy stand among the metrics and options; these make one from bytes and do
# nothing else.
_SCALAR = np.float64(0.0).__reduce__()[0]  # its home differs between numpy 1 and 2
_ARRAY = np.zeros(1).__reduce__()[0]
_HARMLESS = [
    np.dtype,
    np.ndarray,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_ARRAY, "numpy.core.multiarray._reconstruct"),
    (_ARRAY, "numpy._core.multiarray._reconstruct"),
]


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What a published checkpoint holds, in its own words.

    Attributes:
        model: Its name in fairchem's registry.
        options: Constructor arguments of the model.
        weights: Parameters and buffers without prefixes.
        normalizers: ``energy``, ``forces``, ``stress`` and the parts of a stress, as (mean, rmsd).
        element_energies: Added after the energy is put back to scale, eV by atomic number.
        provenance: Data set, epoch, step and file name.
    """

    model: str
    options: dict[str, Any]
    weights: dict[str, Tensor]
    normalizers: dict[str, tuple[float, float]]
    element_energies: tuple[float, ...]
    provenance: dict[str, Any]


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    use_ema: bool = False,
    grid_resolution: int | None = None,
) -> Path:
    """Write the potential folder of a published checkpoint, with a model card.

    Args:
        checkpoint: The .pt file.
        folder: Created if missing.
        use_ema: Take the running average of the weights; ``best_checkpoint.pt`` holds it already.
        grid_resolution: Replace the checkpoint's; a finer grid makes the model more equivariant.

    Returns:
        The folder.

    Raises:
        OfficialError: The file cannot be read without running code, or says something unknown.
    """
    official = read_official(checkpoint, use_ema=use_ema)
    potential = official_potential(official)
    model: Any = potential.model
    if grid_resolution is not None:
        model.set_grid_resolution(grid_resolution)
    metadata = {
        "origin": {**official.provenance, "ema": use_ema},
        "published_model": official.model,
        "published_options": {k: _listed(v) for k, v in official.options.items()},
    }
    folder = save_potential(potential, folder, metadata=metadata)
    (folder / CARD_FILE).write_text(model_card(folder.name, official, potential), encoding="utf-8")
    return folder


def read_official(checkpoint: str | Path, *, use_ema: bool = False) -> OfficialCheckpoint:
    """Read a published checkpoint without running anything in it.

    Args:
        checkpoint: The .pt file.
        use_ema: Take the running average of the weights.

    Raises:
        OfficialError: The file cannot be read without running code, or lacks something.
    """
    path = Path(checkpoint)
    document = load_document(path)
    config = document.get("config") or {}
    missing = [key for key in ("state_dict", "config") if not document.get(key)]
    if missing:
        raise OfficialError(f"{path} lacks {', '.join(missing)}: no checkpoint of fairchem 1.x")
    model, options = _model_options(config, path)
    weights = strip_prefixes(document["state_dict"])
    if use_ema:
        trained = document["state_dict"]
        if _nested(config, "model", "freeze_backbone"):
            trained = {k: v for k, v in trained.items() if ".output_heads." in f".{k}"}
        shadows = (document.get("ema") or {}).get("shadow_params")
        averaged = _averaged(strip_prefixes(trained), shadows, build_official(model, options), path)
        weights |= averaged
    return OfficialCheckpoint(
        model=model,
        options=options,
        weights=weights,
        normalizers=_normalizers(document, config, path),
        element_energies=_element_energies(document.get("elementrefs"), path),
        provenance={
            "file": path.name,
            "sha256": sha256(path),
            "epoch": _plain(document.get("epoch")),
            "step": _plain(document.get("step")),
            "dataset": _names(
                _nested(config, "dataset", "src") or _nested(config, "task", "dataset")
            ),
        },
    )


def official_potential(official: OfficialCheckpoint) -> Potential:
    """Build the potential of a checkpoint: its network, E = out · rmsd + mean, F = out · rmsd.

    Raises:
        OfficialError: Options or weights are unknown or missing, or forces have a mean.
    """
    model = build_official(official.model, official.options)
    model.load_state_dict(official_weights(model, official.weights))
    references = _references(model, official)
    return Potential(model, references).requires_grad_(False).eval()


def _references(model: AtomisticModel, official: OfficialCheckpoint) -> AtomicReferences:
    """Return E = out · rmsd + mean + Σ reference, and the same of forces and stress.

    What no normalizer is of is as it comes out; what is derived here alone is of the energy.
    """
    given = official.normalizers
    mean, rmsd = given.get("energy", _NONE)
    family = family_of(model)
    published = model.outputs | ({"forces", "stress"} if family.derives else set())
    forces_mean, forces_rmsd = given.get("forces", _NONE)
    if "forces" not in published:
        forces_mean, forces_rmsd = 0.0, rmsd
    if forces_mean != 0.0:
        raise OfficialError(f"forces are normalised by a mean of {forces_mean}, which is no vector")
    shift = _shift(model, official.element_energies)
    if "stress" not in published:
        return AtomicReferences(shift, scale=rmsd, offset=mean, force_scale=forces_rmsd)
    parts = ("stress_isotropic", "stress_anisotropic")
    means, rmsds = zip(*(given.get(name, _NONE) for name in parts), strict=True)
    if not (family.scales_parts and getattr(getattr(model, "stress", None), "decompose", False)):
        means, rmsds = (0.0, 0.0), (1.0, 1.0)
    stress_mean, stress_rmsd = given.get("stress", _NONE)
    # The mean of the five numbers that make up what is not the trace is one number.
    offset = torch.tensor([[means[0], *[means[1]] * 5]], dtype=torch.float64)
    return AtomicReferences(
        shift,
        scale=rmsd,
        offset=mean,
        force_scale=forces_rmsd,
        stress_scale=(rmsds[0] * stress_rmsd, rmsds[1] * stress_rmsd),
        stress_offset=symmetric_tensor(offset)[0] * stress_rmsd + stress_mean,
    )


def model_card(name: str, official: OfficialCheckpoint, potential: Potential) -> str:
    """Return a README that says what the potential is, from what the checkpoint says."""
    origin = official.provenance
    n_parameters = sum(p.numel() for p in potential.model.parameters())
    references = potential.references
    scale, offset = float(references.scale), float(references.offset)
    forces = "the gradient of the energy" if potential.conservative else "a head of their own"
    stress = "none"
    if "stress" in potential.model.outputs:
        stress = f"a head of its own, · {', '.join(f'{s:.8g}' for s in references.stress_scale)}"
    elif potential.gives_stress:
        stress = "the derivative of the energy"
    options = "\n".join(f"| {key} | {value} |" for key, value in sorted(official.options.items()))
    images = "periodic images where a structure has them"
    if official.options.get("use_pbc") is False:
        images = (
            "trained without periodic images (use_pbc is False), its capped neighbours not always "
            "the nearest: give it structures without pbc"
        )
    about_energy = _OC20_ENERGY if not official.element_energies else _TOTAL_ENERGY
    return f"""# {name}

Converted from the published checkpoint `{origin["file"]}` by `atomeq convert`
(SHA-256 {origin["sha256"]}). Licence and citation are those of the checkpoint's authors.

| | |
|---|---|
| model | {official.model}, {n_parameters:,} parameters |
| trained on | {origin["dataset"] or "not said"}, epoch {origin["epoch"]}, step {origin["step"]} |
| graph | {potential.model.graph_builder()!r} |
| neighbours | {images} |
| energy | output · {scale:.8g} eV + {offset:.8g} eV per structure |
| forces | {forces}, · {float(references.force_scale):.8g} eV/Å |
| stress | {stress} |
| elements | atomic numbers up to {max(potential.elements)} |

{about_energy} Where the number of neighbours is capped, the energy
jumps when two neighbours swap ranks: for molecular dynamics that conserves energy take another
potential.

```python
from atomeq import AtomeqCalculator

atoms.calc = AtomeqCalculator("{name}")
```

## Options of the published model

| option | value |
|---|---|
{options}
"""


def load_document(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds: tensors and plain values.

    Raises:
        OfficialError: It asks for anything else, or is no checkpoint.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            document = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        named = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
        what = f"it asks for {next(filter(None, named.groups()))}" if named else str(error)
        raise OfficialError(
            f"{path} cannot be read without running what is in it: {what.splitlines()[0]}"
        ) from error
    if not isinstance(document, dict):
        raise OfficialError(f"{path} holds a {type(document).__name__}, not a checkpoint")
    return document


def _model_options(config: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Return name and constructor arguments from either layout, hydra's backbone included."""
    node = config.get("model")
    if isinstance(node, str):
        node = {"name": node, **(config.get("model_attributes") or {})}
    if not isinstance(node, Mapping) or "name" not in node:
        raise OfficialError(f"{path}: config has no model with a name, but {node!r}")
    if node["name"] != "hydra":
        return node["name"], {key: value for key, value in node.items() if key != "name"}
    try:
        return hydra_backbone(node)
    except OfficialError as error:
        raise OfficialError(f"{path}: {error}") from error


def _normalizers(
    document: Mapping[str, Any], config: Mapping[str, Any], path: Path
) -> dict[str, tuple[float, float]]:
    """Return (mean, rmsd) of each property, from the old or the new names.

    Those that a file holds count; numbers of its configuration only where it holds none.
    """
    held = document.get("normalizers") or {}
    transforms = _nested(config, "dataset", "transforms")
    said = _nested(transforms, "normalizer") or {}
    said = {title: values for title, values in said.items() if title in _NORMALIZERS}
    found = {}
    for title, values in {**said, **held}.items():
        spread = next((values[name] for name in _SPREADS if name in values), None)
        if title not in _NORMALIZERS or spread is None or "mean" not in values:
            raise OfficialError(f"{path}: normalizer {title!r} is not known: {sorted(values)}")
        if (name := _NORMALIZERS[title]) is not None:
            found[name] = (_number(values["mean"]), _number(spread))
    if not found and _nested(config, "dataset", "normalize_labels"):
        raise OfficialError(f"{path}: labels were normalised, but there are no normalizers")
    for key, what, there in (
        ("normalizer", "normalizers", found),
        ("element_references", "element references", document.get("elementrefs") or {}),
    ):
        fitted = _nested(transforms, key, "fit", "targets") or ()
        missing = [name for name in fitted if name not in there]
        if missing:
            raise OfficialError(
                f"{path}: its training fitted {what} of {', '.join(missing)}, which the file does "
                "not hold; without them every number would be wrong"
            )
    return found


def _element_energies(references: Mapping[str, Any] | None, path: Path) -> tuple[float, ...]:
    if not references:
        return ()
    unknown = set(references) - {"energy"}
    table = (references.get("energy") or {}).get("element_references")
    if unknown or table is None:
        raise OfficialError(f"{path}: element references are not known: {sorted(references)}")
    return tuple(table.to(torch.float64).flatten().tolist())


def _averaged(
    weights: dict[str, Tensor], shadows: Any, built: AtomisticModel, path: Path
) -> dict[str, Tensor]:
    """Return the running averages of trained parameters, which are listed in order."""
    if not shadows:
        raise OfficialError(f"{path} holds no running average of the weights; leave it out")
    frozen = {name for name, parameter in built.named_parameters() if not parameter.requires_grad}
    owners: dict[str, list[str]] = {}  # a shared block is listed under every one that uses it
    for official, ours in our_names(built, weights).items():
        if ours not in frozen:
            owners.setdefault(ours, []).append(official)
    expected = [tuple(weights[names[0]].shape) for names in owners.values()]
    if expected != [tuple(shadow.shape) for shadow in shadows]:
        raise OfficialError(f"{path}: the running average is of {len(shadows)} other parameters")
    averaged = zip(owners.values(), shadows, strict=True)
    return {name: shadow for names, shadow in averaged for name in names}


def _shift(model: AtomisticModel, element_energies: tuple[float, ...]) -> dict[int, float]:
    """Return the energy of every element the model embeds."""
    embedding: Any = model.embedding
    numbers = range(1, min(embedding.num_embeddings, MAX_ATOMIC_NUMBER + 1))
    if element_energies and len(element_energies) <= max(numbers):
        numbers = range(1, len(element_energies))
    return {z: element_energies[z] if element_energies else 0.0 for z in numbers}


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise OfficialError(f"a normalizer is {tuple(value.shape)}; only single numbers are known")
    return float(value)


def _plain(value: Any) -> str | int | float | None:
    """Return what YAML can write."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _names(value: Any) -> str | int | float | None:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else _plain(value)


def _listed(value: Any) -> Any:
    """Return an option in plain values, lists and mappings of them included."""
    if isinstance(value, Mapping):
        return {str(key): _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else _plain(value)


def _nested(config: Any, *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
