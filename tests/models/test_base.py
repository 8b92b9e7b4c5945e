import pytest
import torch
from structures import rattled_crystal

from atomeq.models.base import AtomisticModel
from atomeq.models.egnn import EGNN
from atomeq.models.escn import ESCN
from atomeq.models.registry import MODELS
from atomeq.potential.checkpoint import build_model

#: The argument that takes another model, and the modules whose models have it.
WRAPPED = {
    "model": (".frame_averaged.", ".charged.", ".electric.", ".local_frames."),
    "encoder": (".equihgnn.",),
}


@pytest.mark.parametrize("class_path", MODELS.paths())
def test_config_builds_the_same_model_again(class_path):
    inner = {"class_path": "atomeq.models.egnn.EGNN", "init_args": {"cutoff": 3.5}}
    wraps = next((key for key in WRAPPED if any(one in class_path for one in WRAPPED[key])), None)
    given = {wraps: inner} if wraps else {"cutoff": 3.5}
    model = build_model({"class_path": class_path, "init_args": given})
    config = model.config()
    assert config["class_path"] == class_path
    innermost = config["init_args"][wraps] if wraps else config
    assert innermost["init_args"]["cutoff"] == model.cutoff == 3.5
    again = build_model(config)
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    assert {name: p.shape for name, p in again.state_dict().items()} == shapes
    assert again.config() == config


def test_a_model_without_forward_says_so():
    with pytest.raises(NotImplementedError, match="AtomisticModel does not define forward"):
        AtomisticModel()(None)


def test_escn_refuses_orders_above_its_degree():
    with pytest.raises(ValueError, match="mmax=3, lmax=2"):
        ESCN(lmax=2, mmax=3)


@pytest.mark.parametrize("model", [EGNN, ESCN])
def test_float32_and_float64_agree(model):
    torch.manual_seed(0)
    single = model(cutoff=4.0)
    graph = single.graph_builder()(rattled_crystal())
    double = model(**single.config()["init_args"]).double()
    double.load_state_dict(single.state_dict())
    expected = double(graph)["energies"]
    result = single(graph)["energies"]
    assert result.dtype == torch.float32
    assert expected.dtype == torch.float64
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-4)


def test_escn_of_scalars_only():
    graph = ESCN(lmax=0, mmax=0).graph_builder()(rattled_crystal())
    assert ESCN(lmax=0, mmax=0, num_layers=1)(graph)["energies"].shape == (8,)
