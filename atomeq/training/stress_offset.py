"""The part of stress labels that is no derivative of the energies: plane waves' Pulay pressure."""

import torch

from atomeq.graph.atom_graph import AtomGraph


def without_offset(batch: AtomGraph, offset: float) -> AtomGraph:
    """Return a batch with the stress labels of its energies.

    Args:
        batch: With labels, or without.
        offset: Pressure on the diagonal of its stress labels, eV/Å³.
    """
    if batch.get("stress") is None or not offset:
        return batch
    identity = torch.eye(3, dtype=batch.stress.dtype, device=batch.stress.device)
    return batch.replace(stress=batch.stress - offset * identity)
