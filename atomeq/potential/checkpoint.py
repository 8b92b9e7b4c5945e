"""A predictor on disk: a folder with model.yaml, which holds the SHA-256 of weights.safetensors.

Nothing that is loaded executes code: the YAML is read with the safe loader, the class must be a
registered model, and the weights are plain tensors. A folder whose YAML has a ``target`` predicts
that scalar and is no potential.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from atomeq.arguments import refuse_wrong_types
from atomeq.data.targets import ScalarTarget
from atomeq.files import write_atomically
from atomeq.models.base import AtomisticModel
from atomeq.models.registry import MODELS, build, refuse_unregistered
from atomeq.ops.precision import checked_precision
from atomeq.potential.distances import KnownDistances
from atomeq.potential.folders import (
    COMMITTEE_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    find_potential,
    split_head,
)
from atomeq.potential.heads import HeadedPotential, weights_of_head
from atomeq.potential.mean import MeanPotential, read_committee
from atomeq.potential.potential import Potential
from atomeq.potential.predictor import Predictor
from atomeq.potential.references import AtomicReferences
from atomeq.potential.scalar import ScalarPredictor
from atomeq.potential.terms import TERMS, EnergyTerm
from atomeq.potential.uncertainty import LastLayerUncertainty
from atomeq.potential.untrusted import (
    FitsWeights,
    read_yaml,
    refuse_meta_device,
    refuse_unfit_weights,
)
from atomeq.registry import Registry, RegistryError
from atomeq.typing import Precision

CHECKPOINT_VERSION = 1

T = TypeVar("T")


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

    Raises:
        CheckpointError: A model or a term that could not be loaded again.
    """
    return write_folder(Path(folder), _description(potential), potential, metadata)


def refuse_unsaveable(predictor: Predictor) -> None:
    """Raise :class:`CheckpointError` where a save would fail, or what it wrote not be loaded.

    For those who are about to spend hours on the weights. The weights are not looked at but for
    their layout, so it costs one copy of them in memory.
    """
    content_of(predictor, _description(predictor))


def _description(predictor: Predictor) -> dict[str, Any]:
    """Return what ``model.yaml`` says of a predictor, all of it registered."""
    if isinstance(predictor, MeanPotential):
        raise CheckpointError("a committee is saved member by member, and by write_committee()")
    dtype = str(predictor.dtype).removeprefix("torch.")
    document = {"model": saveable_node(predictor.model, MODELS), "dtype": dtype}
    if predictor.precision is not None:
        document["precision"] = predictor.precision
    if isinstance(predictor, ScalarPredictor):
        document["target"] = dataclasses.asdict(predictor.target)
    if isinstance(predictor, Potential) and len(predictor.terms):
        document["terms"] = [saveable_node(term, TERMS) for term in predictor.terms]
    if isinstance(predictor, HeadedPotential):
        document["heads"] = list(predictor.names)
    if isinstance(predictor, Potential) and predictor.distances.shortest:
        document["shortest_distances"] = predictor.distances.shortest
    return document


def saveable_node(module: nn.Module, registry: Registry[Any]) -> dict[str, Any]:
    """Return the node of a model or a term, from which it could be built again."""
    try:
        refuse_unregistered(module, registry)
        return module.config()  # pyright: ignore[reportCallIssue] - every registered class has it
    except RegistryError as error:
        raise CheckpointError(f"{type(module).__name__} cannot be saved: {error}") from error
    except AttributeError as error:
        raise CheckpointError(
            f"{type(module).__name__} could not be built again: {error}; an argument of its "
            "constructor is to be an attribute too, by self.keep_arguments(locals()) in __init__"
        ) from error


def write_folder(
    folder: Path, document: dict[str, Any], module: nn.Module, metadata: dict[str, Any] | None
) -> Path:
    """Write a folder: weights first, then the YAML that holds their hash.

    Args:
        folder: Created if missing.
        document: What ``model.yaml`` says, but for version, hash and metadata.
        module: Whose weights are saved.
        metadata: Plain values to keep.

    Returns:
        The folder.
    """
    text, content = content_of(module, document, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / WEIGHTS_FILE) as partial:
        partial.write_bytes(content)
    with write_atomically(folder / CONFIG_FILE) as partial:
        partial.write_text(text, encoding="utf-8")
    return folder


def content_of(
    module: nn.Module, document: dict[str, Any], metadata: dict[str, Any] | None = None
) -> tuple[str, bytes]:
    """Return what the two files hold."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    try:
        content = save(weights)
        document = {
            "checkpoint_version": CHECKPOINT_VERSION,
            **document,
            "sha256": hashlib.sha256(content).hexdigest(),
            "metadata": metadata or {},
        }
        return yaml.safe_dump(document, sort_keys=False), content
    except RuntimeError as error:  # two names of one tensor
        raise CheckpointError(f"the weights cannot be saved: {error}") from error
    except yaml.YAMLError as error:
        raise CheckpointError(f"the model's arguments are no plain values: {error}") from error


def load_potential(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    precision: Precision | None = None,
) -> Potential:
    """Load a potential by the name of a shipped one or from a folder.

    Args:
        name_or_path: ``"cu-pbe"``, or a folder that :func:`save_potential` wrote; of one with
            several heads ``NAME@HEAD``. Of a committee's folder the members' mean
            (:class:`~atomeq.potential.mean.MeanPotential`).
        device: Where to put it; by default the CPU.
        dtype: The dtype the network computes in; by default the one it was saved with.
        precision: How coarse the operands of tensor products may be on a GPU: ``highest`` (fp32),
            ``high`` (TF32) or ``medium`` (bfloat16), added in fp32. By default what its folder
            recommends, else torch's own setting.

    Returns:
        The potential in evaluation mode, its parameters frozen: a training task unfreezes them.

    Raises:
        CheckpointError: Nothing there, a damaged file, a wrong hash, an unknown model or version,
            or what is there predicts something else than energies.
    """
    loaded = load_predictor(name_or_path, device=device, dtype=dtype, precision=precision)
    if isinstance(loaded, ScalarPredictor):
        raise CheckpointError(not_a_potential(loaded, str(name_or_path)))
    assert isinstance(loaded, Potential)
    return loaded


def load_predictor(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    precision: Precision | None = None,
) -> Predictor:
    """Load whatever a folder holds, a :class:`Potential` or a :class:`ScalarPredictor`.

    Args:
        name_or_path: Of a folder.
        device: As of :func:`load_potential`.
        dtype: Likewise.
        precision: Likewise.

    Returns:
        Of the kind that was saved, in evaluation mode.

    Raises:
        CheckpointError: As :func:`load_potential`, or the folder holds a propagator.
    """
    folder = find_potential(name_or_path)
    if (folder / COMMITTEE_FILE).is_file():
        (names, rescaling), head = read_committee(folder), split_head(name_or_path)[1]
        each = [folder / (name if head is None else f"{name}@{head}") for name in names]
        how: dict[str, Any] = {"device": device, "dtype": dtype, "precision": precision}
        committee = _committee([load_potential(one, **how) for one in each], rescaling, folder)
        committee.name = str(name_or_path)
        return committee.eval()
    document = read_document(folder)
    if "view" in document:
        raise CheckpointError(
            f"{folder} holds a propagator, which carries particles a long step ahead and knows no "
            "energy or forces; use `atomeq rollout`, or load_propagator"
        )
    head = split_head(name_or_path)[1]
    weights = weights_of_head(read_weights(folder), document.get("heads"), head, folder)
    model = build_model(
        document["model"], named_in=folder / CONFIG_FILE, weights=weights, prefix="model."
    )
    terms = _terms(document, folder)
    try:
        scalar, recommended = "target" in document, checked_precision(document.get("precision"))
        potential = _scalar(model, document["target"]) if scalar else Potential(model, terms=terms)
        if isinstance(potential, Potential):
            potential.distances = KnownDistances(_shortest(document))
            if (factor := weights.get("uncertainty.energy")) is not None:
                potential.uncertainty = LastLayerUncertainty(factor.shape[-1])
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    potential.name = str(name_or_path)
    potential.precision = checked_precision(precision) or recommended
    # Before the weights: copied into float32, those of a float64 potential would be rounded.
    potential = potential.to(getattr(torch, document["dtype"]))
    load_weights(potential, weights, folder)
    potential = potential.to(dtype if dtype is not None else getattr(torch, document["dtype"]))
    return potential.to(resolve_device(device)).requires_grad_(False).eval()


def metadata_of(name_or_path: str | Path) -> dict[str, Any]:
    """Return what was kept of the training of a predictor; nothing of a committee's.

    Args:
        name_or_path: As of :func:`load_predictor`.
    """
    file = find_potential(name_or_path) / CONFIG_FILE
    return read_yaml(file).get("metadata") or {} if file.is_file() else {}


def _committee(
    members: Sequence[Potential], rescaling: dict[str, float], folder: Path
) -> MeanPotential:
    try:
        return MeanPotential(members, rescaling)
    except ValueError as error:
        raise CheckpointError(f"{folder / COMMITTEE_FILE}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by name."""
    try:
        return load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is damaged: {error}") from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Give a module the weights of a folder, all of them and no others."""
    refuse_unfit_weights(module, weights, folder / WEIGHTS_FILE)
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
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


def build_model(
    node: Any,
    *,
    named_in: str | Path = "the node",
    weights: dict[str, Tensor] | None = None,
    prefix: str = "",
) -> AtomisticModel:
    """Build a model from its node, ``{"class_path": ..., "init_args": {...}}``.

    Args:
        node: As :meth:`AtomisticModel.config` returns it, of this version of the class or an older
            one; a model inside it is a node as well.
        named_in: Where it was read, for the error.
        weights: Saved with the node; brought to the version of the class, in place.
        prefix: What the names of the weights begin with.

    Raises:
        CheckpointError: A class that is not registered, arguments it does not take, or a version
            it cannot read.
    """
    return build_registered(node, MODELS, named_in, {} if weights is None else weights, prefix)


def build_registered(
    node: Any,
    registry: Registry[T],
    where: str | Path,
    weights: dict[str, Tensor],
    prefix: str = "",
) -> T:
    """Build what a node of a folder names, its class registered, its weights fitting."""
    try:
        with FitsWeights(weights) if weights else nullcontext():
            return build(node, registry, weights, prefix)
    except RegistryError as error:
        raise CheckpointError(f"{where}: {error}") from error


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
    node = read_yaml(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(node, named_in=path)
    potential = Potential(model, AtomicReferences(scale=scale)).double()
    scatter_weights(potential)
    return potential.to(dtype).requires_grad_(False).eval()


def scatter_weights(module: nn.Module) -> None:
    """Move weights away from the zeros and ones of their initialisation, the same way each time."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.05 * noise


def build_term(node: Any, *, named_in: str | Path = "the node") -> EnergyTerm:
    """Build an additive term from its node.

    Args:
        node: As :meth:`EnergyTerm.config` returns it.
        named_in: Where it was read, for the error.

    Raises:
        CheckpointError: A class that is not registered, or arguments it does not take.
        ImportError: The term needs a package that is not installed.
    """
    return build_registered(node, TERMS, named_in, {})


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _terms(document: dict[str, Any], folder: Path) -> list[EnergyTerm]:
    nodes = document.get("terms", [])
    if not isinstance(nodes, list):
        raise CheckpointError(f"{folder / CONFIG_FILE}: terms are a list of nodes, not {nodes!r}")
    return [build_term(node, named_in=folder / CONFIG_FILE) for node in nodes]


def _shortest(document: dict[str, Any]) -> dict[str, float]:
    node = document.get("shortest_distances", {})
    if not isinstance(node, dict) or not all(
        isinstance(pair, str) and type(d) in (int, float) for pair, d in node.items()
    ):
        raise ValueError(f"shortest_distances are Å by pairs of elements, not {node!r}")
    return node


def _scalar(model: AtomisticModel, target: Any) -> ScalarPredictor:
    refuse_wrong_types(ScalarTarget.__init__, target)
    return ScalarPredictor(model, ScalarTarget(**target))


def read_document(folder: Path) -> dict[str, Any]:
    """Return what a folder's YAML says, once its version and the hash of its weights are right."""
    refuse_meta_device()
    document = read_yaml(folder / CONFIG_FILE)
    missing = {"checkpoint_version", "model", "dtype", "sha256"} - set(document)
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
