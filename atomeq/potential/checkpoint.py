"""A predictor on disk: a folder with model.yaml, which holds the SHA-256 of weights.safetensors.

A propagator on disk is the same, with ``view``, what it is shown of particles, in model.yaml.
Nothing that is loaded executes code: the YAML is read with the safe loader, the class must be one
of the models of this package, and the weights are plain tensors. A folder whose YAML has a
``target`` predicts that scalar and is no potential.
"""

import dataclasses
import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from atomeq.data.particles import ParticleView
from atomeq.data.targets import ScalarTarget
from atomeq.files import write_atomically
from atomeq.models.base import AtomisticModel, Propagator
from atomeq.potential.folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    find_potential,
    find_propagator,
)
from atomeq.potential.long_step import LongStep
from atomeq.potential.potential import Potential
from atomeq.potential.predictor import Predictor
from atomeq.potential.references import AtomicReferences
from atomeq.potential.scalar import ScalarPredictor
from atomeq.potential.terms import EnergyTerm

CHECKPOINT_VERSION = 1

#: Every model a checkpoint may name, by its class path. A new model adds its line here.
MODELS = (
    "atomeq.models.egnn.EGNN",
    "atomeq.models.egnn_published.MoleculeEGNN",
    "atomeq.models.equiformer_v2.EquiformerV2",
    "atomeq.models.equihgnn.EquiHGNN",
    "atomeq.models.escn.ESCN",
    "atomeq.models.escn_published.PublishedESCN",
    "atomeq.models.faenet.FAENet",
    "atomeq.models.frame_averaged.Canonicalized",
    "atomeq.models.frame_averaged.FrameAveraged",
    "atomeq.models.segno.SEGNO",
)

#: Every network a saved propagator may name.
PROPAGATORS = (
    "atomeq.models.egnn_published.VelocityEGNN",
    "atomeq.models.segno.SEGNOPropagator",
)

#: Every additive term a checkpoint may name.
TERMS = (
    "atomeq.potential.dispersion.DispersionD3",
    "atomeq.potential.repulsion.ZBL",
)


def save_potential(
    potential: Predictor, folder: str | Path, *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write a potential or another predictor to a folder, replacing what a save left there.

    Each file is written under a temporary name and renamed, the YAML with the hash last: an
    interrupted save never leaves a folder that loads as something else.

    Args:
        potential: What to save.
        folder: Created if missing.
        metadata: Plain values (training data, errors) to keep in ``model.yaml``.

    Returns:
        The folder.
    """
    config = potential.model.config()
    refuse_foreign_models(config)
    document = {"model": config, "dtype": str(potential.dtype).removeprefix("torch.")}
    if isinstance(potential, ScalarPredictor):
        document["target"] = dataclasses.asdict(potential.target)
    if isinstance(potential, Potential) and len(potential.terms):
        document["terms"] = [_term_config(term) for term in potential.terms]
    return _write_folder(Path(folder), potential, document, metadata)


def save_propagator(
    step: LongStep, folder: str | Path, *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write a propagator and its view to a folder, as :func:`save_potential` writes a potential.

    Args:
        step: What to save.
        folder: Created if missing.
        metadata: Plain values to keep in ``model.yaml``.

    Returns:
        The folder.

    Raises:
        CheckpointError: The network is none of this package.
    """
    config = step.propagator.config()
    if config["class_path"] not in PROPAGATORS:
        raise CheckpointError(
            f"{config['class_path']} is not a propagator of this package; there are "
            f"{', '.join(PROPAGATORS)}"
        )
    dtype = str(step.dtype).removeprefix("torch.")
    document = {"model": config, "view": step.view.config(), "dtype": dtype}
    return _write_folder(Path(folder), step.propagator, document, metadata)


def _write_folder(
    folder: Path, module: nn.Module, document: dict[str, Any], metadata: dict[str, Any] | None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    content = save(weights)
    document = {
        "checkpoint_version": CHECKPOINT_VERSION,
        **document,
        "sha256": hashlib.sha256(content).hexdigest(),
        "metadata": metadata or {},
    }
    with write_atomically(folder / WEIGHTS_FILE) as partial:
        partial.write_bytes(content)
    with write_atomically(folder / CONFIG_FILE) as partial:
        partial.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return folder


def load_potential(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Potential:
    """Load a potential by the name of a shipped one or from a folder.

    Args:
        name_or_path: ``"cu-pbe"``, or a folder that :func:`save_potential` wrote.
        device: Where to put it; by default the CPU.
        dtype: The dtype the network computes in; by default the one it was saved with.

    Returns:
        The potential in evaluation mode, its parameters frozen: a training task unfreezes them.

    Raises:
        CheckpointError: Nothing there, a damaged file, a wrong hash, an unknown model or version,
            or what is there predicts something else than energies.
    """
    loaded = load_predictor(name_or_path, device=device, dtype=dtype)
    if isinstance(loaded, ScalarPredictor):
        raise CheckpointError(not_a_potential(loaded, str(name_or_path)))
    assert isinstance(loaded, Potential)
    return loaded


def load_predictor(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Predictor:
    """Load whatever a folder holds, a :class:`Potential` or a :class:`ScalarPredictor`.

    Arguments and errors are those of :func:`load_potential`.
    """
    folder = find_potential(name_or_path)
    document = _read_document(folder)
    if "view" in document:
        raise CheckpointError(
            f"{folder} holds a propagator, which carries particles a long step ahead and knows no "
            "energy or forces; use `atomeq rollout`, or load_propagator"
        )
    model = build_model(document["model"], named_in=folder / CONFIG_FILE)
    if "target" in document:
        potential: Predictor = _scalar(model, document, folder)
    else:
        potential = Potential(model, terms=_terms(document, folder))
    # Before the weights: copied into float32, those of a float64 potential would be rounded.
    potential = potential.to(getattr(torch, document["dtype"]))
    _load_weights(potential, folder)
    potential = potential.to(dtype if dtype is not None else getattr(torch, document["dtype"]))
    return potential.to(resolve_device(device)).requires_grad_(False).eval()


def load_propagator(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LongStep:
    """Load a propagator from a folder that :func:`save_propagator` wrote.

    Args:
        path: The folder.
        device: Where to put it; by default the CPU.
        dtype: The dtype the network computes in; by default the one it was saved with.

    Returns:
        The long step in evaluation mode, its parameters frozen.

    Raises:
        CheckpointError: Nothing there, a potential, a damaged file, a wrong hash, an unknown
            network or version.
    """
    folder = find_propagator(path)
    document = _read_document(folder)
    if "view" not in document:
        raise CheckpointError(f"{folder} holds a potential, not a propagator; use `atomeq md`")
    named_in = folder / CONFIG_FILE
    try:
        step = LongStep(
            _build_propagator(document["model"], named_in=named_in),
            ParticleView.from_config(document["view"]),
        )
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{named_in}: {error}") from error
    step = step.to(getattr(torch, document["dtype"]))
    _load_weights(step.propagator, folder)
    step = step.to(dtype if dtype is not None else getattr(torch, document["dtype"]))
    return step.to(resolve_device(device)).requires_grad_(False).eval()


def _load_weights(module: nn.Module, folder: Path) -> None:
    try:
        module.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}"
        ) from error


def not_a_potential(predictor: ScalarPredictor, what: str) -> str:
    """Return the message of whoever needs energies and forces and is given something else."""
    target = predictor.target
    return (
        f"{what} predicts {target.name} [{target.unit}] and is no potential: it has no energy and "
        "no forces; predict with load_predictor() or `atomeq predict`"
    )


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return a usable device, refusing CUDA where there is none instead of falling back.

    Raises:
        ValueError: The name is not a device, or the device is not available.
    """
    try:
        resolved = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is not a device; give 'cpu', 'cuda' or 'cuda:1'") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(resolved)!r} was asked for, but torch {torch.__version__} finds no CUDA "
            "GPU here; use device='cpu', or install a CUDA build of torch on a machine with a GPU"
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a precision that networks compute in; None, the potential's own, stays.

    Raises:
        ValueError: It is neither of the two.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', not {name!r}")
    return getattr(torch, name)


def build_model(node: Any, *, named_in: str | Path = "the node") -> AtomisticModel:
    """Build a model from its node, ``{"class_path": ..., "init_args": {...}}``.

    Args:
        node: As :meth:`AtomisticModel.config` returns it; a model inside it is a node as well.
        named_in: Where it was read, for the error.

    Raises:
        CheckpointError: A class that is not on the list of models, or arguments it does not take.
    """
    model_class = _listed_class(node, MODELS, named_in)
    arguments = {
        key: build_model(value, named_in=named_in) if _is_node(value) else value
        for key, value in (node.get("init_args") or {}).items()
    }
    try:
        return model_class(**arguments)
    except TypeError as error:
        raise CheckpointError(f"{named_in}, init_args: {error}") from error


def untrained_potential(
    config: str | Path, *, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Potential:
    """Build a potential with random weights from the YAML of a model, to check what holds for any.

    They are always the same, and away from the zeros and ones of their initialisation.

    Args:
        config: A file as ``configs/model/egnn.yaml``.
        scale: eV per unit of the network's output, which is small with such weights.
        dtype: The dtype the network computes in.

    Raises:
        CheckpointError: The file is not there, or names no model of this package.
    """
    path = Path(config)
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable YAML: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(node, named_in=path)
    potential = Potential(model, AtomicReferences(scale=scale)).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in potential.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.05 * noise
    return potential.to(dtype).requires_grad_(False).eval()


def build_term(node: Any, *, named_in: str | Path = "the node") -> EnergyTerm:
    """Build an additive term from its node.

    Args:
        node: As :meth:`EnergyTerm.config` returns it.
        named_in: Where it was read, for the error.

    Raises:
        CheckpointError: A class that is not on the list of terms, or arguments it does not take.
        ImportError: The term needs a package that is not installed.
    """
    term_class = _listed_class(node, TERMS, named_in, "term")
    try:
        return term_class(**(node.get("init_args") or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{named_in}, terms: {error}") from error


def _build_propagator(node: Any, *, named_in: str | Path) -> Propagator:
    propagator_class = _listed_class(node, PROPAGATORS, named_in)
    try:
        return propagator_class(**(node.get("init_args") or {}))
    except TypeError as error:
        raise CheckpointError(f"{named_in}, init_args: {error}") from error


def _listed_class(
    node: Any, allowed: tuple[str, ...], named_in: str | Path, what: str = "model"
) -> Any:
    """Return the class that a node names, if it is on the list; nothing else is imported."""
    class_path = node.get("class_path") if isinstance(node, dict) else node
    if class_path not in allowed:
        raise CheckpointError(
            f"{named_in} names the {what} {class_path!r}; known are {', '.join(allowed)}"
        )
    module, name = class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _terms(document: dict[str, Any], folder: Path) -> list[EnergyTerm]:
    return [build_term(node, named_in=folder / CONFIG_FILE) for node in document.get("terms", [])]


def _scalar(model: AtomisticModel, document: dict[str, Any], folder: Path) -> ScalarPredictor:
    try:
        return ScalarPredictor(model, ScalarTarget(**document["target"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}, target: {error}") from error


def _read_document(folder: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not readable YAML: {error}") from error
    missing = {"checkpoint_version", "model", "dtype", "sha256"} - set(document or {})
    if missing:
        raise CheckpointError(f"{folder / CONFIG_FILE} lacks {', '.join(sorted(missing))}")
    if document["checkpoint_version"] != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint_version {document['checkpoint_version']!r}, this package "
            f"reads version {CHECKPOINT_VERSION}; update atomeq or convert the checkpoint"
        )
    if document["dtype"] not in ("float32", "float64"):
        raise CheckpointError(f"{folder} has dtype {document['dtype']!r}; float32 and float64 are")
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}")
    found = sha256(folder / WEIGHTS_FILE)
    if found != document["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has SHA-256 {found[:12]}…, but {CONFIG_FILE} says "
            f"{str(document['sha256'])[:12]}…: the file is damaged or was exchanged; copy it again"
        )
    return document


def refuse_foreign_models(node: dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` where a node, or one inside it, is none of this package."""
    if node["class_path"] not in MODELS:
        raise CheckpointError(
            f"{node['class_path']} is not a model of this package; checkpoints hold "
            f"{', '.join(MODELS)}"
        )
    for value in node["init_args"].values():
        if _is_node(value):
            refuse_foreign_models(value)


def _term_config(term: nn.Module) -> dict[str, Any]:
    config = term.config() if isinstance(term, EnergyTerm) else {"class_path": type(term).__name__}
    if config["class_path"] not in TERMS:
        raise CheckpointError(
            f"{config['class_path']} is not a term of this package; checkpoints hold "
            f"{', '.join(TERMS)}"
        )
    return config


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" in value
