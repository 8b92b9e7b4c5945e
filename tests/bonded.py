"""Hyperedges for any structure, crystals too, so that the laws hold with them, not beside them.

Chemistry finds none in rocksalt; here distances alone decide, which no symmetry, order of atoms or
choice of the cell changes.
"""

from collections.abc import Sequence

import torch

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, RadiusGraph
from atomeq.graph.convert import Structures
from atomeq.graph.hyperedges import FUNCTIONAL_GROUP, Hyperedges

REACH = 2.68  # Å: first neighbours of every structure of the laws
MARGIN = 2e-3  # Å; more than any difference quotient moves an atom


class BondedHyperGraph:
    """Gives each pair within reach a hyperedge, and each atom with its neighbours another one.

    An image is a member like any other, so that small cells and supercells have the same.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self._edges = RadiusGraph(builder.cutoff)
        self._pairs = RadiusGraph(REACH)
        self.cutoff = builder.cutoff

    def __call__(self, structures: Structures, dtype: torch.dtype | None = None) -> AtomGraph:
        graphs = []
        many = structures if isinstance(structures, Sequence) else [structures]
        for whole in many:
            edges, pairs = (builder(whole, dtype=dtype) for builder in (self._edges, self._pairs))
            for graph, near in zip(edges.to_list(), pairs.to_list(), strict=True):
                graphs.append(graph.replace(**_hyperedges(near).fields(n_atoms=graph.n_atoms)))
        return AtomGraph.concatenate(graphs)


def _hyperedges(near: AtomGraph) -> Hyperedges:
    lengths = near.edge_vectors().norm(dim=1)
    assert bool(((lengths - REACH).abs() > MARGIN).all()), "a pair sits on the edge: change REACH"
    stars: dict[int, list[int]] = {}
    bonds = []
    for (j, i), offset in zip(near.edge_index.T.tolist(), near.cell_offsets.tolist(), strict=True):
        stars.setdefault(i, [i]).append(j)
        if i < j or (i == j and offset > [0, 0, 0]):  # each pair once
            bonds.append([i, j])
    types = [0] * len(bonds) + [FUNCTIONAL_GROUP] * len(stars)
    return Hyperedges.from_lists([*bonds, *stars.values()], types)
