"""Parity with the tables that the reference eSCN and EquiformerV2 (fairchem-core 1.10.0) compute.

The file holds their outputs in float64, no code: Wigner matrices, row orders, grids, edge frames.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atomeq.ops.edge.wigner import block_diagonal, build_edge_frame, jd_matrix, wigner_from_matrix
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.orders import coefficient_index, m_primary_order
from atomeq.ops.sphere.grid import SphereGrid

pytestmark = pytest.mark.golden
FILE = Path(__file__).parents[1] / "golden" / "oc20_models" / "ops_f64.safetensors"
EXACT = 1e-12  # float64 rounding, ours and theirs


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.mark.parametrize("l", range(12))
def test_jd_matrices(golden: dict[str, Tensor], l: int) -> None:
    assert (jd_matrix(l) - golden[f"Jd.{l}"]).abs().max() <= EXACT


def test_wigner_matrices(golden: dict[str, Tensor]) -> None:
    matrices = block_diagonal(wigner_from_matrix(golden["wigner.rotmat"], 6))
    assert (matrices - golden["wigner.L6"]).abs().max() <= EXACT


def test_frame_of_a_published_rotation(golden: dict[str, Tensor]) -> None:
    vectors, rotation = golden["frame.edge_vec"], golden["frame.edge_rot_mat_fixed_gauge"]
    edge_index = torch.zeros(2, len(vectors), dtype=torch.long)
    frame = build_edge_frame(vectors, edge_index, n_atoms=1, lmax=4, mmax=2, rotation=rotation)
    aligned = frame.wigner @ spherical_harmonics(vectors, 4).unsqueeze(-1)
    pole = spherical_harmonics(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), 4)
    error = aligned.squeeze(-1) - pole[m_primary_order(4, 2)]
    assert error.abs().max() <= EXACT


@pytest.mark.parametrize(("lmax", "mmax"), [(2, 2), (3, 3), (4, 2), (6, 2), (6, 6)])
def test_orders_of_rows(golden: dict[str, Tensor], lmax: int, mmax: int) -> None:
    name = f"map.l{lmax}m{mmax}"
    rows = coefficient_index(lmax, mmax)
    assert golden[f"{name}.coefficient_idx"].tolist() == rows
    to_m = golden[f"{name}.to_m"].argmax(dim=1)
    assert [rows[place] for place in to_m] == m_primary_order(lmax, mmax)
    assert golden[f"{name}.m_size"].tolist() == [lmax + 1 - m for m in range(mmax + 1)]


def test_sphere_grids(golden: dict[str, Tensor]) -> None:
    names = [name for name in golden if name.startswith("grid.")]
    assert names
    for name in names:
        model, degrees, *normalization, way = name.split(".")[1:]
        match = re.fullmatch(r"l(\d+)m(\d+)r(\w+)", degrees)
        assert match is not None
        resolution = None if match[3] == "None" else int(match[3])
        grid = SphereGrid(
            int(match[1]),
            int(match[2]),
            n_beta=resolution,
            n_alpha=resolution,
            normalization=normalization[0] if normalization else "integral",
            rescale=model == "eqv2",
        )
        like = golden[name]
        matrix = grid.to_matrix(like=like) if way == "to" else grid.from_matrix(like=like).T
        assert (matrix.view_as(like) - like).abs().max() <= EXACT, name


def test_harmonics_at_points_off_the_unit_sphere(golden: dict[str, Tensor]) -> None:
    values = spherical_harmonics(
        golden["sphere_points.64"], 4, normalize=False, normalization="integral"
    )
    assert (values - golden["sphharm.L4.64"]).abs().max() <= EXACT
