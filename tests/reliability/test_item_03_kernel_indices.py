"""An edge that ends at no atom is refused before a kernel reads or writes there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from atomeq.ops.coupling.operations import cg_conv
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge import rotation as edge_rotation
from atomeq.ops.edge.operations import escn_conv, rotate_from_edge, rotate_to_edge
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.paths import Path
from atomeq.ops.segment.operations import segment_softmax, segment_sum

N_ATOMS, LMAX, CHANNELS = 5, 2, 3
OUTSIDE = (-1, N_ATOMS, 10**7, -(2**62), 2**62)
BACKENDS = ("reference", "cpu")


def vectors(n_edges: int = 4) -> Tensor:
    return torch.randn(n_edges, 3, generator=torch.Generator().manual_seed(3))


def weights(c_in: int, c_out: int, n_scalars: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(4)
    sizes = [LMAX + 1 - m for m in range(LMAX + 1)]
    return [
        torch.randn((0 if m else n_scalars) + n * c_out, n * c_in, generator=random)
        for m, n in enumerate(sizes)
    ]


LAYER = (weights(2 * CHANNELS, 4, LMAX * 4), weights(4, CHANNELS, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("atom", OUTSIDE)
@pytest.mark.parametrize("row", [0, 1])
def test_a_frame_has_no_edge_beyond_the_atoms(backend: str, atom: int, row: int) -> None:
    edge_index = torch.tensor([[0, 1, 2, 4], [1, 0, 4, 2]])
    edge_index[row, 2] = atom
    with (
        use_backend(backend),
        pytest.raises(IndexError, match=f"row {row}.*{atom}.*{N_ATOMS} atoms"),
    ):
        build_edge_frame(vectors(), edge_index, n_atoms=N_ATOMS, lmax=LMAX, mmax=LMAX)


def raw_rotation(index: Tensor, wigner: Tensor) -> Tensor:
    x = torch.randn(N_ATOMS, (LMAX + 1) ** 2, CHANNELS)
    return edge_rotation.gather_rotate(x, None, vectors(), wigner, [index], [], "cpu")


def raw_scatter(index: Tensor, wigner: Tensor) -> Tensor:
    rows = torch.randn(*wigner.shape[:2], CHANNELS)
    given = (rows, None, None, N_ATOMS, vectors(), wigner, [index], [], "cpu")
    return edge_rotation.rotate_scatter(*given)


def raw_torque(index: Tensor, wigner: Tensor) -> Tensor:
    x, rows = torch.randn(N_ATOMS, 9, CHANNELS), torch.randn(*wigner.shape[:2], CHANNELS)
    return edge_rotation.torque(x, rows, vectors(), wigner, [index], [], "cpu")


def raw_layer(index: Tensor, wigner: Tensor) -> Tensor:
    ends = torch.stack((torch.zeros_like(index), torch.zeros_like(index)))
    frame = build_edge_frame(vectors(), ends, n_atoms=N_ATOMS, lmax=LMAX, mmax=LMAX)
    with use_backend("cpu"):  # a frame that is made without its builder
        return escn_conv(torch.randn(N_ATOMS, 9, CHANNELS), replace(frame, target=index), *LAYER)


RAW: dict[str, Callable[..., Any]] = {
    "gather_rotate": raw_rotation,
    "rotate_scatter": raw_scatter,
    "torque": raw_torque,
    "escn_conv": raw_layer,
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("atom", OUTSIDE)
def test_a_kernel_called_without_a_frame_reads_no_atom_beyond_the_last(
    name: str, atom: int
) -> None:
    good = torch.tensor([0, 1, 2, 4])
    index = good.clone()
    index[3] = atom
    frame = build_edge_frame(
        vectors(), torch.stack((good, good)), n_atoms=N_ATOMS, lmax=LMAX, mmax=LMAX
    )
    RAW[name](good, frame.wigner)
    with pytest.raises(IndexError):
        RAW[name](index, frame.wigner)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("atom", OUTSIDE)
def test_sums_name_no_segment_beyond_the_last(backend: str, atom: int) -> None:
    index, x = torch.tensor([0, 1, atom]), torch.randn(3, 2)
    with use_backend(backend):
        for operation in (segment_sum, segment_softmax):
            with pytest.raises((IndexError, RuntimeError), match=r"segment|index"):
                operation(x, index, N_ATOMS)
        edge_index = torch.stack((index, torch.zeros_like(index)))
        with pytest.raises(IndexError, match="edge_index"):
            cg_conv(torch.randn(5, 1, 2), torch.randn(3, 1), None, edge_index, 5, [Path(0, 0, 0)])


@pytest.mark.parametrize("seed", range(6))
def test_kernels_agree_with_the_reference_for_any_size_stride_and_index(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    n_atoms, n_edges, channels = (
        int(torch.randint(low, high, (), generator=random))
        for low, high in ((1, 9), (0, 40), (1, 19))
    )
    ends = torch.randint(0, n_atoms, (n_edges, 2), generator=random)
    if seed % 2:
        ends = ends.to(torch.int32)
    x = torch.randn(n_atoms, channels, 9, generator=random).transpose(1, 2)  # any strides
    weight = torch.randn(3, channels, generator=random)
    results = []
    for backend in BACKENDS:
        with use_backend(backend):
            frame = build_edge_frame(
                torch.randn(n_edges, 3, generator=torch.Generator().manual_seed(seed)),
                ends.T, n_atoms=n_atoms, lmax=LMAX, mmax=seed % 3,
            )  # fmt: skip
            rows = rotate_to_edge(x, frame, side="both")
            back = rotate_from_edge(rows[..., ::2], frame)
            paths = [Path(0, 0, 0), Path(1, 1, 2), Path(2, 2, 0)]
            y = torch.ones(9, n_edges).cumsum(0).T
            found = (rows, back, cg_conv(x, y, weight, ends.T, n_atoms, paths))
            if seed % 3 == LMAX:
                maps = (weights(2 * channels, 4, LMAX * 4), weights(4, channels, 0))
                found = (*found, escn_conv(x, frame, *maps))
            results.append(found)
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-4, atol=1e-4)  # sums in float32
