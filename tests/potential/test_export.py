"""A compiled potential gives the numbers of the one it was made from, and refuses all else."""

import copy
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from structures import RATTLED, rattled_crystal, rattled_molecule
from torch._inductor import config as inductor_config
from torch.utils import cpp_extension

import atomeq
from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.dynamics.run import relax
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.hyperedges import INFO_KEY
from atomeq.models.egnn import EGNN
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.escn import ESCN
from atomeq.potential import export
from atomeq.potential.checkpoint import CheckpointError, save_potential, untrained_potential
from atomeq.potential.compiled import (
    CompiledPotential,
    graph_fields,
    load_compiled,
    read_metadata,
)
from atomeq.potential.export import ExportError, export_potential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.repulsion import ZBL

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
ELEMENTS = dict.fromkeys((1, 6, 8, 12, 29), -10.0)
DOUBLE = 1e-10  # eV, eV/Å, eV/Å³: sums in another order
SINGLE = 2e-5
MODELS = {
    "egnn": lambda: EGNN(cutoff=4.0, num_layers=1, hidden_channels=16, num_radial=6),
    "escn": lambda: ESCN(
        cutoff=4.0, num_layers=1, sphere_channels=8, hidden_channels=8, edge_channels=8
    ),
}


def random_potential(name: str) -> Potential:
    torch.manual_seed(0)
    terms = [ZBL()] if name == "egnn" else []
    potential = Potential(MODELS[name](), AtomicReferences(ELEMENTS, scale=3.0), terms=terms)
    if name == "escn":
        potential.references.train_elements("scale")
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return potential.double().eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[Potential, CompiledPotential]:
    """A potential and what became of it."""
    potential = random_potential(request.param)
    path = tmp_path_factory.mktemp("compiled") / f"{request.param}.pt2"
    return potential, load_compiled(export_potential(potential, path))


def batches() -> list[list]:
    crystal, molecule = rattled_crystal(), rattled_molecule()
    return [
        *([make()] for make in RATTLED.values()),
        [molecule[:1]],  # no edges
        [molecule[:2]],
        [molecule, crystal, crystal[:3], molecule[:1]],
        [crystal.repeat((3, 2, 2)), crystal],
    ]


def assert_equal_results(
    potential: Potential, compiled: Potential, structures: list, tolerance: float
) -> None:
    graph = compiled.build_graph(structures)
    keys = ["energy", "energies", "forces"]
    if potential.conservative and bool((graph.volume() > 0).all()):
        keys.append("stress")
    expected, found = potential(graph, keys), compiled(graph, keys)
    for key in keys:
        assert found[key].dtype == expected[key].dtype
        assert torch.allclose(found[key], expected[key], rtol=tolerance, atol=tolerance), key


@pytest.mark.parametrize("structures", batches(), ids=len)
def test_results_are_those_of_the_potential(pair, structures):
    assert_equal_results(*pair, structures, DOUBLE)


def test_the_calculator_and_relaxations_take_it(pair):
    potential, compiled = pair
    atoms, reference = rattled_crystal(), rattled_crystal()
    atoms.calc, reference.calc = AtomeqCalculator(compiled), AtomeqCalculator(potential)
    assert np.allclose(atoms.get_stress(), reference.get_stress(), atol=DOUBLE)
    assert "hessian" not in atoms.calc.implemented_properties
    assert atoms.calc.provenance["sha256"] == reference.calc.provenance["sha256"]
    ends = [
        next(iter(relax([rattled_crystal()], one, max_steps=3))).atoms
        for one in (compiled, potential)
    ]
    assert np.allclose(ends[0].positions, ends[1].positions, atol=1e-8)


def test_copies_share_the_library_and_pickles_load_it_again(pair):
    _, compiled = pair
    assert copy.deepcopy(compiled) is compiled
    graph = compiled.build_graph(rattled_crystal())
    again = pickle.loads(pickle.dumps(compiled))
    assert torch.equal(again(graph)["forces"], compiled(graph)["forces"])


def test_what_a_library_cannot_do_is_refused(pair):
    potential, compiled = pair
    graph = compiled.build_graph(rattled_molecule())
    for refused, words in (
        (lambda: compiled(graph, create_graph=True), "no further derivatives"),
        (lambda: compiled(graph, ("stress",)), "volume"),
        (lambda: compiled(graph, ("charges",)), "unknown property"),
        (lambda: compiled(graph.replace(cell_offsets=None)), "lacks cell_offsets"),
        (lambda: compiled.float(), "cannot go to cpu in torch.float32"),
        (lambda: save_potential(compiled, "nowhere"), "weights cannot be had"),
        (lambda: export_potential(compiled, "again.pt2"), "compiled already"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    assert compiled.double().eval() is compiled
    assert compiled.elements == potential.elements


def test_nothing_in_the_package_is_a_pickle_and_it_tells_what_it_is(pair):
    potential, compiled = pair
    told = read_metadata(compiled.path)
    assert told["sha256"] == potential.fingerprint()
    assert (told["cutoff"], told["dtype"], told["elements"]) == (4.0, "float64", list(ELEMENTS))
    assert told["terms"] == potential.term_configs()
    with zipfile.ZipFile(compiled.path) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
        assert not any(name.endswith((".pkl", ".pt")) for name in archive.namelist())
    assert not any(content.startswith((b"\x80\x02", b"\x80\x04", b"PK")) for content in contents)


def test_only_load_compiled_loads_a_package(pair):
    _, compiled = pair
    for load in (atomeq.load_potential, AtomeqCalculator):
        with pytest.raises(CheckpointError, match="load_compiled"):
            load(compiled.path)


def test_a_package_for_another_machine_is_refused(pair, tmp_path):
    _, compiled = pair
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(compiled.path) as archive, zipfile.ZipFile(other, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("_metadata.json"):
                table = json.loads(content)
                told = json.loads(table["atomeq"])
                told["machine"]["processor"] = "riscv64 RVV"
                content = json.dumps({**table, "atomeq": json.dumps(told)}).encode()
            changed.writestr(name, content)
    with pytest.raises(CheckpointError, match="riscv64 RVV, and here it is"):
        load_compiled(other)


def test_what_is_no_package_is_refused(tmp_path):
    text, archive = tmp_path / "text.pt2", tmp_path / "archive.pt2"
    text.write_text("energy")
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("x_metadata.json", "{}")
    for path in (text, archive, tmp_path / "absent.pt2"):
        with pytest.raises(CheckpointError, match="no compiled potential"):
            load_compiled(path)


@pytest.mark.parametrize("name", ["faenet", "faenet_canonical"])
def test_a_model_whose_path_depends_on_positions_is_named(name, tmp_path):
    potential = untrained_potential(CONFIGS / f"{name}.yaml")
    with pytest.raises(ExportError, match=f"{type(potential.model).__name__} cannot be compiled"):
        export_potential(potential, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_error_says_so(tmp_path):
    with (
        inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ExportError, match="set CXX"),
    ):
        export_potential(random_potential("egnn"), tmp_path / "x.pt2")


def test_the_path_must_end_in_pt2(tmp_path):
    with pytest.raises(ValueError, match=r"does not end so"):
        export_potential(random_potential("egnn"), tmp_path / "x.so")


@pytest.mark.slow
def test_the_verb_compiles_the_shipped_potential(tmp_path, capsys):
    path = tmp_path / "cu.pt2"
    main(["export", "cu-pbe", "--out", str(path)])
    assert "energy, energies, forces, stress in float32" in capsys.readouterr().out
    compiled, potential = load_compiled(path), atomeq.load_potential("cu-pbe")
    copper = RATTLED["slab"]()
    assert_equal_results(potential, compiled, [copper, copper[:3]], SINGLE)
    assert read_metadata(path)["name"] == "cu-pbe"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("egnn", "escn", "esen", "segno", "equiformer_v2", "equiformer_v3", "equihgnn", "mace"),
        "nequip",
    ],
)
def test_models_of_the_configurations_compile(name, tmp_path):
    potential = untrained_potential(CONFIGS / f"{name}.yaml")
    compiled = load_compiled(export_potential(potential, tmp_path / "x.pt2"))
    bonded = rattled_molecule()
    if name == "equihgnn":
        bonded.info[INFO_KEY] = {"members": [[0, 1], [1, 2], [0, 1, 2]], "types": [0, 0, 1]}
    for structures in (*batches(), [bonded, bonded]):
        assert_equal_results(potential, compiled, structures, DOUBLE)


@pytest.mark.parametrize("direct_forces", [True, False])
def test_stress_of_a_head_is_compiled_as_it_is(direct_forces):
    """What is compiled, run as it is: the compiler takes minutes over attention."""
    model = EquiformerV2(
        cutoff=4.0, lmax=2, mmax=1, num_layers=1, sphere_channels=4, attn_hidden_channels=4,
        num_heads=2, ffn_hidden_channels=4, edge_channels=4, direct_forces=direct_forces,
        stress_head="equivariant",
    )  # fmt: skip
    potential = Potential(model, AtomicReferences(ELEMENTS, scale=3.0)).double().eval()
    fields = graph_fields(model)

    def library(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        graph = AtomGraph(**dict(zip(fields, values, strict=True)))
        return tuple(value.detach() for value in export._computed(potential, graph))

    description = export._description(potential, torch.device("cpu"))
    assert description["outputs"][-1] == "stress"
    compiled = CompiledPotential(library, Path("stress.pt2"), description)
    graph = potential.build_graph([rattled_crystal(), rattled_crystal()])
    keys = ("energy", "forces", "stress")
    expected, found = potential(graph, keys), compiled(graph, keys)
    for key in keys:
        torch.testing.assert_close(found[key], expected[key])


def test_a_potential_of_two_scales_is_not_compiled(tmp_path):
    potential = random_potential("egnn")
    potential.references = AtomicReferences(ELEMENTS, scale=3.0, force_scale=1.0)
    with pytest.raises(ExportError, match="apart from its energy"):
        export_potential(potential, tmp_path / "two.pt2")


def test_cuda_without_a_gpu_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    potential, path = Potential(EGNN(hidden_channels=8)), tmp_path / "x.pt2"
    with pytest.raises(ValueError, match="install a CUDA build of torch on a machine with a GPU"):
        export_potential(potential, path, device="cuda")
    monkeypatch.setattr(Potential, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="finds no CUDA GPU here"):
        export_potential(potential, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("without", "way_out"),
    [("toolkit", "set CUDA_HOME to its folder"), ("triton", r"pip install atomeq\[cuda\]")],
)
def test_cuda_without_what_compiles_for_it_is_refused(
    without: str, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(export, "find_spec", lambda name: without == "toolkit" or None)
    with pytest.raises(ExportError, match=way_out):
        export_potential(Potential(EGNN(hidden_channels=8)), tmp_path / "x.pt2", device="cuda")


def test_a_library_for_cuda_wants_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a package says of itself is read first, and on another machine nothing but that."""
    potential, path = random_potential("egnn"), tmp_path / "x.pt2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    told = {**export._description(potential, torch.device("cuda")), "sha256": "x", "name": None}
    assert (told["device"], told["machine"]["GPU"]) == ("cuda", "sm_90")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_metadata.json", json.dumps({"atomeq": json.dumps(told)}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA GPU here"):
        load_compiled(path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(CheckpointError, match="for GPU sm_90, and here it is sm_80"):
        load_compiled(path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    compiled = CompiledPotential(lambda *_: [], path, told)
    assert compiled.device == torch.device("cuda", 0)
    graph = potential.build_graph(rattled_molecule())
    with pytest.raises(ValueError, match="this graph is on cpu"):
        compiled(graph)


@pytest.mark.slow
@pytest.mark.triton
def test_a_library_for_cuda_compiles_for_sm_90_without_a_gpu() -> None:
    """All but the C++ of its host: the trace, its move, and machine code of every kernel."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.__version__.startswith("2.13"):
        pytest.skip("the pretence of a GPU knows torch 2.13")
    words = [sys.executable, str(Path(__file__).parents[1] / "fake_cuda.py"), "egnn", "escn"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]).values():
        assert found["operations"] > 100
        assert found["on_host"] == []
        assert found["for_sm_90"] == found["kernels"] > 10


@pytest.mark.gpu
@pytest.mark.skipif(cpp_extension.CUDA_HOME is None, reason="there is no CUDA toolkit here")
@pytest.mark.parametrize("name", MODELS)
def test_a_library_for_cuda_gives_the_numbers_of_the_potential(name: str, tmp_path: Path) -> None:
    potential = random_potential(name)
    compiled = load_compiled(export_potential(potential, tmp_path / "x.pt2", device="cuda"))
    assert compiled.device.type == "cuda"
    assert potential.device.type == "cpu"
    potential = potential.to(compiled.device)
    for structures in batches():
        assert_equal_results(potential, compiled, structures, DOUBLE)
    assert compiled.double() is compiled
    with pytest.raises(ValueError, match="cannot go to cpu"):
        compiled.cpu()
