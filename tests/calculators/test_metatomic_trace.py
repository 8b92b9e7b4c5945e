"""What becomes a metatomic model, as TorchScript alone; tests/doors has the engines' side."""

import sys
from pathlib import Path

import pytest
import torch
from small_models import EGNN, SMALL_MODELS, node, wrapped
from structures import RATTLED

from atomeq.calculators import metatomic
from atomeq.calculators.metatomic import export_metatomic
from atomeq.models.electric import Electric
from atomeq.potential.checkpoint import build_model, scatter_weights
from atomeq.potential.compiled import graph_fields
from atomeq.potential.export import ExportError
from atomeq.potential.mean import MeanPotential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.repulsion import ZBL

pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system")

ELEMENTS = dict.fromkeys((1, 6, 8, 12, 29), -10.0)
ROUNDING = 1e-11  # eV, eV/Å: sums in another order
GRID = {
    **SMALL_MODELS["equiformer_v2"],
    "init_args": {**SMALL_MODELS["equiformer_v2"]["init_args"], "feed_forward": "s2"},
}


def small(model: dict, **options) -> Potential:
    torch.manual_seed(0)
    potential = Potential(build_model(model), AtomicReferences(ELEMENTS, scale=3.0), **options)
    scatter_weights(potential)
    return potential.double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["egnn", "escn", "equiformer_v3", "grid"])
def test_energies_and_their_derivatives_are_those_of_the_potential(name: str) -> None:
    potential = small(SMALL_MODELS.get(name, GRID), terms=[ZBL()] if name == "egnn" else [])
    scripted = torch.jit.script(metatomic._trace(potential))
    assert "atomeq" not in str(scripted.inlined_graph)
    crystal, slab, molecule = (RATTLED[one]() for one in ("crystal", "slab", "molecule"))
    for structures in ([crystal, slab, crystal[:3]], [molecule, molecule[:1]], [molecule[:1]]):
        graph = potential.build_graph(structures)
        strain = torch.zeros_like(graph.cell, requires_grad=True)
        positions = graph.pos.clone().requires_grad_()
        moved = graph.replace(pos=positions).strained(strain)
        energies = scripted(*(moved[field] for field in graph_fields(potential.model)))
        found = torch.autograd.grad(energies.sum(), (positions, strain))
        stress = structures[0] is crystal
        keys = ("energies", "forces", *(["stress"] if stress else []))
        expected = potential(graph, keys)
        torch.testing.assert_close(energies, expected["energies"], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(-found[0], expected["forces"], atol=ROUNDING, rtol=0)
        if stress:
            work = expected["stress"] * graph.volume()[:, None, None]
            torch.testing.assert_close(found[1], work, atol=ROUNDING, rtol=0)


def test_what_engines_cannot_ask_for_is_refused(tmp_path: Path) -> None:
    frames = wrapped("frame_averaged", "FrameAveraged", model=SMALL_MODELS["faenet"])
    frames["init_args"]["model"] = node("faenet", "FAENet", hidden_channels=80)
    direct = node("equiformer_v2", "EquiformerV2", num_layers=1, direct_forces=True)
    nearest = node("equiformer_v2", "EquiformerV2", num_layers=1, max_neighbors=3)
    small_egnn = small(EGNN)
    for potential, words in (
        (small(frames), "depend on all of a structure"),
        (small(direct), "forces or properties of its own"),
        (small(nearest), "wants a NearestNeighborGraph"),
        (small(wrapped("charged", "Charged", model=EGNN)), "is told of charge, spin"),
        (Potential(Electric(build_model(EGNN))), "forces or properties of its own"),
        (MeanPotential([small_egnn, small(EGNN)]), "is a MeanPotential"),
    ):
        with pytest.raises(ExportError, match=words):
            export_metatomic(potential, tmp_path / "x.pt")
    with pytest.raises(ExportError, match="PONITA cannot be compiled"):
        metatomic._trace(small(SMALL_MODELS["ponita"]))
    with pytest.raises(ValueError, match="does not end so"):
        export_metatomic(small_egnn, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_without_metatomic_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "metatomic.torch", None)
    with pytest.raises(ImportError, match=r"pip install atomeq\[metatomic\]"):
        export_metatomic(small(EGNN), tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    potential = small(EGNN)
    monkeypatch.setattr(Potential, "device", torch.device("cuda"))
    with pytest.raises(ExportError, match=r"is on cuda.*give potential\.cpu\(\)"):
        export_metatomic(potential, tmp_path / "x.pt")
