"""What files may name: classes of the package by their module, others by entry points alone."""

import subprocess
import sys

import pytest
import torch
import yaml
from installed import install
from small_potential import small_potential

from atomeq.models.egnn import EGNN
from atomeq.models.registry import MODELS, PROPAGATORS, build
from atomeq.ops import dispatch
from atomeq.ops.dispatch import load_backend, use_backend
from atomeq.ops.explain import explain
from atomeq.potential.checkpoint import CheckpointError, load_potential, save_potential
from atomeq.potential.potential import Potential
from atomeq.potential.terms import TERMS
from atomeq.registry import RegistryError

FOREIGN = """
import torch
from atomeq.models.egnn import EGNN
from atomeq.potential.terms import EnergyTerm

class Foreign(EGNN):
    pass

class Unnamed(EGNN):
    pass

class Constant(EnergyTerm):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, graph):
        return graph.pos.new_full((graph.n_atoms,), self.value)

class Wrong:
    def refusal(self, spec):
        return None

    def segment_sum(self, x, index, n_segments):
        return x.new_full((n_segments, *x.shape[1:]), 42.0)
"""
OFFERS = {
    "atomeq.models": {
        "Foreign": "foreign_models:Foreign",
        "Elsewhere": "foreign_models:EGNN",
        "NoModel": "foreign_models:Constant",
        "Broken": "broken_models:Broken",
    },
    "atomeq.terms": {"Constant": "foreign_models:Constant"},
    "atomeq.backends": {"wrong": "foreign_models:Wrong", "cpu": "foreign_models:Wrong"},
}


@pytest.fixture
def foreign(monkeypatch, tmp_path):
    modules = {"foreign_models": FOREIGN, "broken_models": "raise OSError('no licence')"}
    install(monkeypatch, tmp_path / "site", name="foreign", entry_points=OFFERS, modules=modules)


def test_every_class_of_the_package_is_found_and_is_what_it_is_called():
    for registry, known in (
        (MODELS, "atomeq.models.escn.ESCN"),
        (PROPAGATORS, "atomeq.models.segno.SEGNOPropagator"),
        (TERMS, "atomeq.potential.repulsion.ZBL"),
    ):
        paths = registry.paths()
        assert known in paths
        for path in paths:
            found = registry.find(path)
            assert f"{found.__module__}.{found.__qualname__}" == path
            assert registry.find(found.__name__) is found
    assert not [path for path in MODELS.paths() if "OverFrames" in path or ".base." in path]


def test_a_path_imports_the_module_it_names_and_no_other_model():
    command = (
        "import sys; from atomeq.models.registry import MODELS\n"
        "MODELS.find('atomeq.models.egnn.EGNN')\n"
        "here = {name for name in sys.modules if name.startswith('atomeq.models.')}\n"
        "sys.exit(here != {f'atomeq.models.{name}' for name in ('base', 'registry', 'egnn')})"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


@pytest.mark.parametrize(
    "path",
    [
        *("os.system", "atomeq.models.egnn.MLP", "atomeq.models.egnn.EGNNLayer", "", None),
        *("atomeq.models.escn.EGNN", "atomeq.models.base.AtomisticModel", "atomeq.models.egnn"),
        *("atomeq.models.frame_averaged.OverFrames", "atomeq.models.segno.SEGNOPropagator"),
        *("foreign_models.Unnamed", "foreign_models.Constant", "atomeq.models.egnn.EGNN.config"),
    ],
)
def test_nothing_else_is_a_model(foreign, path):
    with pytest.raises(RegistryError):
        MODELS.find(path)
    if path == "foreign_models.Unnamed":  # nothing was imported to find that out
        assert "foreign_models" not in sys.modules


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("atomeq.models.segno.SENGO", r"did you mean 'atomeq\.models\.segno\.SEGNO'\?"),
        ("ESCNN", r"did you mean 'atomeq\.models\.escn\.ESCN'\?"),
        ("foreign_models.ForeignX", r"did you mean 'foreign_models\.Foreign'\?"),
        ("os.system", r"there are .*atomeq\.models\.egnn\.EGNN, .* group 'atomeq\.models'"),
        ("foreign_models.EGNN", r"its entry point has to name atomeq\.models\.egnn\.EGNN"),
        ("broken_models.Broken", r"foreign offers 'broken_models:Broken'.*no licence"),
        ("foreign_models.Constant", "no subclass of AtomisticModel"),
        ("EGNN", "may be any of atomeq.models.egnn.EGNN, foreign_models.EGNN"),
    ],
)
def test_a_name_that_is_not_there_says_what_is(foreign, path, message):
    with pytest.raises(RegistryError, match=message):
        MODELS.find(path)


def test_what_one_distribution_has_broken_leaves_the_others(foreign, caplog):
    names = {model.__name__ for model in MODELS.import_all()}
    assert {"EGNN", "ESCN", "Foreign"} <= names
    assert sum("no licence" in record.message for record in caplog.records) == 1


def test_a_model_and_a_term_of_another_distribution_are_saved_and_loaded(foreign, tmp_path):
    import foreign_models  # pyright: ignore[reportMissingImports]

    model = foreign_models.Foreign(cutoff=4.0, num_layers=1, hidden_channels=8)
    terms = [foreign_models.Constant(2.5)]
    potential = Potential(model, terms=terms).double()
    save_potential(potential, tmp_path / "saved")
    loaded = load_potential(tmp_path / "saved")
    assert type(loaded.model) is foreign_models.Foreign
    assert loaded.fingerprint() == potential.fingerprint()
    with pytest.raises(CheckpointError, match="Unnamed cannot be saved"):
        save_potential(Potential(foreign_models.Unnamed(cutoff=4.0)), tmp_path / "unnamed")
    assert not (tmp_path / "unnamed").exists()


def test_a_saved_model_whose_distribution_is_gone_says_so(tmp_path):
    save_potential(small_potential(), tmp_path)
    text = (tmp_path / "model.yaml").read_text()
    (tmp_path / "model.yaml").write_text(text.replace("atomeq.models.egnn.EGNN", "gone.Net"))
    with pytest.raises(CheckpointError, match=r"model.yaml: the model 'gone.Net' is not"):
        load_potential(tmp_path)


def test_a_backend_of_another_distribution_serves_when_it_is_named(foreign, monkeypatch):
    monkeypatch.setattr(dispatch, "_loaded", dict(dispatch._loaded))
    x, index = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    from atomeq.ops.segment.operations import segment_sum

    with use_backend("wrong"):
        assert segment_sum(x, index, 2).eq(42).all()
    monkeypatch.setenv("ATOMEQ_BACKEND", "wrong")
    assert segment_sum(x, index, 2).eq(42).all()
    monkeypatch.delenv("ATOMEQ_BACKEND")
    assert segment_sum(x, index, 2).eq(2).all()
    assert load_backend("cpu", "segment").__name__.startswith("atomeq.")  # no name of ours is taken
    cases = {"lmax": 2, "mmax": 2, "channels": 16, "n_edges": 100, "device": "cpu"}
    report = explain("segment_sum", dtype=torch.float32, **cases)
    assert "only when asked for by name" in report.refusals["wrong"]
    with pytest.raises(ValueError, match="did you mean 'wrong'"), use_backend("wrnog"):
        pass


class Grown(EGNN):
    """EGNN as if its hidden_channels had been called width, and its weights net.*, before."""

    checkpoint_version = 3

    @classmethod
    def upgrade(cls, version, init_args, weights):
        if version < 2:
            init_args = {"hidden_channels": init_args.pop("width"), **init_args}
        return init_args, {name.removeprefix("net."): value for name, value in weights.items()}


@pytest.fixture
def grown(monkeypatch):
    find = MODELS.find
    monkeypatch.setattr(
        MODELS, "find", lambda path: Grown if str(path).endswith("Grown") else find(path)
    )


def test_an_older_checkpoint_is_brought_to_the_version_of_its_class(grown):
    model = Grown(cutoff=4.0, num_layers=1, hidden_channels=8)
    node = model.config()
    assert node["checkpoint_version"] == 3
    assert "checkpoint_version" not in EGNN().config()  # of files that are there already
    init_args = {**node["init_args"], "width": node["init_args"]["hidden_channels"]}
    del init_args["hidden_channels"]
    old = {"class_path": node["class_path"], "init_args": init_args}
    weights = {f"model.inner.net.{name}": value for name, value in model.state_dict().items()}
    weights["references.scale"] = torch.ones(())
    build(old, MODELS, weights, "model.inner.")
    expected = {f"model.inner.{name}" for name in model.state_dict()} | {"references.scale"}
    assert weights.keys() == expected
    assert build(node, MODELS).config() == node


@pytest.mark.parametrize(
    ("version", "message"),
    [(4, "reads up to 3; update"), ("new", "reads up to 3"), (1, "from version 1: 'width'")],
)
def test_a_version_that_cannot_be_read_is_refused(grown, version, message):
    node = {"class_path": "tests.Grown", "init_args": {}, "checkpoint_version": version}
    with pytest.raises(RegistryError, match=message):
        build(node, MODELS)


def test_a_class_that_counts_up_has_to_say_how():
    class Forgotten(EGNN):
        checkpoint_version = 2

    with pytest.raises(ValueError, match="Forgotten is at version 2, not 1"):
        Forgotten.upgrade(1, {}, {})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: delattr(model, "num_layers"), "keep_arguments"),
        (lambda model: setattr(model, "cutoff", torch.tensor(4.0)), "no plain values"),
        (lambda model: setattr(model, "again", model.embedding.weight), "weights cannot be saved"),
    ],
)
def test_what_could_not_be_built_again_is_not_saved(tmp_path, spoil, message):
    potential = small_potential()
    spoil(potential.model)
    with pytest.raises(CheckpointError, match=message):
        save_potential(potential, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_yaml_of_a_model_may_leave_the_module_out(tmp_path):
    from atomeq.potential.checkpoint import untrained_potential

    (tmp_path / "egnn.yaml").write_text(yaml.safe_dump({"class_path": "EGNN"}))
    assert type(untrained_potential(tmp_path / "egnn.yaml").model) is EGNN
