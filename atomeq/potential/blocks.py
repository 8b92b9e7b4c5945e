"""Energies of a large structure and their gradient, some atoms at a time: memory that edges need.

A network of messages computes one layer after the other, and a layer the atoms of a block from
their own edges and the features of their neighbours. Of a layer nothing is kept but the features of
the atoms, and a block's edges are computed again where their gradient is due; the last layer's is
taken at once, while the block is there. Values and gradients are those of the whole to rounding.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel, Stage
from atomeq.potential.derivatives import pulled_back

# An edge of cu-pbe needs 3.5 kB: 170 MB a block at most. From so many edges on blocks cost no time:
# they need as much less of page faults and cache misses as they compute twice. To keep no rows of
# edges in the layer instead (``recompute``) costs a sixth at any size.
_EDGES = 3 * 2**14

Named = dict[str, Tensor]  # pos, cell and, but of the first stage, the features x


class Block(NamedTuple):
    """Some atoms, with all of their edges.

    Attributes:
        part: Which atoms.
        atoms: Those, and behind them their other neighbours, (n_local,).
        graph: The edges, with atoms numbered as in ``atoms``; without positions and cells.
    """

    part: slice
    atoms: Tensor
    graph: AtomGraph

    def run(self, stage: Stage, known: Named) -> Tensor:
        """Return what a stage makes of the block's atoms, from what is known of ``atoms``."""
        graph = self.graph.replace(pos=known["pos"], cell=known["cell"])
        return stage(graph, known.get("x"), self.part.stop - self.part.start)

    def own(self, known: Named) -> Named:
        """Return what is known of ``atoms`` from what is of all, in memory of its own."""
        return {
            name: value.clone() if name == "cell" else value[self.atoms]
            for name, value in known.items()
        }


def divisible(model: AtomisticModel, graph: AtomGraph) -> bool:
    """Tell whether energies are to be computed in blocks: on a CPU, of many edges in order.

    Neither of a trace, which must serve all sizes.
    """
    if graph.n_edges <= _EDGES or type(graph.pos) is not Tensor or graph.pos.device.type != "cpu":
        return False
    target = graph.edge_index[1]
    in_order = bool((target[1:] >= target[:-1]).all())
    return in_order and not torch.compiler.is_compiling() and bool(model.stages())


def energies_in_blocks(
    model: AtomisticModel, graph: AtomGraph, wanted: Sequence[int] | None = None
) -> Tensor:
    """Return the energies of a model that has stages, which are differentiable once.

    Args:
        model: The model.
        graph: Structures, edges in the order of their targets.
        wanted: Of how many atoms, the first ones, each stage is asked; those that it takes must be
            among the ones before. By default of all.

    Returns:
        Energies of the atoms that the last stage is asked of, (n_wanted,).
    """
    counts = [graph.n_atoms] * len(model.stages()) if wanted is None else list(wanted)
    blocks = {count: list(_blocks(graph, count)) for count in set(counts)}
    stages = [(stage, blocks[n]) for stage, n in zip(model.stages(), counts, strict=True)]
    energies = _Energies.apply(graph.pos, graph.cell, stages)
    assert isinstance(energies, Tensor)
    return energies


def _blocks(graph: AtomGraph, n_atoms: int) -> Iterator[Block]:
    """Cut the first so many atoms into blocks of about as many edges each."""
    n_edges = int(torch.searchsorted(graph.edge_index[1], n_atoms))
    source, target = graph.edge_index[:, :n_edges]
    first_edge = torch.searchsorted(target, torch.arange(n_atoms + 1))
    step = -(-n_edges // max(1, -(-n_edges // _EDGES)))
    inner = torch.arange(step, n_edges, step) if step else torch.arange(0)
    cuts = torch.searchsorted(first_edge, inner).unique().tolist()
    place = torch.empty(graph.n_atoms, dtype=torch.int64)
    for start, stop in pairwise([0, *cuts, n_atoms]):
        edges = slice(int(first_edge[start]), int(first_edge[stop]))
        ends = source[edges]
        others = ends[(ends < start) | (ends >= stop)].unique()
        atoms = torch.cat([torch.arange(start, stop), others])
        place[atoms] = torch.arange(len(atoms))
        local = AtomGraph().replace(
            atomic_numbers=graph.atomic_numbers[atoms],
            batch=graph.batch[atoms],
            edge_index=torch.stack([place[ends], target[edges] - start]),
            cell_offsets=graph.cell_offsets[edges],
        )
        yield Block(slice(start, stop), atoms, local)


class _Energies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pos: Tensor, cell: Tensor, stages: Sequence[tuple[Stage, list[Block]]]
    ) -> Tensor:
        known = {"pos": pos.detach(), "cell": cell.detach()}
        steps: list[tuple[Stage, list[Block], Named]] = []
        for stage, blocks in stages[:-1]:
            steps.append((stage, blocks, known))
            made = torch.cat([block.run(stage, block.own(known)) for block in blocks])
            known = known | {"x": made}
        last, blocks = stages[-1]
        wanted = {name for name, one in zip(known, ctx.needs_input_grad[:2], strict=False) if one}
        if not wanted:
            return torch.cat([block.run(last, block.own(known)) for block in blocks])
        # A sum over atoms is what is differentiated nearly always; backward scales it.
        energies, ctx.of_sum = _pulled(last, blocks, known, {*wanted, "x"}, None)
        ctx.steps, ctx.wanted = [*steps, (last, blocks, known)], wanted
        return energies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        *steps, (last, blocks, known) = ctx.steps
        wanted, found = ctx.wanted, ctx.of_sum
        if bool((grad == grad[0]).all()):
            found = {name: value * grad[0].to(value.dtype) for name, value in found.items()}
        else:
            found = _pulled(last, blocks, known, {*wanted, "x"}, grad)[1]
        for stage, blocks, known in reversed(steps):
            through = _pulled(stage, blocks, known, {*wanted, "x"}, found.pop("x"))[1]
            for name in wanted:
                found[name] += through.pop(name)
            found |= through
        return found.get("pos"), found.get("cell"), None


def _pulled(
    stage: Stage, blocks: list[Block], known: Named, wanted: set[str], along: Tensor | None
) -> tuple[Tensor, Named]:
    """Return what a stage makes of all atoms, and the gradient of its sum or along a direction."""
    found = {name: torch.zeros_like(value) for name, value in known.items() if name in wanted}
    made = []
    for block in blocks:
        own = block.own(known)
        leaves = [own[name].requires_grad_() for name in found]
        with torch.enable_grad():
            values = block.run(stage, own)
        made.append(values.detach())
        gradients = pulled_back(values, leaves, None if along is None else along[block.part])
        for (name, total), gradient in zip(found.items(), gradients, strict=True):
            if gradient is not None and name == "cell":
                total += gradient
            elif gradient is not None:
                total.index_add_(0, block.atoms, gradient)
    return torch.cat(made), found
