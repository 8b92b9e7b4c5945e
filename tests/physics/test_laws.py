"""The laws of physics every model keeps, in float64 over configs/model/*.yaml.

A new model gets these tests by its YAML alone; the laws themselves are those of atomeq.check.
"""

import numpy as np
import pytest
from ase import Atoms
from bonded import BondedHyperGraph
from structures import RATTLED

from atomeq.check.laws import Law
from atomeq.check.model import MODEL_LAWS, ModelSubject, fault_of, receptive_depth
from atomeq.graph.builders import HyperGraph


@pytest.mark.parametrize("law", MODEL_LAWS, ids=lambda law: law.name)
def test_law(subject: ModelSubject, law: Law) -> None:
    """It holds, or the method is exempt from it and really breaks it."""
    if law.name == "smooth at the cutoff" and isinstance(
        subject.potential._builder, BondedHyperGraph
    ):
        pytest.skip("its bonds end at a distance; the next test crosses the cutoff")
    if law.measure is receptive_depth and subject.potential.receptive_depth is None:
        pytest.skip("an energy of this model depends on all atoms")
    result = law.judge(subject)
    assert not fault_of(result, subject)
    assert result.passed or result.exempt, result


def test_an_atom_that_crosses_the_cutoff_changes_nothing_at_once(subject: ModelSubject) -> None:
    """Beside others, so that there are hyperedges: nothing may jump, slopes neither."""
    steps = np.linspace(-1e-3, 1e-3, 9) + 1.3e-5
    near = [[0, 0, 0], [-0.3, 1.1, 0.2]]
    cutoff = subject.potential.cutoff
    results = subject.evaluate_all([Atoms("OCH", [*near, [cutoff + s, 0, 0]]) for s in steps])
    energies = np.array([result.energy for result in results])
    forces = np.array([result.forces[2, 0] for result in results])
    # u, u' and u'' vanish at the cutoff: 1e-3 Å inside it the energy of the pair is O(1e-9).
    assert np.ptp(energies - energies[-1]) < 1e-6
    assert np.ptp(np.diff(forces)) < 1e-4
    assert np.abs(forces[steps > 0]).max() == 0.0


@pytest.mark.parametrize("name", RATTLED)
def test_hyperedges_count_where_there_are_some(subject: ModelSubject, name: str) -> None:
    """Else the laws would say nothing about them."""
    potential, structure = subject.potential, RATTLED[name]()
    graph = potential.build_graph(structure)
    if not isinstance(potential._builder, BondedHyperGraph):
        assert not int(sum(graph.get("num_hyperedges", [0])))
        return
    assert int(graph.num_hyperedges) > len(structure)
    bare = HyperGraph(potential.cutoff, perceive=False)(structure)
    energies = [float(potential(one, ("energy",))["energy"].detach()) for one in (graph, bare)]
    assert abs(energies[0] - energies[1]) > 1e-6


def test_exemptions_name_laws_that_are_tested(subject: ModelSubject) -> None:
    """A misspelt exemption would exempt from nothing and be forgotten."""
    assert set(subject.exempt_laws) <= {law.name for law in MODEL_LAWS}
    assert all(subject.exempt_laws.values())
