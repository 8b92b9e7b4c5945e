"""OC20's metrics as published (arXiv:2010.09990), on free atoms: S2EF, IS2RE and IS2RS.

The sums are kept in float64 and each structure or free atom counts once, however it is batched.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.ops.segment.operations import segment_sum
from atomeq.training.metrics import ErrorMetric
from atomeq.typing import PropertyKey

#: eV; a system whose energy is nearer to DFT's counts in EwT and EFwT.
ENERGY_THRESHOLD = 0.02
#: eV/Å; in EFwT every force component of every free atom must be nearer.
FORCE_THRESHOLD = 0.03
#: Å; ADwT is the mean over these of the share of systems whose atoms are nearer on average.
DISTANCE_THRESHOLDS = np.arange(0.01, 0.5, 0.001)

_EPSILON = 1e-8  # of PyTorch's cosine similarity, which the published metric is


class OC20Errors(ErrorMetric):
    """Errors of S2EF and IS2RE predictions.

    Energies: ``energy_mae`` [eV], ``energy_mse`` [eV²], ``ewt``, the share of systems within
    0.02 eV. Forces of free atoms: ``forces_mae`` [eV/Å, components] and ``forcesx_mae`` and so on,
    ``forces_cosine`` and ``forces_magnitude_error`` [eV/Å] per atom, ``efwt``, the share of systems
    within 0.02 eV and 0.03 eV/Å in every component. Structures without a label do not count.
    """

    full_state_update = False

    columns: Mapping[str, tuple[str, str]] = {
        "energy_mae": ("energy MAE", "eV"),
        "ewt": ("EwT", "share"),
        "forces_mae": ("force MAE", "eV/Å"),
        "forces_cosine": ("force cosine", ""),
        "forces_magnitude_error": ("force magnitude", "eV/Å"),
        "efwt": ("EFwT", "share"),
    }
    _energy_terms = ("energy_mae", "energy_mse", "ewt")
    _force_terms = (
        "forcesx_mae",
        "forcesy_mae",
        "forcesz_mae",
        "forces_cosine",
        "forces_magnitude_error",
    )

    def __init__(self) -> None:
        super().__init__()
        counts = ("n_energies", "n_atoms", "n_systems")
        for name in (*self._energy_terms, *self._force_terms, "efwt", *counts):
            self.add_state(
                f"sum_{name}",
                default=torch.zeros((), dtype=torch.float64),
                dist_reduce_fx="sum",
            )

    def update(self, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph) -> None:
        """Add a batch.

        Args:
            prediction: ``energy`` and ``forces`` from the potential; what has no label is left out.
            graph: The batch with its labels, and ``fixed`` where atoms are.
        """
        energy_error = _energy_error(prediction, graph)
        if energy_error is not None:
            known = torch.isfinite(energy_error)
            error = energy_error[known].abs()
            self._add("n_energies", known)
            self._add("energy_mae", error)
            self._add("energy_mse", error.square())
            self._add("ewt", error < ENERGY_THRESHOLD)
        if "forces" not in prediction or "forces" not in graph:
            return
        predicted, label = prediction["forces"].detach().double(), graph.forces.double()
        free = free_atoms(graph) & torch.isfinite(label).all(dim=1)
        self._add_forces(predicted[free], label[free])
        if energy_error is not None:
            self._add_within(energy_error, (predicted - label).abs().amax(dim=1), free, graph.batch)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of what was added; labels that never occurred are absent."""
        results: dict[str, Tensor] = {}
        groups = (
            ("n_energies", self._energy_terms),
            ("n_atoms", self._force_terms),
            ("n_systems", ("efwt",)),
        )
        for counted, terms in groups:
            count = getattr(self, f"sum_{counted}")
            if count > 0:
                results.update({name: getattr(self, f"sum_{name}") / count for name in terms})
        if "forcesx_mae" in results:
            components = torch.stack([results[f"forces{axis}_mae"] for axis in "xyz"])
            results["forces_mae"] = components.mean()
        return results

    def _add_forces(self, predicted: Tensor, label: Tensor) -> None:
        self._add("n_atoms", torch.ones(len(label)))
        for axis, error in zip("xyz", (predicted - label).abs().unbind(dim=1), strict=True):
            self._add(f"forces{axis}_mae", error)
        cosine = torch.nn.functional.cosine_similarity(predicted, label, dim=1, eps=_EPSILON)
        self._add("forces_cosine", cosine)
        lengths = predicted.norm(dim=1) - label.norm(dim=1)
        self._add("forces_magnitude_error", lengths.abs())

    def _add_within(
        self, energy_error: Tensor, force_error: Tensor, free: Tensor, batch: Tensor
    ) -> None:
        far = free & ~(force_error < FORCE_THRESHOLD)
        n_systems = len(energy_error)
        n_far = segment_sum(far.double(), batch, n_systems)
        n_free = segment_sum(free.double(), batch, n_systems)
        counted = torch.isfinite(energy_error) & (n_free > 0)
        self._add("n_systems", counted)
        self._add("efwt", counted & (energy_error.abs() < ENERGY_THRESHOLD) & (n_far == 0))

    def _add(self, name: str, values: Tensor) -> None:
        state = getattr(self, f"sum_{name}")
        setattr(self, f"sum_{name}", state + values.double().sum().to(state.device))


def free_atoms(graph: AtomGraph) -> Tensor:
    """Return the mask (n_atoms,) of atoms that may move: all where the graph fixes none."""
    if "fixed" in graph:
        return ~graph["fixed"].bool()
    return torch.ones(graph.n_atoms, dtype=torch.bool, device=graph.pos.device)


def _energy_error(prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph) -> Tensor | None:
    if "energy" not in prediction or "energy" not in graph:
        return None
    return prediction["energy"].detach().double() - graph.energy.double()


def mean_distance(
    positions: NDArray[np.float64], reference: NDArray[np.float64], cell: NDArray[np.float64]
) -> float:
    """Return how far atoms are from where they should be on average, Å, by the nearest image.

    Args:
        positions: (n_atoms, 3), Å; free atoms only.
        reference: (n_atoms, 3), Å.
        cell: (3, 3), Å; periodic in all directions.
    """
    scaled = (positions - reference) @ np.linalg.inv(cell)
    scaled -= np.round(scaled)
    return float(np.linalg.norm(scaled @ cell, axis=1).mean())


def average_distance_within_threshold(distances: Sequence[float]) -> float:
    """Return ADwT: the mean over :data:`DISTANCE_THRESHOLDS` of the share of systems within it.

    Args:
        distances: :func:`mean_distance` of each system, Å.

    Raises:
        ValueError: There are none.
    """
    if not len(distances):
        raise ValueError("ADwT of no systems is not defined")
    within = np.asarray(distances)[:, None] < DISTANCE_THRESHOLDS
    return float(within.mean())
