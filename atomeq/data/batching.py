"""Batches by a budget of atoms, edges and structures, in an order that a seed and an epoch fix.

The sampler knows where it is, so a run that was killed goes on with the very batch it would have
seen next.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from atomeq.data.ase_files import DataError
from atomeq.graph.atom_graph import AtomGraph


class GraphDataset(Dataset[AtomGraph]):
    """Graphs in memory, each a single structure; a list of indices gives their batch.

    Args:
        graphs: Single-structure graphs with the same fields.
        name: What errors call this set.
    """

    def __init__(self, graphs: Sequence[AtomGraph], *, name: str = "data") -> None:
        self.graphs = list(graphs)
        self.name = name
        self.n_atoms = [graph.n_atoms for graph in self.graphs]
        self.n_edges = [graph.n_edges for graph in self.graphs]

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> AtomGraph:
        return self.graphs[index]

    def __getitems__(self, indices: list[int]) -> AtomGraph:
        """Return the batch of some structures; PyTorch's fetcher calls this with a whole batch."""
        return AtomGraph.concatenate([self.graphs[i] for i in indices])


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
        self._sizes = list(zip(dataset.n_atoms, dataset.n_edges, strict=True))
        self._budget = (max_atoms, max_edges)
        self._max_structures = max_structures
        self._shuffle = shuffle
        self._seed = seed
        self._rank, self._n_ranks = rank, n_ranks
        self.epoch = epoch
        self.n_skipped = 0
        # Lightning looks for `batch_sampler.sampler.set_epoch`.
        self.sampler = self
        self._refuse_oversized(dataset.name)
        self._batches = self._pack()

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of another epoch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.n_skipped = 0
            self._batches = self._pack()

    def skip(self, n_batches: int) -> None:
        """Leave out the first batches of the next iteration only: a killed run has seen them."""
        self.n_skipped = n_batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.n_skipped = self.n_skipped, 0
        yield from self._batches[start:]

    def _pack(self) -> list[list[int]]:
        order = range(len(self._sizes))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(self._sizes), generator=generator).tolist()
        batches: list[list[int]] = []
        atoms = edges = 0
        for index in order:
            n_atoms, n_edges = self._sizes[index]
            full = not batches or len(batches[-1]) >= self._max_structures
            if full or self._exceeded(atoms + n_atoms, edges + n_edges) is not None:
                batches.append([])
                atoms = edges = 0
            batches[-1].append(index)
            atoms, edges = atoms + n_atoms, edges + n_edges
        return self._share(batches)

    def _share(self, batches: list[list[int]]) -> list[list[int]]:
        if self._n_ranks == 1:
            return batches
        # Every process must take the same number of steps, or they wait for each other forever.
        missing = -len(batches) % self._n_ranks
        return (batches + batches[:missing])[self._rank :: self._n_ranks]

    def _exceeded(self, n_atoms: int, n_edges: int) -> str | None:
        for limit, size, what in zip(
            self._budget, (n_atoms, n_edges), ("atoms", "edges"), strict=True
        ):
            if limit is not None and size > limit:
                return f"{size} {what}, more than max_{what}={limit}"
        return None

    def _refuse_oversized(self, name: str) -> None:
        for index, (n_atoms, n_edges) in enumerate(self._sizes):
            exceeded = self._exceeded(n_atoms, n_edges)
            if exceeded is not None:
                raise DataError(
                    f"structure {index} of {name} alone has {exceeded}; raise the limit in the "
                    "data section, or leave the structure out"
                )


class ResumableLoader(DataLoader[AtomGraph]):
    """A loader that Lightning can save in the middle of an epoch and restore to the next batch.

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
        collate_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=collate_fn if collate_fn is not None else _identity,
            generator=torch.Generator().manual_seed(seed),
        )
        self._n_yielded = 0

    def __iter__(self) -> Iterator[AtomGraph]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert isinstance(self.batch_sampler, BudgetBatchSampler)
        self._n_yielded = self.batch_sampler.n_skipped
        for batch in super().__iter__():
            self._n_yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were given out."""
        assert isinstance(self.batch_sampler, BudgetBatchSampler)
        return {"epoch": self.batch_sampler.epoch, "n_batches": self._n_yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were given out, if it is still their epoch."""
        assert isinstance(self.batch_sampler, BudgetBatchSampler)
        if state["epoch"] == self.batch_sampler.epoch:
            self.batch_sampler.skip(state["n_batches"])
            self._n_yielded = state["n_batches"]


def _identity(batch: AtomGraph) -> AtomGraph:
    return batch
