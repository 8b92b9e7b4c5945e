"""Published files of MACE: read without running anything, carried over, refused by name."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from golden_cases import case_graph
from safetensors.torch import load_file

from atomeq.cli import main
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.heads import HeadedPotential
from atomeq.potential.import_mace import mace_potential, read_mace
from atomeq.potential.inert_modules import Inert, read_module
from atomeq.potential.official_names import OfficialError
from atomeq.potential.untrusted import FitsWeights

GOLDEN = Path(__file__).parents[1] / "golden" / "mace"
PUBLISHED = GOLDEN / "fake_published.model"
OXIDE = GOLDEN / "p2_bulk_mp0like_l3_nu3_1o"
HEADS = GOLDEN / "p5_heads_3L_l2_2e"
ROUNDED_ONCE = 1e-6  # weights of other couplings are rounded to float32


def written(path: Path, content: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
    return path


class Calling:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_published_file_says_what_it_is_and_its_couplings_are_ours():
    options, state = read_mace(PUBLISHED)
    assert options["interactions"] == [
        "RealAgnosticDensityInteractionBlock",
        "RealAgnosticDensityResidualInteractionBlock",
    ]
    assert options["avg_num_neighbors"] == [7.25, 7.25]
    potential = mace_potential(options, state)
    form = potential.model.form
    assert form.all_couplings  # U matrices of the file, compared one by one
    assert (form.transform, form.repulsion) == ("agnesi", True)
    assert potential.elements == (1, 6, 8, 12, 22, 29)
    assert float(potential.references.scale) == pytest.approx(0.804)


def test_it_becomes_a_potential_of_the_same_energies(tmp_path, capsys):
    main(["convert", str(PUBLISHED), str(tmp_path / "made")])
    graph = case_graph(OXIDE)
    loaded = load_potential(tmp_path / "made")
    before = mace_potential(*read_mace(PUBLISHED))
    for potential in (loaded, before):
        potential.double()
    ours, theirs = (p(graph, ("energy", "forces")) for p in (loaded, before))
    assert torch.equal(ours["energy"], theirs["energy"])
    assert torch.equal(ours["forces"], theirs["forces"])
    card = (tmp_path / "made" / "README.md").read_text()
    assert "fake_published.model" in card
    assert "RealAgnosticDensityResidualInteractionBlock" in card


def test_other_couplings_of_the_same_products_give_the_same_energies():
    """As files of the reduced basis have them: other columns, other numbers."""
    options, state = read_mace(PUBLISHED)
    graph = case_graph(OXIDE)
    expected = mace_potential(options, state).double()(graph, ("energy", "forces"))
    torch.manual_seed(1)
    for name in [n for n in state if "U_matrix_2" in n]:
        turn = torch.linalg.qr(torch.randn(state[name].shape[-1], state[name].shape[-1])).Q
        state[name] = state[name] @ turn
        weights = name.replace("U_matrix_2", "weights_max")
        state[weights] = turn.T @ state[weights]
    potential = mace_potential(options, state)
    assert not potential.model.form.all_couplings
    found = potential.double()(graph, ("energy", "forces"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=ROUNDED_ONCE, atol=ROUNDED_ONCE)


def test_weights_beside_which_tables_are_joined_are_no_giants():
    """A description may make more than its weights say; in a fresh process it makes the tables."""
    with FitsWeights({"one": torch.zeros(1)}):
        assert torch.stack([torch.ones(2), torch.ones(2)]).sum() == 4


def test_couplings_of_no_rotation_are_refused():
    options, state = read_mace(PUBLISHED)
    name = next(n for n in state if "U_matrix_2" in n)
    state[name] = state[name] + torch.rand_like(state[name])
    with pytest.raises(OfficialError, match="none of O"):
        mace_potential(options, state)


def test_what_a_file_names_beyond_the_list_is_refused_and_not_called(tmp_path):
    marker = tmp_path / "called"
    path = written(tmp_path / "bad.model", Calling(os.mkdir, str(marker)))
    with pytest.raises(OfficialError, match=r"posix\.mkdir"):
        read_mace(path)
    assert not marker.exists()


def test_names_of_the_list_are_records(tmp_path):
    """What executes text where it is real, is given it here and keeps it."""
    stream = b"ctorch.fx.graph_module\nreduce_graph_module\n(X\x05\x00\x00\x001 / 0tR."
    path = tmp_path / "text.model"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
    record = read_module(path, frozenset({"torch.fx.graph_module reduce_graph_module"}))
    assert isinstance(record, Inert)
    assert record.given == ("1 / 0",)
    with pytest.raises(OfficialError, match="holds a reduce_graph_module"):
        read_mace(path)


def test_tensors_stay_inside_of_their_storage(tmp_path):
    stream = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00K\x40\x85K\x01\x85\x89)tR."
    )
    path = tmp_path / "beyond.model"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/data/0", bytes(8))
    with pytest.raises(OfficialError, match="out of bounds"):
        read_mace(path)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.model").write_text("no zip")
    with pytest.raises(OfficialError, match="no file of a module"):
        read_mace(tmp_path / "text.model")
    with pytest.raises(OfficialError, match="holds a dict"):
        read_mace(written(tmp_path / "dict.model", {"a": 1}))


def heads_options() -> dict:
    return {
        "interactions": ["RealAgnosticResidualInteractionBlock"] * 3,
        "avg_num_neighbors": 7.25,
        "heads": ["pt_head", "Default"],
    }


def test_a_head_is_chosen_by_its_name():
    state = load_file(HEADS / "weights.safetensors")
    with pytest.raises(OfficialError, match="has to be chosen: the file has pt_head, Default"):
        mace_potential(heads_options(), state)
    with pytest.raises(OfficialError, match="'PBE' does not exist"):
        mace_potential(heads_options(), state, head="PBE")
    scales = [
        float(mace_potential(heads_options(), state, head=head).references.scale)
        for head in ("pt_head", "Default")
    ]
    assert scales == pytest.approx([0.8, 1.1])


def test_all_heads_are_converted_into_one_folder(tmp_path, capsys):
    state = load_file(HEADS / "weights.safetensors")
    torch.save(state, tmp_path / "state.pt")
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(heads_options()))
    words = ["convert", str(tmp_path / "state.pt"), str(tmp_path / "made")]
    main([*words, "--config", str(tmp_path / "options.yaml")])
    assert "with the heads pt_head, Default" in capsys.readouterr().out
    graph, energies = case_graph(HEADS), []
    for head in ("pt_head", "Default"):
        loaded = load_potential(f"{tmp_path}/made@{head}")
        alone = mace_potential(heads_options(), state, head=head).eval()
        found, expected = (one(graph, ("energy", "forces")) for one in (loaded, alone))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)
        energies.append(float(found["energy"][0]))
    assert abs(energies[0] - energies[1]) > 1e-3
    other = mace_potential(heads_options(), state, head="Default")
    other.model.embedding.weights["0e"].data += 1.0
    with pytest.raises(ValueError, match="b has a network of its own"):
        HeadedPotential.of({"a": alone, "b": other})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"interactions": ["AgnosticNonlinearBlock"] * 3}, "AgnosticNonlinearBlock"),
        ({"avg_num_neighbors": [7.0, 8.0, 8.0]}, r"\[7.0, 8.0\]"),
        ({"interactions": ["RealAgnosticInteractionBlock"] * 3}, "do not fit"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, complaint):
    state = load_file(HEADS / "weights.safetensors")
    with pytest.raises(OfficialError, match=complaint):
        mace_potential({**heads_options(), **changes}, state, head="Default")


def test_trained_wave_numbers_are_refused():
    state = load_file(HEADS / "weights.safetensors")
    state["radial_embedding.bessel_fn.bessel_weights"] *= 1.01
    with pytest.raises(OfficialError, match="wave numbers"):
        mace_potential(heads_options(), state, head="Default")


def test_options_of_other_files_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(PUBLISHED), str(tmp_path / "made"), "--modal", "PBE"])
    assert "MACE" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_state_dict_converts_with_what_it_does_not_say(tmp_path, capsys):
    options, state = read_mace(PUBLISHED)
    torch.save(state, tmp_path / "state.pt")
    made, config = tmp_path / "made", tmp_path / "options.yaml"
    words = ["convert", str(tmp_path / "state.pt"), str(made)]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "does not say its interactions" in capsys.readouterr().err
    config.write_text(yaml.safe_dump({"interactions": options["interactions"], "layers": 2}))
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--config", str(config)])
    assert "layers is unknown" in capsys.readouterr().err
    assert not made.exists()

    config.write_text(yaml.safe_dump(options))
    main([*words, "--config", str(config)])
    graph = case_graph(OXIDE)
    expected = mace_potential(options, state)(graph, ("energy",))["energy"]
    assert torch.equal(load_potential(made)(graph, ("energy",))["energy"], expected)
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(PUBLISHED), str(tmp_path / "other"), "--config", str(config)])
    assert "leave out --config" in capsys.readouterr().err
