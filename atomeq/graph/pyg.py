"""AtomGraphs as PyG's Data and back, for its Batch and DataLoader; only here is PyG's Data known.

Importing PyG takes longer than importing torch, so this module is imported by those who ask for it.
"""

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.storage import GlobalStorage

from atomeq.graph.atom_graph import AtomGraph


def to_pyg(graph: AtomGraph) -> "AtomData":
    """Return a graph as PyG's Data, which its Batch and DataLoader join.

    They give the numbers of :meth:`AtomGraph.concatenate` where all graphs have the same fields.

    Args:
        graph: Of one structure or a batch.

    Example:
        >>> water = AtomGraph(torch.rand(3, 3), torch.tensor([8, 1, 1]))
        >>> batch = Batch.from_data_list([to_pyg(water), to_pyg(water)])  # doctest: +SKIP
    """
    return AtomData(**graph.to_dict())


def from_pyg(data: Data) -> AtomGraph:
    """Return the graph of a PyG Data or Batch.

    Args:
        data: With ``pos`` and ``atomic_numbers``; of other fields, the tensors are taken.

    Raises:
        ValueError: The shapes contradict each other.
    """
    fields = {name: value for name, value in data.to_dict().items() if name != "ptr"}
    return AtomGraph(**{name: value for name, value in fields.items() if isinstance(value, Tensor)})


class _AtomStorage(GlobalStorage):
    @property
    def can_infer_num_nodes(self) -> bool:
        # PyG's collate would write over `batch` and count a graph of many structures as one;
        # with False it collates our own `batch` through __inc__.
        return False


class AtomData(Data):
    """The fields of an AtomGraph, which PyG joins as :meth:`AtomGraph.concatenate` does.

    Args:
        fields: Tensors by name.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        vars(self)["_store"] = _AtomStorage(_parent=self)
        for name, value in fields.items():
            self[name] = value

    def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> int:
        """Return the dimension along which PyG joins a field."""
        return -1 if key in ("edge_index", "hyperedge_index") else 0

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what PyG adds to a field of the next graph in a batch."""
        if key == "batch":
            return len(self["natoms"])
        if key == "edge_index":
            return len(self["pos"])
        if key == "hyperedge_index":
            return torch.tensor([[len(self["pos"])], [int(self["num_hyperedges"].sum())]])
        return 0
