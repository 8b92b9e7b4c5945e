"""AtomisticDataModule: files become graphs once, and graphs become batches of bounded size.

The graphs are those of the potential that is trained, so the cutoff is written in the model's
configuration and nowhere else.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from ase import Atoms
from lightning.pytorch import LightningDataModule

from atomeq.data.ase_files import (
    ELECTRIC_SHAPES,
    LABEL_WEIGHTS,
    DataError,
    LabelKeys,
    other_labels,
    read_structures,
    resolve_data_path,
)
from atomeq.data.batching import LABELS, BudgetBatchSampler, GraphDataset, ResumableLoader
from atomeq.data.copies import copies_among
from atomeq.data.molecule_files import STORED_FORMATS, reader_of
from atomeq.data.splits import DataFiles, Split, split_indices
from atomeq.data.stored_files import StoredDataset, StoredStructures
from atomeq.data.supercells import without_repetition
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder

logger = logging.getLogger(__name__)

_HEAD = "atomeq_head"  # in atoms.info, where files have their own keys
_LABEL_SHAPES = {
    "energy": lambda g: (1,),
    "forces": lambda g: (g.n_atoms, 3),
    "stress": lambda g: (1, 3, 3),
    "scalar": lambda g: (1,),
    **{
        key: lambda g, key=key, shape=shape: (1 if key in OF_STRUCTURES else g.n_atoms, *shape)
        for key, shape in ELECTRIC_SHAPES.items()
    },
}

_Structures: TypeAlias = list[Atoms] | StoredStructures


class NothingToTest(DataError):
    """There is no test set."""


@dataclass(frozen=True)
class Replay:
    """Old data beside the new, so that what a potential knows is not forgotten.

    Attributes:
        files: Structures of the old data.
        number: How many of them, evenly from the files; by default all.
        labels: ``potential``: what the potential that is started from says of them; ``files``:
            their own, of the level of theory that it was trained on.
        val: Fraction that is held out, or a number of structures if 1 or more: errors on them,
            before and after, tell what was forgotten.
        weight: Of the others in the loss; 0 trains on none and holds all of them out.
        seed: Of the division.
    """

    files: DataFiles
    number: int | None = None
    labels: Literal["potential", "files"] = "potential"
    val: float = 0.2
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.val > 0 and (self.number is None or self.number > 0)):
            raise ValueError(f"of replay weights are >= 0, val and number above 0, unlike {self}")


class AtomisticDataModule(LightningDataModule):
    """Reads labelled structures, builds their graphs once and serves them in batches.

    Args:
        train: File or files to train on. Those in ``.h5`` or ``.zarr`` stay on disk; graphs of a
            batch are built when it is wanted; any others are read and built once, into memory.
            Of a potential of several heads, the files of each by name.
        val: What to validate on; else ``split`` says which part of ``train`` is.
        test: Test sets by name; each gets its own line in the results. Those of heads have the
            names of the heads.
        predict: File or files to predict.
        split: Division of ``train`` by seed or by an index file.
        labels: What the files call their labels.
        supercells: ``reduce``: a structure that repeats its primitive cell becomes it.
        replay: Old data, of a fit that starts from a potential.
        max_structures: Structures per batch.
        max_atoms: Atoms per batch; None is no limit.
        max_edges: Edges per batch; None is no limit.
        eval_factor: Batches without gradients of the weights may be this much larger.
        seed: Of the order of the training batches.
        num_workers: Processes that put batches together; 0 does it in the training process.

    Raises:
        DataError: On setup: a file is missing or damaged, or holds no labels.

    Example:
        >>> data = AtomisticDataModule(train="train.extxyz", split=Split(val=0.1))
    """

    #: The old data: those to replay, until they have labels, and those that are held out.
    old_train_set: GraphDataset | None = None
    old_val_set: GraphDataset | None = None

    def __init__(
        self,
        train: DataFiles | dict[str, DataFiles] | None = None,
        *,
        val: DataFiles | dict[str, DataFiles] | None = None,
        test: dict[str, DataFiles] | None = None,
        predict: DataFiles | dict[str, DataFiles] | None = None,
        split: Split | None = None,
        labels: LabelKeys | None = None,
        supercells: Literal["keep", "reduce"] = "keep",
        replay: Replay | None = None,
        max_structures: int = 16,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        eval_factor: int = 2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train_files = train
        self.val_files = val
        self.test_files = dict(test or {})
        self.predict_files = predict
        self.split = split if split is not None else Split()
        self.labels = labels if labels is not None else LabelKeys()
        self.replay = replay
        self.reduce_supercells = supercells == "reduce"
        self.max_structures = max_structures
        self.max_atoms = max_atoms
        self.max_edges = max_edges
        self.eval_factor = eval_factor
        self.seed = seed
        self.num_workers = num_workers
        self.train_set: GraphDataset | None = None
        self.val_set: GraphDataset | None = None
        self.test_sets: dict[str, GraphDataset] = {}
        self.predict_set: GraphDataset | None = None
        self._build: Callable[[Atoms], AtomGraph] | None = None
        self._divided: dict[str, _Structures] | None = None

    def setup(self, stage: str) -> None:
        """Read the files a stage needs and build their graphs, once."""
        if self.trainer is not None:
            # The number of batches varies from epoch to epoch where a budget bounds them.
            setattr(self.trainer, "reload_dataloaders_every_n_epochs", 1)  # noqa: B010
        if stage == "fit" and self.train_set is None:
            self.train_set = self._dataset(self._training_part("train"), "train")
            if self.replay is not None:
                self._read_old_data(self.replay)
        if stage in ("fit", "validate") and self.val_set is None:
            structures = self._validation_structures()
            self.val_set = self._dataset(structures, "val") if structures else None
        if stage == "test" and not self.test_sets:
            self.test_sets = {
                name: self._dataset(structures, f"test/{name}")
                for name, structures in self._test_structures().items()
            }
        if stage == "predict" and self.predict_set is None:
            if self.predict_files is None:
                raise DataError("nothing to predict: give data.predict, a file of structures")
            self.predict_set = self._dataset(self._read(self.predict_files), "predict")
        self._divided = None

    def structures(self) -> dict[str, _Structures]:
        """Return the structures of every set by its name, divided as a fit does it.

        They know where they came from: ``atoms.info["place"]`` or, of sets on disk, ``place(k)``.
        """
        found = {"train": self._training_part("train"), "val": self._validation_structures()}
        try:
            tests = self._test_structures()
        except NothingToTest:
            tests = {}
        self._divided = None
        named = {**found, **{f"test/{name}": some for name, some in tests.items()}}
        return {name: some for name, some in named.items() if some}

    def use_builder(self, build: Callable[[Atoms], AtomGraph]) -> None:
        """Set what turns structures into graphs; with a trainer it is the task's potential."""
        self._build = build

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of the current epoch, shuffled."""
        assert self.train_set is not None, "setup('fit') comes first"
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        sampler = self._sampler(self.train_set, shuffle=True, epoch=epoch)
        return ResumableLoader(
            self.train_set, sampler, num_workers=self.num_workers, seed=self.seed
        )

    def n_training_batches(self) -> int:
        """Return the number of batches of the first epoch; later epochs differ by a few at most."""
        assert self.train_set is not None, "setup('fit') comes first"
        return len(self._sampler(self.train_set, shuffle=True))

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the batches of each of :attr:`val_sets`, in the order of the file."""
        loaders = [self.eval_loader(dataset) for dataset in self.val_sets.values()]
        return loaders[0] if len(loaders) == 1 else loaders

    @property
    def val_sets(self) -> dict[str, GraphDataset]:
        """What a fit validates on: ``val``, and of old data ``old``."""
        sets = {"val": self.val_set, "old": self.old_val_set}
        return {name: dataset for name, dataset in sets.items() if dataset is not None}

    def replay_labelled(self, train: Sequence[AtomGraph], val: Sequence[AtomGraph]) -> None:
        """Train on old data ``train`` beside the new, and validate on ``val``, all with labels."""
        new, old = self.train_set, self.old_train_set
        assert new is not None
        assert old is not None
        assert self.replay is not None
        weighed = [graph.replace(weight=graph.weight * self.replay.weight) for graph in train]
        graphs = _with_same_labels([*new.graphs, *weighed])
        places = [dataset.place(k) for dataset in (new, old) for k in range(len(dataset))]
        self.train_set = GraphDataset(graphs, name=new.name, places=places)
        self.old_train_set = None
        self.old_val_set = GraphDataset(_with_same_labels(list(val)), name="old")

    def _read_old_data(self, replay: Replay) -> None:
        structures = self._read(replay.files)
        if isinstance(structures, StoredStructures) or isinstance(self.train_set, StoredDataset):
            raise DataError(
                "data.replay mixes sets in memory: neither it nor data.train stays on disk"
            )
        if replay.number is not None and replay.number < len(structures):
            step = len(structures) / replay.number
            structures = [structures[int(k * step)] for k in range(replay.number)]
        parts: dict[str, list[int]] = {"train": [], "val": list(range(len(structures)))}
        if replay.weight > 0:
            parts = split_indices(len(structures), Split(val=replay.val, seed=replay.seed))
        old = {part: [structures[k] for k in parts[part]] for part in ("train", "val")}
        self.old_train_set = self._dataset(old["train"], "old data to replay")
        self.old_val_set = self._dataset(old["val"], "old data held out")

    def test_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each test set, in the order of :attr:`test_names`."""
        return [self.eval_loader(dataset) for dataset in self.test_sets.values()]

    def predict_dataloader(self) -> ResumableLoader:
        """Return the batches to predict in the order of the file."""
        assert self.predict_set is not None, "setup('predict') comes first"
        return self.eval_loader(self.predict_set)

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets."""
        return list(self.test_sets)

    def eval_loader(self, dataset: GraphDataset) -> ResumableLoader:
        """Return the batches of a set that is not trained on, in the order of the file."""
        return ResumableLoader(dataset, self._sampler(dataset, factor=self.eval_factor))

    def _sampler(
        self, dataset: GraphDataset, *, shuffle: bool = False, epoch: int = 0, factor: int = 1
    ) -> BudgetBatchSampler:
        trainer = self.trainer
        return BudgetBatchSampler(
            dataset,
            max_structures=self.max_structures * factor,
            max_atoms=self.max_atoms and self.max_atoms * factor,
            max_edges=self.max_edges and self.max_edges * factor,
            shuffle=shuffle,
            seed=self.seed,
            epoch=epoch,
            rank=trainer.global_rank if trainer is not None else 0,
            n_ranks=trainer.world_size if trainer is not None else 1,
        )

    def _training_part(self, part: str) -> _Structures:
        """Return the train, val or test part of the training files."""
        if self._divided is None:
            if self.train_files is None:
                raise DataError(
                    "no training structures: give data.train, a file or a list of files"
                )
            structures = self._read(self.train_files)
            groups = copies_among(structures) if self.split.copies == "together" else None
            indices = split_indices(len(structures), self.split, groups=groups)
            self._divided = {key: _some(structures, chosen) for key, chosen in indices.items()}
        return self._divided[part]

    def _validation_structures(self) -> _Structures:
        if self.val_files is not None:
            return self._read(self.val_files)
        return self._training_part("val")

    def _test_structures(self) -> dict[str, _Structures]:
        sets = {
            name: self._read({name: files} if self.heads else files)
            for name, files in self.test_files.items()
        }
        if self.split.test > 0 or self.split.file is not None:
            held_out = self._training_part("test")
            if held_out:
                sets["held_out"] = held_out
        if not sets:
            raise NothingToTest("nothing to test: give data.test, or data.split.test above 0")
        return sets

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads whose structures there are; none of a potential that has no heads."""
        return tuple(self.train_files) if isinstance(self.train_files, dict) else ()

    def _read(self, files: DataFiles | dict[str, DataFiles]) -> _Structures:
        if not self.heads and not isinstance(files, dict):
            return self._of(files)
        if not isinstance(files, dict) or not set(files) <= set(self.heads):
            raise DataError(
                f"the heads of data.train are {', '.join(self.heads) or 'none'}: give all files by "
                f"the head that they are of, not as {files!r}"
            )
        found: list[Atoms] = []
        for name, own in files.items():
            structures = self._of(own)
            if isinstance(structures, StoredStructures):
                raise DataError(
                    f"files by head are read into memory; {own!r} of {name!r} stays on disk"
                )
            for atoms in structures:
                atoms.info[_HEAD] = self.heads.index(name)
            found += structures
        return found

    def _of(self, files: DataFiles) -> _Structures:
        paths = files if isinstance(files, list) else [files]
        stored = [Path(path).suffix in STORED_FORMATS for path in paths]
        if any(stored) and self.reduce_supercells:
            raise DataError("supercells on disk stay as they are: convert files that were reduced")
        if all(stored):
            return StoredStructures([resolve_data_path(path) for path in paths])
        labels, found = self.label_keys(), []
        for path in paths:
            structures = read_structures(path, labels=labels, reader=reader_of(Path(path)))
            for frame, atoms in enumerate(structures):
                atoms.info["place"] = f"{path}, frame {frame}"
                found.append(without_repetition(atoms) if self.reduce_supercells else atoms)
        return found

    def label_keys(self) -> LabelKeys:
        """Return what files call their labels, those included that the task alone asks for."""
        # AtomisticTask lives one floor up and cannot be imported here.
        task = self.trainer.lightning_module if self.trainer is not None else None
        target = getattr(task, "target", None)
        learned = set(getattr(getattr(task, "potential", None), "electric", ()))
        found = {key: key for key in ELECTRIC_SHAPES if key in learned}
        found |= {} if target is None else {"scalar": target.name}
        return replace(
            self.labels, **{k: v for k, v in found.items() if getattr(self.labels, k) is None}
        )

    def _dataset(self, structures: _Structures, name: str) -> GraphDataset:
        if isinstance(structures, StoredStructures):
            return StoredDataset(structures, self._graph_builder(), name=name)
        build = self._build
        if build is None:
            if self.trainer is None:
                raise DataError(
                    "no potential to build graphs with: attach a trainer or use_builder()"
                )
            # AtomisticTask lives one floor up and cannot be imported here.
            build = cast(Callable[[Atoms], AtomGraph], self.trainer.lightning_module.build_graph)
        graphs = [_labelled(build(atoms), atoms) for atoms in structures]
        graphs = _with_same_labels(graphs)
        n_edges = sum(graph.n_edges for graph in graphs)
        # Single atoms have no neighbours, and hypergraphs may do without pairs.
        pairless = (g.n_atoms > 1 and "hyperedge_index" not in g for g in graphs)
        if graphs and n_edges == 0 and all(pairless):
            raise DataError(
                f"no atom of the {len(graphs)} {name} structures has a neighbour within "
                "the cutoff; raise the model's cutoff, or look whether the positions are in Å"
            )
        logger.info("%s: %d structures, %d edges", name, len(graphs), n_edges)
        return GraphDataset(graphs, name=name, places=[a.info["place"] for a in structures])

    def _graph_builder(self) -> GraphBuilder:
        if self.trainer is None:
            raise DataError("no model to build graphs for: attach a trainer")
        # The builder alone, not the task's method: a worker need not be sent the network.
        model = self.trainer.lightning_module.potential.model  # pyright: ignore
        return cast(GraphBuilder, model.graph_builder())  # pyright: ignore


def _some(structures: _Structures, chosen: list[int]) -> _Structures:
    if isinstance(structures, StoredStructures):
        return structures.subset(chosen)
    return [structures[k] for k in chosen]


def _labelled(graph: AtomGraph, atoms: Atoms) -> AtomGraph:
    weight = torch.tensor([atoms.info.get("weight", 1.0)], dtype=graph.pos.dtype)
    number = atoms.info.get(_HEAD)
    head = None if number is None else torch.tensor([number])
    weights = {
        key: torch.tensor([atoms.info[key]], dtype=graph.pos.dtype)
        for key in LABEL_WEIGHTS
        if key in atoms.info
    }
    return graph.to("cpu").replace(weight=weight, head=head, **weights, **other_labels(atoms))


def _with_same_labels(graphs: list[AtomGraph]) -> list[AtomGraph]:
    """Give every graph the labels that any of them has; NaN marks what is unknown."""
    present = {key for key in LABELS if any(_label(graph, key) is not None for graph in graphs)}
    completed: list[AtomGraph] = []
    for graph in graphs:
        missing = {
            key: graph.pos.new_full(_LABEL_SHAPES[key](graph), float("nan"))
            for key in present
            if _label(graph, key) is None
        }
        completed.append(graph.replace(**missing) if missing else graph)
    return completed


def _label(graph: AtomGraph, key: str) -> torch.Tensor | None:
    return getattr(graph, key, None)
