"""References see the training structures alone and take the energies to the scale of a network."""

from pathlib import Path

import ase.io
import pytest
import torch
from ase import Atoms

from atomeq.data.ase_files import DataError
from atomeq.data.batching import GraphDataset
from atomeq.graph.atom_graph import AtomGraph
from atomeq.training.normalisation import fit_references

SHIFT = {1: -13.5, 8: -2041.0}


@pytest.fixture
def dataset() -> GraphDataset:
    """Compositions that determine both elements; energies that are exactly sums of SHIFT."""
    graphs = []
    for k, numbers in enumerate([[8, 1, 1], [1, 1], [8, 8], [8, 1]]):
        graphs.append(
            AtomGraph(
                torch.zeros(len(numbers), 3),
                torch.tensor(numbers),
                energy=torch.tensor([sum(SHIFT[z] for z in numbers)], dtype=torch.float64),
                forces=torch.full((len(numbers), 3), 0.5 if k % 2 else -0.5),
            )
        )
    return GraphDataset(graphs)


def table(references) -> dict[int, float]:
    return {z: float(references.shift[z]) for z in references.elements}


def test_least_squares_finds_the_elements(dataset: GraphDataset):
    references = fit_references(dataset)
    assert table(references) == pytest.approx(SHIFT, abs=1e-8)
    assert float(references.scale) == pytest.approx(0.5)


def test_isolated_atoms_from_a_file_and_by_symbol(dataset: GraphDataset, tmp_path: Path):
    path = tmp_path / "e0.extxyz"
    ase.io.write(path, [Atoms(s, info={"energy": e}) for s, e in (("O", -2.0), ("H", -1.0))])
    # Per atom the four structures are bound by these, and their mean stands beside the atoms.
    bound = [(-2039 - 25) / 3, -12.5, -2039.0, (-2039 - 12.5) / 2]
    for source in (str(path), {"H": -1.0, "O": -2.0, "N": -3.0}):
        found = table(fit_references(dataset, shift=source))
        mean = sum(bound) / 4
        assert found == pytest.approx({1: -1.0 + mean, 8: -2.0 + mean})


def test_none_still_names_the_elements(dataset: GraphDataset):
    assert table(fit_references(dataset, shift="none")) == {1: 0.0, 8: 0.0}


def test_scale_of_energies_and_given_scale(dataset: GraphDataset):
    references = fit_references(dataset, shift={"H": -13.5 + 2, "O": -2041.0 - 2}, scale="energy")
    left = torch.tensor([-2 / 3, -2.0, 2.0, 0.0])
    assert float(references.scale) == pytest.approx(float(left.std(correction=0)))
    assert float(fit_references(dataset, scale=0.25).scale) == 0.25


def test_what_is_missing_is_named(dataset: GraphDataset):
    with pytest.raises(DataError, match="lack Z=8"):
        fit_references(dataset, shift={"H": -1.0})
    with pytest.raises(DataError, match="positive"):
        fit_references(dataset, scale=-1.0)
    bare = GraphDataset([graph.replace(forces=None, energy=None) for graph in dataset.graphs])
    with pytest.raises(DataError, match="need energies"):
        fit_references(bare)
    with pytest.raises(DataError, match="needs forces labels"):
        fit_references(bare, shift="none")
