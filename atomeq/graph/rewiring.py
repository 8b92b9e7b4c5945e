"""Graphs made from graphs: in batches, without subsurface atoms, in many orientations at once."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph

Orientations = Float[Tensor, "n_copies n_graphs 3 3"]

_LABELS = ("energy", "forces", "stress", "weight")
_ROW_VECTORS = ("pos", "velocities")


def in_batches(graphs: Iterable[AtomGraph], max_edges: int) -> Iterator[AtomGraph]:
    """Yield graphs joined in their order to batches of so many edges; a larger one goes alone."""
    waiting: list[AtomGraph] = []
    n_edges = 0
    for graph in graphs:
        if waiting and n_edges + graph.n_edges > max_edges:
            yield AtomGraph.concatenate(waiting)
            waiting, n_edges = [], 0
        waiting.append(graph)
        n_edges += graph.n_edges
    if waiting:
        yield AtomGraph.concatenate(waiting)


def without_tag_0(graph: AtomGraph) -> tuple[AtomGraph, Bool[Tensor, " n_atoms"]]:
    """Drop the subsurface atoms of OC20's slabs and all edges that touch them.

    They are fixed in OC20 and make most of the atoms, so that a model without them is several times
    faster ("remove-tag-0", Duval et al., PhAST, arXiv:2211.12020).

    Args:
        graph: With ``tags``: 0 subsurface, 1 surface, 2 adsorbate.

    Returns:
        The smaller graph, without labels, and which atoms (n_atoms,) are in it.

    Raises:
        ValueError: The graph has no tags, or nothing of a structure would be left.
    """
    if "tags" not in graph:
        raise ValueError(
            "remove-tag-0 needs tags, and this graph has none; set them with atoms.set_tags() "
            "(0 subsurface, 1 surface, 2 adsorbate) or turn remove_tag_0 off"
        )
    kept = graph.tags != 0
    natoms = torch.zeros_like(graph.natoms).index_add(0, graph.batch, kept.to(graph.natoms.dtype))
    empty = torch.nonzero(natoms == 0).flatten().tolist()
    if empty:
        raise ValueError(f"structure {empty[0]} has only atoms with tag 0: none would be left")
    number = kept.cumsum(0) - 1
    source, target = graph.edge_index
    edges = kept[source] & kept[target]
    smaller = AtomGraph(
        graph.pos[kept],
        graph.atomic_numbers[kept],
        cell=graph.cell,
        pbc=graph.pbc,
        natoms=natoms,
        edge_index=number[graph.edge_index[:, edges]],
        cell_offsets=graph.cell_offsets[edges],
        tags=graph.tags[kept],
        electronic_state=graph.get("electronic_state"),
    )
    return smaller, kept


def oriented_copies(graph: AtomGraph, orientations: Orientations) -> AtomGraph:
    """Return a batch with every structure in several orientations: x -> x R, cell -> cell R.

    Edges are those of the graph: distances do not change, so nothing is searched again.

    Args:
        graph: Structures with or without edges.
        orientations: Orthogonal matrices R, (n_copies, n_graphs, 3, 3).

    Returns:
        All structures in their first orientation, then all in their second, and so on; without
        labels.
    """
    n_copies = len(orientations)
    matrices = orientations.to(graph.pos.dtype)
    copies = AtomGraph()
    for name, value in graph.to_dict().items():
        if name in _LABELS:
            continue
        if name in _ROW_VECTORS:
            turned = torch.einsum("ai,kaij->kaj", value, matrices[:, graph.batch])
            value = turned.reshape(-1, 3)
        elif name == "cell":
            value = torch.einsum("gci,kgij->kgcj", value, matrices).reshape(-1, 3, 3)
        elif name in ("edge_index", "hyperedge_index", "batch"):
            value = _shifted(graph, name, value, n_copies)
        else:
            value = value.repeat(n_copies, *(1 for _ in value.shape[1:]))
        copies[name] = value
    return copies


def _shifted(graph: AtomGraph, name: str, value: Tensor, n_copies: int) -> Tensor:
    steps = [graph.n_graphs if name == "batch" else graph.n_atoms]
    if name == "hyperedge_index":
        steps.append(int(graph.num_hyperedges.sum()))
    copy = torch.arange(n_copies, device=value.device)
    shift = torch.stack([copy * step for step in steps], dim=-1)  # (n_copies, 1 or 2)
    if name == "batch":
        return (value + shift).reshape(-1)
    return (value[:, None] + shift.mT[..., None].expand(2, -1, 1)).reshape(2, -1)


def views_of_atoms(
    graph: AtomGraph,
    atoms: Int[Tensor, " n_views"],
    orientations: Float[Tensor, "n_views 3 3"],
    *,
    num_hops: int | None = None,
) -> tuple[AtomGraph, Int[Tensor, " n_views"]]:
    """Return a batch with what single atoms see of their structures, each in an orientation.

    Args:
        graph: Structures with edges.
        atoms: Who looks, in each view.
        orientations: Orthogonal matrices R, x -> x R.
        num_hops: How many edges away an atom may be; None for any number.

    Returns:
        The views as structures of their own, without labels, and which of their atoms looks.

    Raises:
        ValueError: The graph has hyperedges, which are not followed.
    """
    if "hyperedge_index" in graph:
        raise ValueError("views of atoms do not follow hyperedges; use frames of whole structures")
    seen = _within_hops(graph, num_hops)[atoms]  # (n_views, n_atoms)
    view, member = torch.nonzero(seen, as_tuple=True)
    place = torch.zeros_like(seen, dtype=torch.int64)
    place[view, member] = torch.arange(len(view), device=view.device)
    source, target = graph.edge_index
    edge_view, edge = torch.nonzero(seen[:, source] & seen[:, target], as_tuple=True)
    structure = graph.batch[atoms]
    matrices = orientations.to(graph.pos.dtype)
    from_looker = graph.pos.index_select(0, member) - graph.pos.index_select(0, atoms[view])
    views = AtomGraph(
        torch.einsum("ai,aij->aj", from_looker, matrices.index_select(0, view)),
        graph.atomic_numbers[member],
        cell=graph.cell.index_select(0, structure) @ matrices,
        pbc=graph.pbc[structure],
        natoms=seen.sum(dim=1),
        edge_index=torch.stack([place[edge_view, source[edge]], place[edge_view, target[edge]]]),
        cell_offsets=graph.cell_offsets[edge],
        tags=graph.tags[member] if "tags" in graph else None,
        **{
            name: graph[name].index_select(0, structure)
            for name in ("charge", "multiplicity", "electronic_state")
            if name in graph
        },
    )
    return views, place[torch.arange(len(atoms), device=atoms.device), atoms]


def _within_hops(graph: AtomGraph, num_hops: int | None) -> Bool[Tensor, "n_atoms n_atoms"]:
    """Return which atoms (columns) are no more than so many edges from which (rows)."""
    source, target = graph.edge_index
    joined = torch.eye(graph.n_atoms, device=graph.pos.device)
    joined[target, source] = 1.0
    reach, n_hops = joined > 0, 1
    if num_hops == 0:
        return torch.eye(graph.n_atoms, dtype=torch.bool, device=graph.pos.device)
    while num_hops is None or n_hops < num_hops:
        further = (reach.float() @ joined) > 0
        if bool((further == reach).all()):
            break
        reach, n_hops = further, n_hops + 1
    return reach
