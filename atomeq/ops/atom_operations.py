"""Operations without edge frames in a backend of kernels: coupling, sphere, segments."""

from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form
from atomeq.ops.coupling.radial import couple_radially
from atomeq.ops.coupling.registered import couple
from atomeq.ops.harmonics.polynomials import Normalization
from atomeq.ops.harmonics.registered import harmonics
from atomeq.ops.paths import Mode, Path, RadialMap
from atomeq.ops.segment.registered import segment_softmax, segment_total
from atomeq.ops.specification import OpSpec
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.registered import sphere_form

# Which kernels serve an operation.
ATOM_TOPICS = {
    "tensor_product": "coupling",
    "cg_conv": "coupling",
    "spherical_harmonics": "harmonics",
    "segment_sum": "segment",
    "segment_softmax": "segment",
    "sphere_silu": "sphere",
    "sphere_product": "sphere",
}


class AtomOperations:
    """See :class:`~atomeq.ops.dispatch.Backend`.

    Args:
        kernels: Name of the kernel set.
    """

    def __init__(self, kernels: str) -> None:
        self.name = kernels

    def by_torch(self, spec: OpSpec) -> bool:
        """Nothing that is served: these are kernels."""
        return False

    def spherical_harmonics(
        self, vectors: Tensor, lmax: int, normalization: Normalization, normalize: bool
    ) -> Tensor:
        """Evaluate the harmonics of vectors or of their directions."""
        if vectors.ndim == 2:  # the usual call; a view costs as much as the harmonics of a molecule
            return harmonics(vectors, lmax, normalization, normalize, self.name)
        flat = vectors.reshape(-1, 3)
        values = harmonics(flat, lmax, normalization, normalize, self.name)
        return values.view(*vectors.shape[:-1], values.shape[1])

    def tensor_product(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
    ) -> Tensor:
        """Couple two features by Clebsch-Gordan paths."""
        batch = x.shape[:-2]
        n_edges = batch.numel()
        # By itself a batch has axes of any number; the form has edges.
        flat_x = x.reshape(n_edges, *x.shape[-2:])
        flat_y = y.reshape(n_edges, *y.shape[len(batch) :])
        if weights is not None and weights.ndim > (4 if mode == "uvw" else 2):
            weights = weights.reshape(n_edges, *weights.shape[len(batch) :])
        form = Form(paths, mode, stacked)
        product = couple(flat_x, flat_y, weights, None, n_edges, form, self.name)
        return product.reshape(*batch, *product.shape[1:])

    def cg_conv(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        edge_index: Tensor,
        n_atoms: int,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
        radial_map: RadialMap | None,
    ) -> Tensor:
        """Gather x on the sources, couple it with y, sum on the targets."""
        ends = (edge_index[0], edge_index[1])
        if radial_map is not None and weights is not None:
            form = Form(paths, mode, stacked)
            return couple_radially(x, y, weights, radial_map, ends, n_atoms, form, self.name)
        return couple(x, y, weights, ends, n_atoms, Form(paths, mode, stacked), self.name)

    def sphere_silu(self, x: Tensor, grid: SphereGrid) -> Tensor:
        """Apply SiLU to the values on the points of a grid."""
        return sphere_form([x], [grid.to_matrix(like=x)], grid.from_matrix(like=x), 0, self.name)

    def sphere_product(
        self, x: Tensor, y: Tensor, left: Tensor, right: Tensor, out: Tensor
    ) -> Tensor:
        """Multiply two functions on the points of a grid."""
        flat = [factor.reshape(-1, *factor.shape[-2:]) for factor in (x, y)]
        product = sphere_form(flat, [left, right], out.mT, -1, self.name)
        return product.reshape(*x.shape[:-2], *product.shape[1:])

    def segment_sum(self, x: Tensor, index: Tensor, n_segments: int) -> Tensor:
        """Sum the members of each segment."""
        return segment_total(x, index, n_segments, self.name)

    def segment_softmax(self, logits: Tensor, index: Tensor, n_segments: int) -> Tensor:
        """Normalise the members of each segment."""
        return segment_softmax(logits, index, n_segments, self.name)
