"""Batches by a budget of atoms, edges and structures, in an order that a seed and an epoch fix.

The sampler knows where it is, so a run that was killed goes on with the very batch it would have
seen next.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from atomeq.data.ase_files import DataError
from atomeq.graph.atom_graph import AtomGraph

LABELS = ("energy", "forces", "stress", "scalar")


class GraphDataset(Dataset[AtomGraph]):
    """Graphs in memory, each a single structure; a list of indices gives their batch.

    Args:
        graphs: Single-structure graphs with the same fields.
        name: What errors call this set.
        places: Where each structure came from.
    """

    def __init__(
        self, graphs: Sequence[AtomGraph], *, name: str = "data", places: Sequence[str] = ()
    ) -> None:
        self.graphs = list(graphs)
        self.name = name
        self._places = list(places)

    @property
    def n_atoms(self) -> Sequence[int] | NDArray[np.int64]:
        """Atoms of each structure."""
        return [graph.n_atoms for graph in self.graphs]

    @property
    def n_edges(self) -> Sequence[int] | NDArray[np.int64]:
        """Edges of each structure."""
        return [graph.n_edges for graph in self.graphs]

    @property
    def labels(self) -> set[str]:
        """The labels that at least one of the structures has."""
        return known_labels(self.graphs)

    @property
    def elements(self) -> list[int]:
        """The atomic numbers that occur, ascending."""
        return sorted({int(z) for graph in self.graphs for z in graph.atomic_numbers.unique()})

    def sample(self) -> Sequence[AtomGraph]:
        """Return what references and scales are fitted to: here all structures."""
        return self.graphs

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> AtomGraph:
        return self.graphs[index]

    def __getitems__(self, indices: list[int]) -> AtomGraph:
        """Return the batch of some structures; PyTorch's fetcher calls this with a whole batch.

        Its ``dataset_index`` (n_graphs,) says which they are.
        """
        return self._batch(indices).replace(dataset_index=torch.tensor(indices))

    def _batch(self, indices: Sequence[int]) -> AtomGraph:
        return AtomGraph.concatenate([self.graphs[i] for i in indices])

    def place(self, index: int) -> str:
        """Return where a structure came from: file and frame, if they are known."""
        return self._places[index] if self._places else f"structure {index} of {self.name}"


class BudgetBatchSampler(Sampler[list[int]]):
    """Yields lists of structures that together stay within the budgets.

    Args:
        dataset: The structures, whose sizes are counted.
        max_structures: Structures per batch.
        max_atoms: Atoms per batch; None is no limit.
        max_edges: Edges per batch; None is no limit.
        shuffle: Permute by ``seed`` and epoch; else keep the order of the file.
        seed: Of the permutation.
        epoch: The first epoch to draw.
        rank: Which of the processes this is; each takes every ``n_ranks``-th batch.
        n_ranks: Number of processes.

    Raises:
        DataError: One structure alone exceeds a budget.
    """

    def __init__(
        self,
        dataset: GraphDataset,
        *,
        max_structures: int = 32,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        self._budgets = {
            what: (limit, np.asarray(getattr(dataset, f"n_{what}"), dtype=np.int64))
            for what, limit in (("atoms", max_atoms), ("edges", max_edges))
            if limit is not None
        }
        self._n_structures = len(dataset)
        self._max_structures = max_structures
        self._shuffle = shuffle
        self._seed = seed
        self._rank, self._n_ranks = rank, n_ranks
        self.epoch = epoch
        self.n_skipped = 0
        # Lightning looks for `batch_sampler.sampler.set_epoch`.
        self.sampler = self
        self._refuse_oversized(dataset.name)
        self._pack()

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of another epoch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.n_skipped = 0
            self._pack()

    def skip(self, n_batches: int) -> None:
        """Leave out the first batches of the next iteration only: a killed run has seen them."""
        self.n_skipped = n_batches

    def __len__(self) -> int:
        n_batches = len(self._ends)
        return -(-n_batches // self._n_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        first, self.n_skipped = self.n_skipped, 0
        n_batches = len(self._ends)
        for k in range(first, len(self)):
            # Every process must take the same number of steps, or they wait for each other forever:
            # the first batches come again where the last round is not full.
            batch = (k * self._n_ranks + self._rank) % n_batches
            start = self._ends[batch - 1] if batch else 0
            yield self._order[start : self._ends[batch]].tolist()

    def _pack(self) -> None:
        """Set the order of the structures and where in it each batch ends.

        Arrays, not lists of lists: OC20 has 134 million structures.
        """
        self._order = np.arange(self._n_structures)
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
            self._order = torch.randperm(self._n_structures, generator=generator).numpy()
        totals = [
            (limit, np.concatenate(([0], np.cumsum(sizes[self._order]))))
            for limit, sizes in self._budgets.values()
        ]
        ends: list[int] = []
        start = 0
        while start < self._n_structures:
            end = min(start + self._max_structures, self._n_structures)
            for limit, total in totals:
                end = min(end, int(np.searchsorted(total, total[start] + limit, side="right")) - 1)
            ends.append(end)
            start = end
        self._ends = np.array(ends, dtype=np.int64)

    def _refuse_oversized(self, name: str) -> None:
        for what, (limit, sizes) in self._budgets.items():
            if (sizes > limit).any():
                index = int(np.argmax(sizes > limit))
                raise DataError(
                    f"structure {index} of {name} alone has {sizes[index]} {what}, more than "
                    f"max_{what}={limit}; raise the limit in the data section, or leave the "
                    "structure out"
                )


class ResumableLoader:
    """A loader that Lightning can save in the middle of an epoch and restore to the next batch.

    It holds a PyTorch loader and is none itself: Lightning would build a DataLoader anew with a
    sampler of its own, to predict or to train on several devices, which ours does by itself.

    Args:
        dataset: The structures.
        batch_sampler: Which of them come together.
        num_workers: Processes that concatenate batches; 0 does it in the training process.
        seed: Of the workers; the global random state is left alone.
    """

    def __init__(
        self,
        dataset: GraphDataset,
        batch_sampler: BudgetBatchSampler,
        *,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.batch_sampler = batch_sampler
        self._loader = DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            generator=torch.Generator().manual_seed(seed),
        )
        self._n_yielded = 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[AtomGraph]:
        self._n_yielded = self.batch_sampler.n_skipped
        for batch in self._loader:
            self._n_yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were given out."""
        return {"epoch": self.batch_sampler.epoch, "n_batches": self._n_yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were given out, if it is still their epoch."""
        if state["epoch"] == self.batch_sampler.epoch:
            self.batch_sampler.skip(state["n_batches"])
            self._n_yielded = state["n_batches"]


def _identity(batch: Any) -> Any:
    return batch  # __getitems__ has joined it


def known_labels(graphs: Iterable[AtomGraph]) -> set[str]:
    """Return the labels that at least one of the graphs has."""
    return {
        key
        for graph in graphs
        for key in LABELS
        if key in graph and bool(torch.isfinite(graph[key]).any())
    }
