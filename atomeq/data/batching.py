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

from atomeq.data.ase_files import ELECTRIC_SHAPES, DataError
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder

_N_SAMPLED = 1000
LABELS = ("energy", "forces", "stress", "scalar", *ELECTRIC_SHAPES)


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

        Its ``dataset_index`` (n_graphs,) says which they are. No structures are one without labels,
        weight and index: a process whose share is empty computes something, for others wait for it.
        """
        if indices:
            return self._batch(indices).replace(dataset_index=torch.tensor(indices))
        graph = self._batch([0])
        unknown = {key: torch.full_like(graph[key], float("nan")) for key in LABELS if key in graph}
        return graph.replace(
            **unknown, weight=graph.pos.new_zeros(1), dataset_index=torch.tensor([-1])
        )

    def _batch(self, indices: Sequence[int]) -> AtomGraph:
        return AtomGraph.concatenate([self.graphs[i] for i in indices])

    def place(self, index: int) -> str:
        """Return where a structure came from: file and frame, if they are known."""
        return self._places[index] if self._places else f"structure {index} of {self.name}"


class DatasetOnDisk(GraphDataset):
    """Structures that are read, and given their edges, when a batch is asked for."""

    builder: GraphBuilder
    structures_of: str  # what errors call them

    def __getitem__(self, index: int) -> AtomGraph:
        return self.__getitems__([index])

    @property
    def n_edges(self) -> Sequence[int] | NDArray[np.int64]:
        """Not known before the graphs are built.

        Raises:
            DataError: Always.
        """
        raise DataError(
            f"{self.name}: the edges of {self.structures_of} are not known before a batch is "
            "built; bound batches with data.max_atoms instead of data.max_edges"
        )

    def _sampled(self) -> list[int]:
        """Return up to 1,000 indices, evenly spread: what references and scales are fitted to."""
        return np.unique(np.linspace(0, len(self) - 1, _N_SAMPLED).round().astype(int)).tolist()

    def _with_edges(self, graph: AtomGraph, places: str) -> AtomGraph:
        try:
            return self.builder(graph)
        except ValueError as error:
            raise DataError(f"{places}: {error}") from error


class BudgetBatchSampler(Sampler[list[int]]):
    """Yields lists of structures that together stay within the budgets.

    Several processes have one batch together, within so many times the budgets: that of one process
    with these budgets. It is shared out so that each has about as many edges, or atoms where edges
    are not known; a share may be above a budget by less than a structure. Every structure is in one
    share, and the shares of the last batch may be empty.

    Args:
        dataset: The structures, whose sizes are counted.
        max_structures: Structures per batch.
        max_atoms: Atoms per batch; None is no limit.
        max_edges: Edges per batch; None is no limit.
        shuffle: Permute by ``seed`` and epoch; else keep the order of the file.
        seed: Of the permutation.
        epoch: The first epoch to draw.
        rank: Which of the processes this is.
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
            what: (limit * n_ranks, np.asarray(getattr(dataset, f"n_{what}"), dtype=np.int64))
            for what, limit in (("atoms", max_atoms), ("edges", max_edges))
            if limit is not None
        }
        self._n_structures = len(dataset)
        self._max_structures = max_structures * n_ranks
        self._shuffle = shuffle
        self._seed = seed
        self._rank, self._n_ranks = rank, n_ranks
        self._costs = _costs(dataset) if n_ranks > 1 else np.zeros(0)
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
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        first, self.n_skipped = self.n_skipped, 0
        for batch in range(first, len(self)):
            start = self._ends[batch - 1] if batch else 0
            yield self._share(self._order[start : self._ends[batch]])

    def _share(self, batch: NDArray[np.int64]) -> list[int]:
        """Return what of a batch is this process's: the largest first, to who has least so far."""
        if self._n_ranks == 1:
            return batch.tolist()
        load = np.zeros(self._n_ranks)
        share: list[int] = []
        for k in batch[np.argsort(-self._costs[batch], kind="stable")]:
            least = int(load.argmin())
            load[least] += self._costs[k]
            if least == self._rank:
                share.append(int(k))
        return share

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
        for what, (joint, sizes) in self._budgets.items():
            limit = joint // self._n_ranks
            if (sizes > limit).any():
                index = int(np.argmax(sizes > limit))
                raise DataError(
                    f"structure {index} of {name} alone has {sizes[index]} {what}, more than "
                    f"max_{what}={limit}; raise the limit in the data section, or leave the "
                    "structure out"
                )


def _costs(dataset: GraphDataset) -> NDArray[np.int64]:
    """Return what each structure costs: its edges, its atoms, or as much as any other."""
    for sizes in ("n_edges", "n_atoms"):
        try:
            # An atom without neighbours costs something as well.
            return 1 + np.asarray(getattr(dataset, sizes), dtype=np.int64)
        except DataError:
            continue
    return np.ones(len(dataset), dtype=np.int64)


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
