"""The neighbour list of one structure: exact, and in one order; builders.py puts it into graphs.

What is reused while atoms move is in moving.py, and gives the same edges to the last bit.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from vesin import NeighborList

#: Å; a search costs little beside a network, and a larger skin means more pairs to measure.
SKIN = 0.6

# Å; a search has its own sum of squares. It finds so much more than is wanted, and edge_lengths
# decides what is inside, so that fresh and reused lists agree to the last bit.
_BORDER = 1e-6
# vesin divides by zero, which ends the process, where it would need more than 1e5 cells and one
# direction is thin: one evaporated atom does it. Half of that leaves room for its own padding.
_MAX_CELLS = 5e4
# Beyond this many lattice vectors from the origin a float64 coordinate has lost the digits that
# distances need, and vesin's integer offsets soon overflow.
_MAX_IMAGES = 1e6
_MAX_SPREAD = 1e8  # Å, the same for directions that are not periodic
# No lattice whose points are all this far apart (Å) has less length, area or volume per point than
# the closest packings: a wire, triangles, fcc. Below it the pairs would fill any memory.
_NEAREST_IMAGE = 0.1
_CLOSEST_PACKING = (1.0, 1.0, math.sqrt(3) / 2, 1 / math.sqrt(2))  # by number of periodic vectors


class Edges(NamedTuple):
    """The edges of one structure.

    Attributes:
        edge_index: (2, n_edges) int64, row 0 the neighbour j, row 1 the centre i.
        cell_offsets: (n_edges, 3) int64, image of j.
    """

    edge_index: NDArray[np.int64]
    cell_offsets: NDArray[np.int64]


def neighbor_list(
    pos: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> Edges:
    """Find all pairs closer than the cutoff, self-images included.

    Atoms may lie outside the cell. Cell vectors of directions that are not periodic play no role
    and may be zero.

    Args:
        pos: (n_atoms, 3), Å.
        cell: (3, 3), Å, rows are lattice vectors.
        pbc: (3,).
        cutoff: Å; pairs at exactly this distance are outside.

    Returns:
        The edges sorted by i, then j, then offset.

    Raises:
        ValueError: The cutoff is not a positive number, a periodic cell vector is zero or depends
            on the others, the cell is so small that an atom overlaps with its images, or an atom is
            too far away to be resolved.

    Example:
        >>> pos, cell = np.zeros((1, 3)), 2.5 * np.eye(3)
        >>> neighbor_list(pos, cell, np.array([True] * 3), 3.0).edge_index.shape
        (2, 6)
    """
    return neighbor_list_with_lengths(pos, cell, pbc, cutoff)[0]


def neighbor_list_with_lengths(
    pos: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> tuple[Edges, NDArray[np.float64]]:
    """Return what :func:`neighbor_list` returns, and the length (n_edges,) of each edge, Å."""
    check_cutoff(cutoff)
    pos = np.ascontiguousarray(pos, dtype=np.float64)
    pbc = np.asarray(pbc, dtype=bool)
    nothing = Edges(np.zeros((2, 0), np.int64), np.zeros((0, 3), np.int64)), np.zeros(0)
    if len(pos) == 0:
        return nothing
    cell = np.asarray(cell, dtype=np.float64)
    boxed, box = enclosed(pos, cell, pbc, cutoff)
    search = _search_tree if _too_thin_for_vesin(box, cutoff) else _search_vesin
    pairs, offsets = search(boxed, box, pbc, cutoff + _BORDER)
    if pairs.shape[1] == 0:  # so most often where atoms are looked for that overlap
        return nothing
    lengths = edge_lengths(pos, cell, pairs, offsets)
    inside = lengths < cutoff
    if not inside.all():
        pairs, offsets, lengths = pairs[:, inside], offsets[inside], lengths[inside]
    edge_index = np.concatenate((pairs, pairs[::-1]), axis=1)
    offsets = np.concatenate((offsets, -offsets))
    order = _in_order(edge_index, offsets, len(pos))
    edges = Edges(edge_index.take(order, 1), offsets.take(order, 0).astype(np.int64))
    return edges, lengths.take(order, mode="wrap")  # an edge and its opposite are as long


def _in_order(
    edge_index: NDArray[np.int64], offsets: NDArray[np.integer], n_atoms: int
) -> NDArray[np.intp]:
    """Return what sorts pairs by target, then source, then offset, (n_pairs,).

    The three are one integer, sorted by its digits of 16 bits, for which NumPy has a radix sort.
    """
    source, target = edge_index
    low = int(offsets.min(initial=0))
    span = int(offsets.max(initial=0)) - low + 1
    largest = n_atoms**2 * span**3
    if largest > 2**63:
        return np.lexsort((offsets[:, 2], offsets[:, 1], offsets[:, 0], source, target))
    key = target * n_atoms
    key += source
    for offset in offsets.T:
        key *= span
        key += offset
        key -= low
    digits = []
    while largest:
        digits.append(key.astype(np.uint16))  # the lowest of them first
        key >>= 16
        largest >>= 16
    return np.lexsort(digits)


def edge_lengths(
    pos: NDArray[np.float64],
    cell: NDArray[np.float64],
    edge_index: NDArray[np.int64],
    cell_offsets: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Measure edges of one structure: (n_edges,), Å."""
    shifts = cell_offsets.T.astype(np.float64)
    return pair_lengths(pos, cell[None], edge_index, shifts, edge_index[0])


def pair_lengths(
    pos: NDArray[np.float64],
    cell: NDArray[np.float64],
    edge_index: NDArray[np.int64],
    shifts: NDArray[np.float64],
    system: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Measure pairs of a batch.

    Written per component, without a matrix product, whose rounding depends on how many rows it has:
    a pair has the same length to the last bit in whatever list it stands.

    Args:
        pos: (n_atoms, 3), Å.
        cell: (n_graphs, 3, 3), Å.
        edge_index: (2, n_pairs), row 0 is j.
        shifts: Image of j, (3, n_pairs), or (0, n_pairs) where nothing is periodic.
        system: Structure of each pair, (n_pairs,); not looked at where there is one.

    Returns:
        (n_pairs,), Å.
    """
    source, target = edge_index
    used = np.any(cell, axis=0)  # (3, 3)
    squared = np.zeros(len(source))
    for k, along in enumerate(pos.T):
        component = along[source]
        component -= along[target]
        for a, shift in enumerate(shifts):
            if used[a, k]:
                column = cell[:, a, k]
                component += shift * (column if len(column) == 1 else column[system])
        component *= component
        squared += component
    return np.sqrt(squared, out=squared)


def complete_cell(cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Replace the vectors of non-periodic directions by unit vectors normal to the periodic ones.

    Raises:
        ValueError: The periodic vectors are zero or depend on each other.
    """
    periodic = np.flatnonzero(pbc)
    box = np.array(cell, dtype=np.float64)
    if not spans_periodic_directions(box[None], pbc[None])[0]:
        raise ValueError(
            f"periodic in directions {periodic.tolist()}, but these cell vectors are zero or "
            f"depend on each other: {box.tolist()} Å"
        )
    if len(periodic) < 3:
        # The last right-singular vectors span what is orthogonal to the periodic vectors.
        normals = np.linalg.svd(box[periodic])[2][len(periodic) :]
        box[~pbc] = normals
    return box


def spans_periodic_directions(
    cells: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Tell for each cell whether its periodic vectors are nonzero and independent: (n_graphs,)."""
    lengths = np.linalg.norm(cells, axis=-1, keepdims=True)
    usable = (lengths[..., 0] > 0) | ~pbc
    unit = np.where(pbc[..., None], cells, 0.0) / np.where(lengths > 0, lengths, 1.0)
    gram = unit @ np.swapaxes(unit, -1, -2) + np.eye(3) * ~pbc[..., None]
    # The determinant is the squared volume of the unit vectors: 1e-10 is an angle of 6e-4 degrees.
    return usable.all(axis=-1) & (np.linalg.det(gram) > 1e-10)


def check_cutoff(cutoff: float) -> None:
    """Refuse a cutoff that is not a positive finite number.

    Raises:
        ValueError: It is not.
    """
    if not (math.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"cutoff must be a positive finite length in Å, not {cutoff!r}")


def _refuse_collapsed(vectors: NDArray[np.float64]) -> None:
    """Refuse periodic vectors (n_periodic, 3) whose lattice must put images on each other."""
    size = math.sqrt(max(0.0, float(np.linalg.det(vectors @ vectors.T))))
    smallest = _CLOSEST_PACKING[len(vectors)] * _NEAREST_IMAGE ** len(vectors)
    if size < smallest:
        raise ValueError(
            f"the periodic cell has collapsed: {size:.3g} Å^{len(vectors)} puts images of each "
            f"atom nearer than {_NEAREST_IMAGE} Å; see whether the cell is in Å, or what shrank it"
        )


def enclosed(
    pos: NDArray[np.float64],
    cell: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    cutoff: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return positions and a cell with the same pairs, periodic along all three vectors.

    Args:
        pos: (n_atoms, 3), Å, at least one atom.
        cell: (3, 3), Å.
        pbc: (3,).
        cutoff: Å.

    Raises:
        ValueError: As in :func:`neighbor_list`.
    """
    box = complete_cell(cell, pbc)
    _refuse_collapsed(cell[pbc])
    scaled = pos @ np.linalg.inv(box)
    far = np.abs(scaled[:, pbc]).max(axis=1, initial=0.0)
    if far.max() > _MAX_IMAGES:
        atom = int(far.argmax())
        raise ValueError(
            f"atom {atom} lies {far[atom]:.3g} lattice vectors outside the cell, too far to "
            "resolve distances; wrap the atoms into the cell, or see whether the structure blew up"
        )
    # Open directions become periodic ones with more than a cutoff of vacuum: the same pairs, all at
    # offset 0. vesin is up to 1000 times slower where open and periodic directions are mixed.
    box, pos = box.copy(), pos.copy()
    for k in np.flatnonzero(~pbc):
        low, high = scaled[:, k].min(), scaled[:, k].max()
        if high - low > _MAX_SPREAD:
            atom = int(np.abs(scaled[:, k]).argmax())
            raise ValueError(
                f"atom {atom} lies {high - low:.3g} Å away from another, too far to resolve "
                "distances; see whether the structure blew up"
            )
        pos -= (low - cutoff) * box[k]
        box[k] *= high - low + 2 * cutoff
    return pos, box


def _too_thin_for_vesin(box: NDArray[np.float64], cutoff: float) -> bool:
    heights = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
    n_cells = np.maximum(1.0, np.floor(heights / cutoff))
    total = n_cells.prod()
    return bool(total > _MAX_CELLS and n_cells.min() * np.cbrt(_MAX_CELLS / total) < 2)


_Pairs = tuple[NDArray[np.int64], NDArray[np.integer]]  # each once: (2, n_pairs) and its offsets


def _search_vesin(
    pos: NDArray[np.float64], box: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> _Pairs:
    # As many threads as torch may use, so that a data-loader worker takes one core. vesin's own
    # order depends on them; the caller sorts.
    search = NeighborList(cutoff=cutoff, full_list=False, n_threads=torch.get_num_threads())
    pairs, offsets = search.compute(pos, box, True, "PS", copy=False)
    return pairs.T[::-1].astype(np.int64, order="C"), offsets.copy()  # that go with the search


def _search_tree(
    pos: NDArray[np.float64], box: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> _Pairs:
    inverse = np.linalg.inv(box)
    wrap = np.where(pbc, np.floor(pos @ inverse), 0.0)  # (n_atoms, 3)
    home = pos - wrap @ box
    reach = np.where(pbc, np.ceil(cutoff * np.linalg.norm(inverse, axis=0)), 0).astype(int)
    images = np.stack(
        np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    ghosts = (home + (images @ box)[:, None, :]).reshape(-1, 3)  # (n_images * n_atoms, 3)
    found = KDTree(home).sparse_distance_matrix(KDTree(ghosts), cutoff, output_type="ndarray")
    target, image, source = found["i"], found["j"] // len(pos), found["j"] % len(pos)
    offsets = images[image] - wrap[source] + wrap[target]
    ahead = offsets[np.arange(len(offsets)), (offsets != 0).argmax(axis=1)] > 0
    once = (target < source) | ((target == source) & ahead)
    return np.stack((source, target))[:, once].astype(np.int64), offsets[once].astype(np.int64)
