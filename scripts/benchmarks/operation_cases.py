"""What ``benchmark.py tensor-product`` times: all operations, by all libraries installed."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from atomeq.ops.clifford.algebra import algebra_of, terms
from atomeq.ops.clifford.operations import geometric_product
from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.ops.coupling.irreps import from_mul_ir, product_problem, to_mul_ir
from atomeq.ops.coupling.operations import cg_conv, tensor_product
from atomeq.ops.dispatch import BACKENDS, refusal, use_backend
from atomeq.ops.edge.operations import (
    escn_conv,
    rotate_from_edge,
    rotate_to_edge,
    so2_linear,
    so2_linear_with_scalars,
)
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.orders import m_primary_order
from atomeq.ops.paths import Path as CouplingPath
from atomeq.ops.paths import tensor_product_paths
from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.specification import Mode, OpSpec
from atomeq.ops.sphere.gaunt import gaunt_product
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.operations import sphere_silu
from benchmarks.record import installed
from benchmarks.rounds import Case, Implementation

DEGREE = 20  # edges per atom


def ours(name: str, compute: Callable[..., Tensor], backend: str = "auto") -> Implementation:
    """Return our own operation, served by one backend."""

    def served(*inputs: Tensor) -> Tensor:
        with use_backend(backend):
            return compute(*inputs)

    return Implementation(name, served)


def own(compute: Callable[..., Tensor], device: str) -> Implementation:
    """Return our operation as it is to be fast on a device: on CUDA the kernels must be named."""
    name = "triton" if device == "cuda" else "auto"
    return ours(name, compute, name)


def halved(implementation: Implementation) -> Implementation:
    """Return the forward pass with operands of bfloat16."""

    def compute(*inputs: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return implementation.compute(*inputs)
        finally:
            torch.set_float32_matmul_precision(before)

    name = f"{implementation.name} bf16"
    return dataclasses.replace(implementation, name=name, compute=compute, phases=("forward",))


def adapters(
    op: str, lmax: int, channels: int, n_edges: int, inputs: list[Tensor], compute: Callable
) -> list[Implementation]:
    """Return the backends other than the reference that serve this call when named."""
    spec = OpSpec(op, lmax, lmax, channels, n_edges, inputs[0].dtype, inputs[0].device)
    taken = ("reference", "e3nn", "cpu", "triton")  # they have rows of their own
    names = [name for name in BACKENDS if name not in taken]
    return [ours(name, compute, name) for name in names if refusal(name, spec) is None]


def harmonics_case(lmax: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    from e3nn import o3

    vectors = torch.randn(n_edges, 3, dtype=dtype, device=device)
    degrees = list(range(lmax + 1))

    def compute(vectors: Tensor) -> Tensor:
        return spherical_harmonics(vectors, lmax)

    def by_e3nn(vectors: Tensor) -> Tensor:
        return o3.spherical_harmonics(degrees, vectors, normalize=True, normalization="component")

    implementations = [own(compute, device), ours("reference", compute, "reference")]
    implementations.append(Implementation("e3nn", by_e3nn))
    if installed("sphericart-torch"):
        import sphericart.torch

        evaluator = sphericart.torch.SphericalHarmonics(lmax)
        scale = math.sqrt(4 * math.pi)  # orthonormal, polar axis z
        implementations.append(
            Implementation("sphericart", lambda zxy: evaluator(zxy) * scale, to_polar_z)
        )
    if lmax <= 3:  # building the polynomials of cuEquivariance takes long above
        implementations += adapters("spherical_harmonics", lmax, 1, n_edges, [vectors], compute)
    return Case("spherical_harmonics", lmax, 1, n_edges, dtype, [vectors], implementations, compute)


def to_polar_z(vectors: Tensor) -> list[Tensor]:
    return [vectors[:, [2, 0, 1]]]


def wigner_case(lmax: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """Matrices that take edges to +y; ours are never differentiated, so only forward counts."""
    from e3nn import o3

    vectors = torch.nn.functional.normalize(torch.randn(n_edges, 3, dtype=dtype, device=device))
    rows = torch.tensor(m_primary_order(lmax, lmax), device=device).argsort()

    def compute(vectors: Tensor) -> Tensor:
        edges = torch.zeros(2, n_edges, dtype=torch.long, device=device)
        return build_edge_frame(vectors, edges, n_atoms=1, lmax=lmax, mmax=lmax).wigner

    def by_e3nn(vectors: Tensor) -> Tensor:
        alpha, beta = o3.xyz_to_angles(vectors)
        zero = torch.zeros_like(alpha)
        blocks = [o3.wigner_D(l, zero, -beta, -alpha) for l in range(lmax + 1)]
        out = vectors.new_zeros(n_edges, (lmax + 1) ** 2, (lmax + 1) ** 2)
        for l, block in enumerate(blocks):
            out[:, l * l : (l + 1) ** 2, l * l : (l + 1) ** 2] = block
        return out

    def misalignment(matrices: Tensor) -> float:
        harmonics = spherical_harmonics(vectors, lmax)
        pole = spherical_harmonics(torch.tensor([0.0, 1, 0], dtype=dtype, device=device), lmax)
        return ((matrices @ harmonics.unsqueeze(-1)).squeeze(-1) - pole).abs().max().item()

    implementations = [
        dataclasses.replace(own(compute, device), restore=lambda out: out[:, rows]),
        Implementation("e3nn", by_e3nn),
    ]
    for implementation in implementations:
        implementation.phases = ("forward",)
    inputs = [vectors]
    return Case("edge_wigner", lmax, 1, n_edges, dtype, inputs, implementations, error=misalignment)


def random_edges(n_edges: int, device: str) -> tuple[Tensor, int]:
    """Return a random graph with edges sorted by their target, as neighbour lists give them."""
    n_atoms = max(2, n_edges // DEGREE)
    edges = torch.randint(0, n_atoms, (2, n_edges), device=device)
    return edges[:, edges[1].argsort()], n_atoms


def coupling_case(
    op: str, lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str
) -> Case:
    """Uvu products of features with harmonics, one item per edge, with or without the sums."""
    paths = tensor_product_paths(lmax, lmax, lmax)
    edge_index, n_atoms = random_edges(n_edges, device)
    options = {"dtype": dtype, "device": device}
    convolved = op == "cg_conv"
    x = torch.randn(n_atoms if convolved else n_edges, (lmax + 1) ** 2, channels, **options)
    y = spherical_harmonics(torch.randn(n_edges, 3, **options), lmax)
    weights = torch.randn(n_edges, len(paths), channels, **options)

    def compute(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        if convolved:
            return cg_conv(x, y, weights, edge_index, n_atoms, paths)
        return tensor_product(x, y, weights, paths)

    product = e3nn_product(paths, lmax, channels, "uvu", dtype, device)

    def by_e3nn(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        if not convolved:
            return product(x, y, weights)
        messages = product(x.index_select(0, edge_index[0]), y, weights)
        totals = messages.new_zeros(n_atoms, messages.shape[1])
        return totals.index_add(0, edge_index[1], messages)

    inputs = [x, y, weights]
    implementations = [
        own(compute, device),
        ours("reference", compute, "reference"),
        Implementation(
            "e3nn",
            by_e3nn,
            lambda x, y, weights: [to_mul_ir(x), y, weights.flatten(1)],
            lambda out: from_mul_ir(out, list(range(lmax + 1)), channels),
        ),
    ]
    if lmax <= 2 or device == "cuda":  # on a CPU its paths are einsums, planned one by one
        implementations += adapters(op, lmax, channels, n_edges, inputs, compute)
    return Case(op, lmax, channels, n_edges, dtype, inputs, implementations, compute)


def e3nn_product(
    paths: Sequence[CouplingPath],
    lmax: int,
    channels: int,
    mode: Mode,
    dtype: torch.dtype,
    device: str,
) -> torch.nn.Module:
    """Return e3nn's own product, as e3nn's defaults make it."""
    from e3nn import o3

    problem = product_problem(
        tuple(paths),
        (lmax, lmax),
        (channels, 1 if mode == "uvu" else channels, channels),
        mode,
        stacked=False,
        weighted=True,
    )
    return o3.TensorProduct(*problem, shared_weights=False, internal_weights=False).to(
        device=device, dtype=dtype
    )


def escn_case(lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """One edge layer of eSCN: both atoms' features, radial factors, two SO(2) maps and a gate."""
    mmax = min(2, lmax)
    edge_index, n_atoms = random_edges(n_edges, device)
    options = {"dtype": dtype, "device": device}
    vectors = torch.randn(n_edges, 3, **options)
    frame = build_edge_frame(vectors, edge_index, n_atoms=n_atoms, lmax=lmax, mmax=mmax)
    x = torch.randn(n_atoms, (lmax + 1) ** 2, channels, **options)
    sizes = [lmax - m + 1 for m in range(mmax + 1)]
    radial = torch.randn(n_edges, sum(sizes) * 2 * channels, **options)
    first = so2_weights(sizes, 2 * channels, channels, lmax * channels, options)
    second = so2_weights(sizes, channels, channels, 0, options)
    degree_of_row = torch.tensor(
        [math.isqrt(row) for row in m_primary_order(lmax, mmax)], device=device
    )

    def layer(vectors: Tensor, x: Tensor, radial: Tensor, *weights: Tensor) -> Tensor:
        here = dataclasses.replace(frame, vectors=vectors)
        here = dataclasses.replace(here, wigner=frame.wigner.to(x.dtype))
        rows = rotate_to_edge(x, here, side="both")
        rows, gates = so2_linear_with_scalars(
            rows, weights[: mmax + 1], lmax=lmax, mmax=mmax, scale=radial
        )
        opened = torch.sigmoid(gates).unflatten(1, (lmax, channels))
        scalars = torch.nn.functional.silu(rows[:, :1])
        higher = rows[:, 1:] * opened[:, degree_of_row[1:] - 1]
        rows = torch.cat((scalars, higher), dim=1)
        rows = so2_linear(rows, weights[mmax + 1 :], lmax=lmax, mmax=mmax)
        return rotate_from_edge(rows, here)

    inputs = [vectors, x, radial, *first, *second]

    def fused(recompute: bool) -> Callable[..., Tensor]:
        def compute(vectors: Tensor, x: Tensor, radial: Tensor, *weights: Tensor) -> Tensor:
            here = dataclasses.replace(frame, vectors=vectors)
            maps = weights[: mmax + 1], weights[mmax + 1 :]
            return escn_conv(x, here, *maps, radial=radial, recompute=recompute)

        return compute

    recomputing = own(fused(True), device)
    recomputing.name += ", recomputing"
    implementations = [
        own(fused(False), device),
        ours("reference", layer, "reference"),
        recomputing,
    ]
    if device == "cuda":
        implementations.append(halved(implementations[0]))
        compiled = ours("reference compiled", layer, "reference")
        compiled.compute = torch.compile(compiled.compute)
        compiled.phases = ("forward", "forward_backward")  # compiled graphs have no second one
        compiled.whole = implementations[1].whole
        implementations.append(compiled)
    return Case("escn_layer", lmax, channels, n_edges, dtype, inputs, implementations, layer)


def filter_case(channels: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """FAENet's sum of neighbours times filters: the product 0 x 0 -> 0, or one step at a time."""
    edge_index, n_atoms = random_edges(n_edges, device)
    options = {"dtype": dtype, "device": device}
    inputs = [torch.randn(n, channels, **options) for n in (n_atoms, n_edges)]
    inputs.append(torch.rand(n_edges, 1, **options))
    scalars = [CouplingPath(0, 0, 0)]

    def fused(x: Tensor, filters: Tensor, envelope: Tensor) -> Tensor:
        return cg_conv(x[:, None], envelope, filters[:, None], edge_index, n_atoms, scalars)[:, 0]

    def stepwise(x: Tensor, filters: Tensor, envelope: Tensor) -> Tensor:
        messages = x.index_select(0, edge_index[0]) * filters * envelope
        return segment_sum(messages, edge_index[1], n_atoms)

    implementations = [ours("auto", fused), ours("gather, multiply, sum", stepwise)]
    return Case("faenet_filter", 0, channels, n_edges, dtype, inputs, implementations, stepwise)


def pull_case(n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """EGNN's sum of directions times strengths: the product 0 x 1 -> 1 of a single channel."""
    edge_index, n_atoms = random_edges(n_edges, device)
    options = {"dtype": dtype, "device": device}
    inputs = [torch.randn(n_edges, 3, **options), torch.randn(n_edges, 1, **options)]
    ones, path = torch.ones(n_atoms, 1, 1, **options), [CouplingPath(0, 1, 1)]

    def stepwise(directions: Tensor, strengths: Tensor) -> Tensor:
        return segment_sum(directions * strengths, edge_index[1], n_atoms)

    def fused(directions: Tensor, strengths: Tensor) -> Tensor:
        y = torch.nn.functional.pad(directions, (1, 0))
        like = ones.to(y.dtype)
        weights = strengths[:, None]
        return cg_conv(like, y, weights, edge_index, n_atoms, path, output="paths").squeeze(-1)

    implementations = [ours("auto", stepwise), ours("cg_conv", fused)]
    return Case("egnn_pull", 1, 1, n_edges, dtype, inputs, implementations, stepwise)


def so2_weights(
    sizes: list[int], c_in: int, c_out: int, n_scalars: int, options: dict
) -> list[Tensor]:
    """Return random weights, W_1 and W_2 for each m > 0, that keep the variance."""
    shapes = [(n_scalars + sizes[0] * c_out, sizes[0] * c_in)]
    shapes += [(2, n * c_out, n * c_in) for n in sizes[1:]]
    return [torch.randn(shape, **options) / math.sqrt(shape[-1] * len(shape)) for shape in shapes]


def activation_case(
    lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str
) -> Case:
    from e3nn import o3

    grid = SphereGrid(lmax, lmax, normalization="component")
    x = torch.randn(n_edges, (lmax + 1) ** 2, channels, dtype=dtype, device=device)
    to_grid = o3.ToS2Grid(lmax, grid.shape, normalization="component").to(x)
    from_grid = o3.FromS2Grid(grid.shape, lmax, normalization="component").to(x)

    def compute(x: Tensor) -> Tensor:
        return sphere_silu(x, grid)

    implementations = [
        own(compute, device),
        ours("reference", compute, "reference"),
        Implementation(
            "e3nn",
            lambda x: from_grid(torch.nn.functional.silu(to_grid(x))),
            lambda x: [x.mT.contiguous()],
            lambda out: out.mT,
        ),
    ]
    return Case("sphere_silu", lmax, channels, n_edges, dtype, [x], implementations, compute)


def gaunt_case(lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """Beside it the same function as a sum of Clebsch-Gordan paths with Gaunt's coefficients."""
    options = {"dtype": dtype, "device": device}
    x, y = (torch.randn(n_edges, (lmax + 1) ** 2, channels, **options) for _ in range(2))
    paths = tensor_product_paths(lmax, lmax, lmax)
    weights = gaunt_weights(paths).to(x)[:, None].expand(-1, channels).contiguous()
    product = e3nn_product(paths, lmax, channels, "uuu", dtype, device)

    def compute(x: Tensor, y: Tensor) -> Tensor:
        return gaunt_product(x, y, lmax)

    implementations = [
        own(compute, device),
        ours("paths", lambda x, y: tensor_product(x, y, weights, paths, mode="uuu")),
        Implementation(
            "e3nn",
            lambda x, y: product(x, y, weights.flatten()[None]),
            lambda x, y: [to_mul_ir(x), to_mul_ir(y)],
            lambda out: from_mul_ir(out, list(range(lmax + 1)), channels),
        ),
    ]
    return Case("gaunt_product", lmax, channels, n_edges, dtype, [x, y], implementations, compute)


def clifford_case(n_rows: int, channels: int, dtype: torch.dtype, device: str) -> Case:
    """Products in Cl(3, 0), beside the table of 8 x 8 x 8 entries, made anew as CGENN's is."""
    algebra, options = algebra_of((3, 0)), {"dtype": dtype, "device": device}
    x, y = (torch.randn(n_rows, 8, channels, **options) for _ in range(2))
    weights = torch.randn(algebra.n_paths, channels, **options)
    signs, paths = torch.zeros(8, 8, 8, **options), torch.zeros(8, 8, 8, dtype=torch.long)
    for term in terms(algebra):
        entry = (term.left, term.output, term.right)
        signs[entry], paths[entry] = term.sign, term.path

    def by_table(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        table = signs.to(x) * weights.T[:, paths]
        return torch.einsum("nci,cijk,nck->ncj", x, table, y)

    implementations = [
        own(geometric_product, device),
        ours("reference", geometric_product, "reference"),
        Implementation(
            "dense table",
            by_table,
            lambda x, y, weights: [x.mT.contiguous(), y.mT.contiguous(), weights],
            lambda out: out.mT,
        ),
    ]
    inputs, truth = [x, y, weights], geometric_product
    return Case("geometric_product", 3, channels, n_rows, dtype, inputs, implementations, truth)


def gaunt_weights(paths: Sequence[CouplingPath]) -> Tensor:
    """Return the path weights that make a Clebsch-Gordan product the Gaunt product."""
    weights = []
    for l1, l2, l3 in paths:
        shared = sum(path.l3 == l3 for path in paths)
        factor = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * shared / (4 * math.pi))
        weights.append(factor * clebsch_gordan(l1, l2, l3)[l1, l2, l3])
    return torch.stack(weights)


def cases(device: str, quick: bool, shrink: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield every case by its operation, made when it is its turn, with edges / shrink."""
    single = torch.float32
    size = (1 if device == "cpu" else 500) / shrink  # edges; a GPU needs many to be busy
    for lmax in (2, 4) if quick else (1, 2, 3, 4):
        yield (
            "spherical_harmonics",
            lambda l=lmax: harmonics_case(l, int(4000 * size), single, device),
        )
    for lmax in (3, 4) if quick else (1, 2, 3, 4, 6):
        n = 1000 if device == "cpu" else 50_000 // shrink
        yield "edge_wigner", lambda l=lmax, n=n: wigner_case(l, n, single, device)
    channels = 64 if device == "cpu" else 128
    few = {1: 1000, 2: 600, 3: 300, 4: 150, 6: 60}
    for lmax in (1, 2, 4, 6) if device == "cpu" else (1, 2, 3, 4):
        n = few[lmax] if device == "cpu" else {1: 500_000, 2: 500_000}.get(lmax, 50_000) // shrink
        yield (
            "cg_conv",
            lambda l=lmax, n=n: coupling_case("cg_conv", l, channels, n, single, device),
        )
    for lmax in (2,) if quick else (1, 2, 4):
        n = few[lmax] if device == "cpu" else 50_000 // shrink
        yield (
            "tensor_product",
            lambda l=lmax, n=n: coupling_case("tensor_product", l, channels, n, single, device),
        )
    sizes = [(2, 64), (2, 128), (4, 64), (4, 128), (6, 128)]
    if device == "cuda":
        sizes = [(2, 128), (3, 128), (4, 128), (6, 128)]
    for lmax, width in sizes:
        n = (
            {2: 800, 4: 400, 6: 60}[lmax]
            if device == "cpu"
            else {2: 500_000}.get(lmax, 100_000) // shrink
        )
        yield "escn_layer", lambda l=lmax, c=width, n=n: escn_case(l, c, n, single, device)
    if device == "cpu":
        yield from cases_of_light_models(single, device)
    for lmax in (4,) if quick else (2, 4, 6):
        n = int(200 * size)
        yield "sphere_silu", lambda l=lmax, n=n: activation_case(l, channels, n, single, device)
        yield "gaunt_product", lambda l=lmax, n=n // 2: gaunt_case(l, channels, n, single, device)


def cases_of_light_models(
    dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield sums of FAENet and EGNN, molecules to boxes of water, and products of CGENN."""
    for width, n in ((128, 400), (480, 5000)):
        yield "faenet_filter", lambda c=width, n=n: filter_case(c, n, dtype, device)
    yield "geometric_product", lambda: clifford_case(2000, 28, dtype, device)
    for n in (400, 20_000):
        yield "egnn_pull", lambda n=n: pull_case(n, dtype, device)
