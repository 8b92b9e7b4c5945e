"""Inside ``torch.inference_mode()`` derivatives are what they are outside, and never zeros."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from small_potential import small_potential
from torch import Tensor

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.dynamics.run import relax
from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.models.faenet import FAENet
from atomeq.nn.element_properties import element_properties
from atomeq.potential import export
from atomeq.potential.checkpoint import load_potential, save_potential, untrained_potential
from atomeq.potential.derivatives import force_constants
from atomeq.potential.potential import Potential

CONFIGS = sorted((Path(__file__).parents[2] / "configs/model").glob("*.yaml"))
SAME = 1e-10  # relative and absolute; the same float64 operations in another mode of torch


def crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_model_has_the_same_forces_and_stress(config: Path):
    potential = untrained_potential(config, scale=1000.0)  # outputs of such weights are small
    atoms = molecule("CH3CH2OH", cell=[9.0, 9.0, 9.0], pbc=True)
    keys = ("energy", "forces", "stress")
    graph = potential.build_graph(atoms)
    outside = potential(graph, keys)
    with torch.inference_mode():
        assert_same(potential(potential.build_graph(atoms), keys), outside)  # a graph made inside
        assert_same(potential(graph, keys), outside)
    assert float(outside["forces"].abs().max()) > 1e-4
    assert float(outside["stress"].abs().max()) > 0


def test_hessian_is_the_same():
    potential = small_potential()
    graph = potential.build_graph(crystal())
    outside = force_constants(potential, graph, max_edges=1000)
    with torch.inference_mode():
        inside = force_constants(potential, potential.build_graph(crystal()), max_edges=1000)
    torch.testing.assert_close(inside, outside, rtol=SAME, atol=SAME)
    assert float(outside.abs().max()) > 1e-3


def test_weights_made_inside_serve_inside_and_outside(tmp_path: Path):
    wanted = small_potential()
    save_potential(wanted, tmp_path)
    graph = wanted.build_graph(crystal())
    outside = wanted(graph, ("energy", "forces"))
    for use_inside in (True, False):
        with torch.inference_mode():
            made = [load_potential(tmp_path), small_potential()]
        for potential in made:
            with torch.inference_mode(use_inside):
                assert_same(potential(graph, ("energy", "forces")), outside)


def test_a_calculator_gives_the_same_inside_and_after():
    atoms = crystal()
    atoms.calc = AtomeqCalculator(small_potential())
    wanted = [atoms.get_forces(), atoms.get_stress(), atoms.calc.get_hessian(atoms)]
    with torch.inference_mode():
        atoms.calc = AtomeqCalculator(small_potential())
        inside = [atoms.get_forces(), atoms.get_stress(), atoms.calc.get_hessian(atoms)]
    moved = crystal()
    moved.positions += 0.3  # the calculator's neighbours and results of inside are remembered
    moved.calc = atoms.calc
    after = [moved.get_forces(), moved.get_stress(), atoms.calc.get_hessian(moved)]
    for found in (inside, after):
        for value, reference in zip(found, wanted, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-7, atol=1e-9)


def test_relaxations_move_and_end_where_they_end_outside():
    def batched() -> np.ndarray:
        (result,) = relax([crystal()], small_potential(), fmax=0.05, max_steps=5)
        return result.atoms.positions

    def one_by_one() -> np.ndarray:
        atoms = crystal()
        atoms.calc = AtomeqCalculator(small_potential())
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=5)
        return atoms.positions

    for relaxed in (batched, one_by_one):
        outside = relaxed()
        with torch.inference_mode():
            inside = relaxed()
        np.testing.assert_allclose(inside, outside, atol=1e-8)
        assert np.abs(outside - crystal().positions).max() > 1e-3


class _LeavesAutograd(AtomisticModel):
    """A network that computes outside autograd; trained weights may hide that by requiring grad."""

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.cutoff = 4.0
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, graph: AtomGraph) -> dict[str, Tensor]:
        lengths = graph.edge_vectors().detach().norm(dim=1)
        energies = lengths.new_zeros(graph.n_atoms).index_add(0, graph.edge_index[1], lengths)
        return {"energies": energies * (self.weight if self.weighted else self.weight.detach())}


@pytest.mark.parametrize("weighted", [True, False])
def test_zeros_come_from_the_graph_and_never_from_autograd(weighted: bool):
    potential = Potential(_LeavesAutograd(weighted))
    with pytest.raises(ValueError, match="leaves autograd"):
        potential(potential.build_graph(crystal()), ("forces",))
    alone = potential.build_graph(Atoms("Cu"))
    assert not potential(alone, ("forces",))["forces"].any()
    assert not force_constants(small_potential(), alone, max_edges=10).any()


def test_a_potential_is_exported_from_inside_as_from_outside(tmp_path, monkeypatch):
    """The trace is what matters here; compiling it takes a minute."""
    programs = []
    monkeypatch.setattr(export, "_compile", lambda program, path, _: programs.append(program))
    monkeypatch.setattr(export, "_refuse_without_compiler", lambda device: None)
    monkeypatch.setattr(export, "write_atomically", lambda path: nullcontext(path))
    export.export_potential(small_potential(), tmp_path / "a.pt2")
    with torch.inference_mode():
        export.export_potential(small_potential(), tmp_path / "b.pt2")
        export.export_potential("cu-pbe", tmp_path / "c.pt2")
    outside, inside, _ = programs
    assert [str(node.target) for node in inside.graph.nodes] == [
        str(node.target) for node in outside.graph.nodes
    ]


def test_what_is_kept_of_elements_is_not_of_inference_mode():
    element_properties.cache_clear()
    with torch.inference_mode():
        element_properties()
    buffers = dict(FAENet().named_buffers())
    assert buffers
    assert not [name for name, buffer in buffers.items() if buffer.is_inference()]
