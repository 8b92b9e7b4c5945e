import pytest
import torch
import yaml
from structures import rattled_crystal

from atomeq.models.egnn import EGNN
from atomeq.models.escn import ESCN
from atomeq.potential.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    load_potential,
    resolve_device,
    save_potential,
    untrained_potential,
)
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

SMALL = {
    EGNN: {"cutoff": 4.0, "num_layers": 1, "hidden_channels": 8},
    ESCN: {"cutoff": 4.0, "num_layers": 1, "sphere_channels": 4, "hidden_channels": 4},
}


@pytest.fixture(params=SMALL, ids=lambda model: model.__name__)
def potential(request) -> Potential:
    torch.manual_seed(0)
    model = request.param(**SMALL[request.param])
    return Potential(model, AtomicReferences({8: -432.1, 12: -1.25}, scale=1.5)).eval()


def test_what_is_loaded_is_what_was_saved(potential, tmp_path):
    save_potential(potential, tmp_path / "p", metadata={"data": "none"})
    loaded = load_potential(tmp_path / "p")
    graph = potential.build_graph(rattled_crystal())
    expected, result = potential(graph), loaded(graph)
    for name, tensor in potential.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    # Not bit for bit: matrix products may round by the alignment of a tensor in memory.
    torch.testing.assert_close(result["energy"], expected["energy"], rtol=1e-7, atol=0)
    torch.testing.assert_close(result["forces"], expected["forces"], rtol=1e-5, atol=1e-5)
    assert loaded.elements == (8, 12)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_dtype_is_the_saved_one_unless_asked(potential, tmp_path):
    save_potential(potential, tmp_path)
    assert load_potential(tmp_path).dtype == torch.float32
    double = load_potential(tmp_path, dtype=torch.float64)
    assert double.dtype == torch.float64
    graph = potential.build_graph(rattled_crystal())
    assert double(graph)["energy"].item() == pytest.approx(potential(graph)["energy"].item(), 1e-6)


def test_saving_again_replaces_and_leaves_no_other_file(potential, tmp_path):
    save_potential(potential, tmp_path)
    with torch.no_grad():
        potential.model.embedding.weight += 1.0
    save_potential(potential, tmp_path)
    load_potential(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_flipped_bit_is_refused(potential, tmp_path):
    save_potential(potential, tmp_path)
    weights = tmp_path / WEIGHTS_FILE
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_potential(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_version": 99}, "version 1"),
        (
            {"model": {"class_path": "os.system", "init_args": {}}},
            "model 'os.system' is not registered",
        ),
        ({"model": "os.system"}, "'os.system' is no node"),
        ({"dtype": "float8"}, "float32 and float64"),
        ({"sha256": None}, "SHA-256"),
    ],
)
def test_altered_config_is_refused(potential, tmp_path, change, message):
    save_potential(potential, tmp_path)
    document = yaml.safe_load((tmp_path / CONFIG_FILE).read_text()) | change
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(document))
    with pytest.raises(CheckpointError, match=message):
        load_potential(tmp_path)


def test_unknown_init_argument_is_refused(potential, tmp_path):
    save_potential(potential, tmp_path)
    document = yaml.safe_load((tmp_path / CONFIG_FILE).read_text())
    document["model"]["init_args"]["cutof"] = 3.0
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(document))
    with pytest.raises(CheckpointError, match="cutof"):
        load_potential(tmp_path)


def test_python_tags_in_yaml_run_nothing(potential, tmp_path):
    save_potential(potential, tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / CONFIG_FILE).write_text(f"!!python/object/apply:os.mkdir ['{marker}']")
    with pytest.raises(CheckpointError, match="readable YAML"):
        load_potential(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 100])
def test_truncated_weights_are_refused(potential, tmp_path, keep):
    save_potential(potential, tmp_path)
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_potential(tmp_path)


def test_missing_names_say_what_is_known(tmp_path):
    with pytest.raises(CheckpointError, match="cu-pbe"):
        load_potential("no-such-potential")
    with pytest.raises(CheckpointError, match="no potential at"):
        load_potential(tmp_path)


def test_foreign_models_are_not_saved(tmp_path):
    class Foreign(EGNN):
        pass

    with pytest.raises(CheckpointError, match=r"Foreign cannot be saved: .* is not registered"):
        save_potential(Potential(Foreign(num_layers=1, hidden_channels=8)), tmp_path)


def test_an_untrained_potential_is_the_same_each_time_and_scales(tmp_path):
    config = tmp_path / "egnn.yaml"
    node = {"class_path": "atomeq.models.egnn.EGNN", "init_args": {"cutoff": 4.0}}
    config.write_text(yaml.safe_dump(node))
    atoms = rattled_crystal()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = untrained_potential(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    second = untrained_potential(config, scale=30.0)
    one, other = (p(p.build_graph(atoms)) for p in (first, second))
    torch.testing.assert_close(30.0 * one["forces"], other["forces"])
    assert one["forces"].abs().max() > 1e-4
    config.write_text("class_path: math.sqrt")
    with pytest.raises(CheckpointError, match=r"model 'math\.sqrt' is not registered"):
        untrained_potential(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that is asked for")
def test_absent_cuda_is_refused():
    with pytest.raises(ValueError, match="no CUDA GPU here"):
        resolve_device("cuda")


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="is not a device"):
        resolve_device("gpu0")
