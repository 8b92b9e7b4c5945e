"""The two layouts of golden cases on disk, and what their checkers share.

A folder with ``case.json``, ``inputs``, ``weights``, ``outputs_f64`` and ``outputs_f32``, or a
``CASE.json`` with everything in one ``CASE.safetensors`` beside it.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from checkers.report import Report

SUFFIXES = {torch.float64: "f64", torch.float32: "f32"}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes:
        path: The JSON file.
        document: What it holds; ``config`` has the constructor arguments of the reference.
    """

    path: Path
    document: Any
    tolerances: ClassVar[Mapping[torch.dtype, float]]

    @classmethod
    def read(cls, path: Path) -> "Case":
        """Read a case in the layout that its file's name tells."""
        layout = FolderCase if path.name == "case.json" else FileCase
        return layout(path, json.loads(path.read_text(encoding="utf-8")))

    @property
    def title(self) -> str:
        """Name of the case in tables."""
        raise NotImplementedError

    @property
    def model(self) -> str:
        """Name of the model; the folder names a case whose JSON does not."""
        named = self.document.get("model") if isinstance(self.document, dict) else None
        return str(named or self.path.parent.name)

    @property
    def family(self) -> str:
        """First word of the model's name."""
        return self.model.split("_")[0]

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments of the reference."""
        return self.document["config"]

    def expected(self, dtype: torch.dtype) -> Tensors:
        """Return what the reference computed in a dtype: ``out.*``, ``mid.*`` and gradients."""
        raise NotImplementedError

    def noise(self, name: str) -> float:
        """Return the largest difference between float32 and float64 in the reference itself."""
        return 0.0


class FolderCase(Case):
    """A folder of case.json, inputs, weights and outputs; float32 is as good as 1e-4."""

    tolerances = {torch.float64: 1e-8, torch.float32: 1e-4}  # noqa: RUF012

    @property
    def folder(self) -> Path:
        """Where the files of the case lie."""
        return self.path.parent

    @property
    def title(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @cached_property
    def inputs(self) -> Tensors:
        """Structures and edges, as the reference had them."""
        return load_file(self.folder / "inputs.safetensors")

    def weights(self) -> Tensors:
        """Return the reference's state_dict, float32."""
        return load_file(self.folder / "weights.safetensors")

    def expected(self, dtype: torch.dtype) -> Tensors:
        """Return what the reference computed; ``in.*`` are its inputs in this dtype."""
        return load_file(self.folder / f"outputs_{SUFFIXES[dtype]}.safetensors")

    def graph(self) -> AtomGraph:
        """Return the structures with the very edges of the reference."""
        given = self.inputs
        return AtomGraph(
            pos=given["pos"].double(),
            atomic_numbers=given["atomic_numbers"].long(),
            cell=given["cell"].double(),
            pbc=given["pbc"].bool(),
            edge_index=given["edge_index"].long(),
            cell_offsets=given["cell_offsets"].round().long(),
            batch=given["batch"].long(),
            natoms=given["natoms"].long(),
        )


class FileCase(Case):
    """CASE.json beside CASE.safetensors, or alone where no tensors are needed."""

    tolerances = {torch.float64: 1e-8, torch.float32: 1e-5}  # noqa: RUF012

    @property
    def title(self) -> str:
        """Names of the folder and the file."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def tensors(self) -> Tensors:
        """Everything in the safetensors file under its full name."""
        file = self.path.with_suffix(".safetensors")
        return load_file(file) if file.exists() else {}

    def weights(self, dtype: torch.dtype) -> Tensors:
        """Return the reference's state_dict."""
        return self._with_prefix("param.", dtype)

    def inputs(self, dtype: torch.dtype) -> Tensors:
        """Return the inputs by name without ``in.``; integers stay integers."""
        return self._with_prefix("in.", dtype)

    def expected(self, dtype: torch.dtype) -> Tensors:
        """Return out.*, mid.*, grad.in.* and gradparam.* of a dtype, names without its suffix."""
        suffix = f".{SUFFIXES[dtype]}"
        found = {k: v for k, v in self.tensors.items() if k.endswith(suffix)}
        return {name.removesuffix(suffix): tensor for name, tensor in found.items()}

    def noise(self, name: str) -> float:
        """Return what the JSON says of the reference's rounding."""
        return float(self.document.get("official_f32_minus_f64_maxabs", {}).get(name, 0.0))

    def _with_prefix(self, prefix: str, dtype: torch.dtype) -> Tensors:
        return {
            name.removeprefix(prefix): tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and not name.endswith(tuple(SUFFIXES.values()))
        }


def compare_all(
    case: Case,
    report: Report,
    ours: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    without: Collection[str] = (),
) -> None:
    """Compare everything the reference computed.

    What ``ours`` lacks fails the case, but for the intermediates of a :class:`FolderCase`, which
    are noted: the reference's modules are not all ours.

    Args:
        case: With what the reference computed.
        report: Where deviations go.
        ours: By the names of the case.
        dtype: Of this run.
        without: Names that mean nothing in this case.
    """
    for name, theirs in case.expected(dtype).items():
        if name.startswith("in.") or name in without:
            continue
        if name in ours:
            noise = case.noise(name) if dtype == torch.float32 else 0.0
            report.compare(name, ours[name], theirs, dtype, noise=noise)
        elif isinstance(case, FolderCase) and not name.startswith("out."):
            if dtype == torch.float64:
                report.notes.append(f"{name} has no counterpart here and was not compared")
        else:
            report.fail(f"{name} was not computed")


def probe_loss(outputs: Iterable[Tensor], *, target: Tensor | None = None) -> Tensor:
    """Return the loss that the gradients of file cases were taken of.

    Args:
        outputs: Float outputs in the order of ``document["outputs"]``.
        target: ``in.x_target``: then it is the mean squared error of the first output.
    """
    outputs = list(outputs)
    if target is not None:
        return ((outputs[0] - target) ** 2).mean()
    terms = []
    for output in outputs:
        index = torch.arange(output.numel(), dtype=output.dtype)
        terms.append((output * torch.cos(index).view(output.shape)).sum())
    return torch.stack(terms).sum()


def gradients(loss: Tensor, of: Mapping[str, Tensor]) -> Tensors:
    """Return d loss / d tensor by name, zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(of.values()), materialize_grads=True, retain_graph=True)
    return dict(zip(of, found, strict=True))
