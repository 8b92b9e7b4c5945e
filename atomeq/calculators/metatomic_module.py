"""The module that metatomic's engines call; TorchScript reads its source and its annotations."""

from typing import Dict, List, Optional  # noqa: UP035 - metatomic compares annotations with these

import torch
from metatensor.torch import (  # pyright: ignore[reportMissingImports]
    Labels,
    TensorBlock,
    TensorMap,
)
from metatomic.torch import (  # pyright: ignore[reportMissingImports]
    ModelOutput,
    NeighborListOptions,
    System,
)
from torch import Tensor, nn

# ruff: noqa: UP006, UP045


class EnergyModel(nn.Module):
    """Systems become one graph; energies of its atoms become what was asked for.

    Args:
        network: From the fields of a graph to energies of its atoms, eV.
        neighbors: The neighbours that it wants, each pair from both of its ends.
    """

    def __init__(self, network: torch.jit.ScriptModule, neighbors: NeighborListOptions) -> None:
        super().__init__()
        self.network = network
        self.neighbors = neighbors

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:
        """Return which neighbours are wanted."""
        return [self.neighbors]

    def forward(
        self,
        systems: List[System],
        outputs: Dict[str, ModelOutput],
        selected_atoms: Optional[Labels],
    ) -> Dict[str, TensorMap]:
        """Return the energies of each system or of each atom, those of selected atoms alone."""
        results: Dict[str, TensorMap] = {}
        if "energy" not in outputs:
            return results
        device = systems[0].positions.device
        counts = torch.tensor([len(system) for system in systems], device=device)
        starts = torch.cumsum(counts, 0) - counts
        batch = torch.repeat_interleave(torch.arange(len(systems), device=device), counts)
        values = self.energies(systems, counts, batch)
        samples = torch.stack([batch, torch.arange(len(batch), device=device) - starts[batch]])
        names = ["system", "atom"]
        if selected_atoms is not None:
            samples = selected_atoms.values.to(torch.int64).T
            values = values[starts[samples[0]] + samples[1]]
        if outputs["energy"].sample_kind != "atom":
            names = ["system"]
            values = torch.zeros_like(counts, dtype=values.dtype).index_add(0, samples[0], values)
            samples = torch.arange(len(systems), device=device)[None]
        zero = torch.zeros(1, 1, dtype=torch.int32, device=device)
        no_components: List[Labels] = []
        block = TensorBlock(
            values[:, None],
            Labels(names, samples.T.to(torch.int32)),
            no_components,
            Labels(["energy"], zero),
        )
        results["energy"] = TensorMap(Labels(["_"], zero), [block])
        return results

    def energies(self, systems: List[System], counts: Tensor, batch: Tensor) -> Tensor:
        """Return the energies of the atoms of all systems, (n_atoms,), eV.

        Args:
            systems: With their neighbours; positions are float64, Å.
            counts: Atoms of each, (n_systems,).
            batch: The system of each atom, (n_atoms,).
        """
        ends: List[Tensor] = []
        images: List[Tensor] = []
        start = 0
        for system in systems:
            pairs = system.get_neighbor_list(self.neighbors).samples.values.to(torch.int64)
            pairs = pairs[torch.argsort(pairs[:, 0], stable=True)]  # by their targets
            ends.append(torch.stack([pairs[:, 1], pairs[:, 0]]) + start)
            images.append(pairs[:, 2:])
            start += len(system)
        return self.network(
            torch.cat([system.positions for system in systems]),
            torch.cat([system.types for system in systems]).to(torch.int64),
            torch.stack([system.cell for system in systems]),
            torch.stack([system.pbc for system in systems]),
            torch.cat(ends, dim=1),
            torch.cat(images),
            counts,
            batch,
        )
