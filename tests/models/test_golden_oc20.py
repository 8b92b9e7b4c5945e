"""Published eSCN and EquiformerV2: how equivariant they are, and what their checker says."""

import json
import shutil

import pytest
import torch
from golden_cases import GOLDEN, SLAB, case_graph, case_model

from benchmarks.grid_resolution import main as grid_table
from benchmarks.grid_resolution import rotation_errors
from checkers.oc20 import compare_edges
from checkers.registry import main

pytestmark = pytest.mark.golden


def test_deviation_is_reported_and_fails(tmp_path, capsys):
    source = GOLDEN / "oc20_models" / "escn_p1_mol_L2M2"
    shutil.copytree(source, tmp_path / "case")
    case = json.loads((source / "case.json").read_text())
    case["config"]["basis_width_scalar"] = 1.001
    (tmp_path / "case" / "case.json").write_text(json.dumps(case))
    assert main([str(tmp_path)]) == 1
    assert "beyond: case" in capsys.readouterr().out


def test_unknown_layout_fails(tmp_path, capsys):
    (tmp_path / "case.json").write_text('{"model": "painn", "config": {}}')
    assert main([str(tmp_path)]) == 1
    assert "no layout for model 'painn'" in capsys.readouterr().out


def test_builder_finds_the_edges_of_the_reference():
    for name in ("eqv2_p2_slab_L4M2_oc20style", "escn_p2_slab_L4M2"):
        folder = GOLDEN / "oc20_models" / name
        note = compare_edges(case_model(folder), case_graph(folder))
        assert note == "edges built here: 280, 0 other than the reference's"


@pytest.mark.parametrize(
    ("grid_resolution", "expected"),
    # Of this case's weights in float32; other weights, other figures, the same steep fall.
    [(10, 1.5e-1), (14, 2.3e-2), (18, 4.7e-3), (24, 8.0e-4), (32, 9.2e-5), (40, 9.2e-6)],
)
def test_equivariance_error_falls_with_the_grid(grid_resolution, expected):
    model = case_model(SLAB)
    model.set_grid_resolution(grid_resolution)
    error, _ = rotation_errors(model, case_graph(SLAB))
    assert expected / 2 < error < 2 * expected


def test_the_table_of_grids_is_printed(capsys):
    assert grid_table([str(SLAB), "--grids", "18", "32"]) == 0
    coarse, fine = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:])
    assert fine < coarse / 20


def test_grid_resolution_can_be_changed_at_inference_and_is_remembered():
    model, finer = case_model(SLAB), case_model(SLAB, grid_resolution=32)
    model.set_grid_resolution(32)
    graph = case_graph(SLAB)
    assert model.config() == finer.config()
    assert torch.equal(model(graph)["energies"], finer(graph)["energies"])


def test_frame_has_no_randomness():
    model, graph = case_model(SLAB), case_graph(SLAB)
    first = model(graph)
    torch.manual_seed(1)
    second = model(graph)
    assert all(torch.equal(first[key], second[key]) for key in first)
