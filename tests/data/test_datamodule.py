"""Batches stay within their budgets, in an order that a seed, an epoch and a position fix."""

import itertools
import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.data.ase_files import DataError
from atomeq.data.batching import BudgetBatchSampler, GraphDataset, ResumableLoader
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.splits import Split, split_indices
from atomeq.graph.builders import RadiusGraph

CUTOFF = 4.0


@pytest.fixture
def dataset() -> GraphDataset:
    structures = [bulk("Cu").repeat((1 + k % 3, 1, 1)) for k in range(20)]
    return GraphDataset([RadiusGraph(CUTOFF)(atoms) for atoms in structures], name="copper")


@pytest.fixture
def mixed_file(tmp_path: Path) -> Path:
    """Ten structures; every third has no forces, one weighs more."""
    structures = []
    for k in range(10):
        atoms = molecule("H2O")
        atoms.rattle(0.02, seed=k)
        forces = {} if k % 3 == 0 else {"forces": np.full((3, 3), float(k))}
        atoms.calc = SinglePointCalculator(atoms, energy=-float(k), **forces)
        structures.append(atoms)
    structures[4].info["weight"] = 7.0
    ase.io.write(tmp_path / "water.extxyz", structures)
    return tmp_path / "water.extxyz"


def batches(sampler: BudgetBatchSampler) -> list[list[int]]:
    return list(sampler)


def test_batches_hold_every_structure_once_within_the_budgets(dataset: GraphDataset):
    sampler = BudgetBatchSampler(
        dataset, max_structures=4, max_atoms=7, max_edges=100, shuffle=True
    )
    drawn = batches(sampler)
    assert sorted(i for batch in drawn for i in batch) == list(range(20))
    assert len(drawn) == len(sampler)
    for batch in drawn:
        assert len(batch) <= 4
        assert sum(dataset.n_atoms[i] for i in batch) <= 7
        assert sum(dataset.n_edges[i] for i in batch) <= 100


def test_order_depends_on_seed_and_epoch_alone(dataset: GraphDataset):
    def draw(seed: int, epoch: int) -> list[list[int]]:
        return batches(BudgetBatchSampler(dataset, shuffle=True, seed=seed, epoch=epoch))

    torch.manual_seed(1)
    first = draw(0, 3)
    torch.manual_seed(2)
    assert draw(0, 3) == first
    assert draw(0, 4) != first
    assert draw(1, 3) != first
    sampler = BudgetBatchSampler(dataset, shuffle=True)
    sampler.set_epoch(3)
    assert batches(sampler) == first


def test_without_shuffle_the_order_is_that_of_the_file(dataset: GraphDataset):
    drawn = batches(BudgetBatchSampler(dataset, max_structures=3))
    assert [i for batch in drawn for i in batch] == list(range(20))


def test_processes_share_the_batches_and_take_equally_many(dataset: GraphDataset):
    shares = [
        batches(BudgetBatchSampler(dataset, max_structures=3, shuffle=True, rank=k, n_ranks=2))
        for k in range(2)
    ]
    assert len(shares[0]) == len(shares[1])
    assert {i for share in shares for batch in share for i in batch} == set(range(20))


def test_a_structure_beyond_the_budget_is_named(dataset: GraphDataset):
    with pytest.raises(DataError, match=r"structure 1 of copper.*2 atoms, more than max_atoms=1"):
        BudgetBatchSampler(dataset, max_atoms=1)


def test_a_loader_goes_on_with_the_next_batch(dataset: GraphDataset):
    def loader() -> ResumableLoader:
        return ResumableLoader(
            dataset, BudgetBatchSampler(dataset, max_structures=3, shuffle=True, epoch=2)
        )

    whole = [graph.pos for graph in loader()]
    first = loader()
    iterator = iter(first)
    seen = [next(iterator).pos for _ in range(3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    seen += [graph.pos for graph in second]
    assert all(torch.equal(a, b) for a, b in zip(whole, seen, strict=True))
    assert len(list(second)) == len(whole), "only the first iteration is cut"


def test_loading_leaves_the_random_state_alone(dataset: GraphDataset):
    state = torch.get_rng_state()
    list(ResumableLoader(dataset, BudgetBatchSampler(dataset, shuffle=True)))
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_give_the_same_batches(dataset: GraphDataset):
    def load(num_workers: int) -> list[torch.Tensor]:
        sampler = BudgetBatchSampler(dataset, max_structures=7, shuffle=True)
        return [g.edge_index for g in ResumableLoader(dataset, sampler, num_workers=num_workers)]

    here, there = load(0), load(1)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_split_by_seed_is_disjoint_and_keeps_its_test_part():
    parts = split_indices(100, Split(val=0.1, test=0.2, seed=1))
    assert [len(parts[key]) for key in ("train", "val", "test")] == [70, 10, 20]
    assert sorted(i for part in parts.values() for i in part) == list(range(100))
    assert split_indices(100, Split(val=0.3, test=0.2, seed=1))["test"] == parts["test"]
    assert split_indices(100, Split(val=0.1, test=0.2, seed=2))["test"] != parts["test"]


def test_split_by_seed_never_changes():
    # Published results name a split by its seed: the permutation is frozen.
    assert split_indices(10, Split(val=0.2, test=0.3, seed=0)) == {
        "test": [2, 4, 8],
        "val": [1, 9],
        "train": [0, 3, 5, 6, 7],
    }


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_split_by_file(tmp_path: Path, suffix: str):
    path = tmp_path / f"split{suffix}"
    parts = {"train": [5, 1], "val": [0], "test": [2]}
    if suffix == ".json":
        path.write_text(json.dumps(parts))
    else:
        np.savez(path, **{key: np.array(value) for key, value in parts.items()})
    assert split_indices(6, Split(file=str(path))) == parts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not an .npz or .json"),
        ("[1, 2]", "not an .npz or .json"),
        ('{"val": [1]}', "no 'train'"),
        ('{"train": [9]}', "names structure 9; there are 0 to 5"),
        ('{"train": [1], "val": [1]}', "in two parts"),
    ],
)
def test_a_bad_split_file_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        split_indices(6, Split(file=str(path)))


def test_bad_fractions_are_refused():
    with pytest.raises(DataError, match="below 1"):
        split_indices(10, Split(val=0.5, test=0.6))
    with pytest.raises(DataError, match="leave none to train on"):
        split_indices(2, Split(val=0.4, test=0.4))


def test_graphs_carry_labels_and_weights(mixed_file: Path):
    data = AtomisticDataModule(train=str(mixed_file), max_structures=10)
    data.use_builder(RadiusGraph(CUTOFF))
    data.setup("fit")
    assert data.train_set is not None
    (batch,) = ResumableLoader(
        data.train_set, BudgetBatchSampler(data.train_set, max_structures=10)
    )
    assert batch.energy.tolist() == [-float(k) for k in range(10)]
    assert batch.energy.dtype == torch.float64
    unknown = torch.isnan(batch.forces).any(1)
    assert unknown.tolist() == [k % 3 == 0 for k in range(10) for _ in range(3)]
    assert batch.weight.tolist() == [7.0 if k == 4 else 1.0 for k in range(10)]
    assert "stress" not in batch
    assert batch.n_edges == 10 * 6


def test_a_cutoff_that_finds_no_neighbour_is_refused(mixed_file: Path):
    data = AtomisticDataModule(train=str(mixed_file))
    data.use_builder(RadiusGraph(0.5))
    with pytest.raises(DataError, match="no atom of the 10 train structures has a neighbour"):
        data.setup("fit")


def test_test_sets_keep_their_names(mixed_file: Path):
    data = AtomisticDataModule(
        train=str(mixed_file), split=Split(test=0.2), test={"again": str(mixed_file)}
    )
    data.use_builder(RadiusGraph(CUTOFF))
    data.setup("test")
    assert data.test_names == ["again", "held_out"]
    assert [len(dataset) for dataset in data.test_sets.values()] == [10, 2]


def test_stages_without_files_are_refused():
    data = AtomisticDataModule()
    data.use_builder(RadiusGraph(CUTOFF))
    for stage, key in (("fit", "data.train"), ("test", "data.test"), ("predict", "data.predict")):
        with pytest.raises(DataError, match=key):
            data.setup(stage)


def test_copies_stay_in_one_part(tmp_path: Path):
    """Rotated, reordered and repeated ones too, and every part has about its size."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(20):
        crystal = bulk("Cu", cubic=True)
        crystal.rattle(0.1, seed=k)
        turned = crystal.copy()
        turned.rotate(rng.uniform(0, 90), (1, 2, 3), rotate_cell=True)
        frames += [crystal, turned[[2, 0, 3, 1]], crystal.repeat((2, 1, 1))]
    for atoms in frames:
        results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}
        atoms.calc = SinglePointCalculator(atoms, **results)
    ase.io.write(tmp_path / "copies.extxyz", frames)
    parted = {}
    for copies in ("together", "anywhere"):
        split = Split(val=0.2, test=9, copies=copies)
        data = AtomisticDataModule(train=str(tmp_path / "copies.extxyz"), split=split)
        parts = [data._training_part(part) for part in ("train", "val", "test")]
        places = [[int(a.info["place"].split()[-1]) for a in part] for part in parts]
        assert sorted(k for part in places for k in part) == list(range(60))
        assert [len(part) for part in places] == [39, 12, 9]
        originals = [{frame // 3 for frame in part} for part in places]
        parted[copies] = any(a & b for a, b in itertools.combinations(originals, 2))
    assert parted == {"together": False, "anywhere": True}
    with pytest.raises(DataError, match="too many to train on"):
        split_indices(4, Split(val=1), groups=[0, 0, 0, 0])
    with pytest.raises(ValueError, match="a file of indices parts copies as it does"):
        Split(file="split.json", copies="together")
