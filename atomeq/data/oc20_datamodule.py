"""OC20DataModule: batches of graphs straight from OC20's files, which need not fit in memory.

Frames are read and their graphs built when a batch needs them, in the data-loader's workers.
"""

import bisect
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from atomeq.data.ase_files import DataError, expand_data_path
from atomeq.data.batching import DatasetOnDisk
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.oc20 import Frames, open_frames
from atomeq.data.oc20_frame import EnergyKind, OC20Frame
from atomeq.data.oc20_write import metadata_file
from atomeq.data.splits import DataFile, DataFiles
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder

logger = logging.getLogger(__name__)

# Sets up to this size are read through for what metadata.npz would say.
_SMALL = 20_000


class FrameDataset(DatasetOnDisk):
    """OC20 frames on disk as graphs; a list of indices gives their batch, built at once.

    Args:
        frames: From :func:`~atomeq.data.oc20.open_frames`.
        builder: Makes the edges.
        name: What errors call this set.
        energy: Which energy is the label.
        n_atoms: Atoms of each frame, where a ``metadata.npz`` has told.
        elements: Atomic numbers that occur, where it has told.
    """

    structures_of = "OC20 frames"

    def __init__(
        self,
        frames: Frames,
        builder: GraphBuilder,
        *,
        name: str = "data",
        energy: EnergyKind = "stored",
        n_atoms: NDArray[np.int64] | None = None,
        elements: list[int] | None = None,
    ) -> None:
        self.frames = frames
        self.builder = builder
        self.name = name
        self.energy: EnergyKind = energy
        self._n_atoms = n_atoms
        self._elements = elements

    def __len__(self) -> int:
        return len(self.frames)

    def place(self, index: int) -> str:
        """Return frame, system and step of a trajectory."""
        frame = self.frames[index]
        return f"frame {index} of {self.name} (sid {frame.sid}, fid {frame.fid})"

    def _batch(self, indices: Sequence[int]) -> AtomGraph:
        """Return the batch of some frames, with edges."""
        frames = [self.frames[index] for index in indices]
        graph = graph_of_frames(frames, energy=self.energy, labels=self.labels)
        return self._with_edges(graph, f"{self.name}, frames {list(indices)}")

    @cached_property
    def labels(self) -> set[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The labels of the first frame; others are held to have them too, or get NaN."""
        first = self.frames[0]
        known = {"energy": first.target(self.energy), "forces": first.forces}
        return {name for name, value in known.items() if value is not None}

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """Atoms of each frame."""
        return self._read_through()[0]

    @property
    def elements(self) -> list[int]:
        """The atomic numbers that occur."""
        return self._read_through()[1]

    def sample(self) -> Sequence[AtomGraph]:
        """Return up to 1,000 frames, evenly spread, without edges."""
        return [
            graph_of_frames([self.frames[k]], energy=self.energy, labels=self.labels)
            for k in self._sampled()
        ]

    def _read_through(self) -> tuple[NDArray[np.int64], list[int]]:
        if self._n_atoms is None or self._elements is None:
            if len(self) > _SMALL:
                raise DataError(
                    f"{self.name} has {len(self)} frames and no complete metadata.npz beside them, "
                    "which says how many atoms they have and which elements; write it with "
                    "`atomeq data metadata FOLDER`"
                )
            logger.info("%s: reading %d frames for their sizes", self.name, len(self))
            numbers = [frame.numbers for frame in self.frames]
            self._n_atoms = np.array([len(z) for z in numbers], dtype=np.int64)
            self._elements = np.unique(np.concatenate(numbers)).tolist()
        return self._n_atoms, self._elements


def graph_of_frames(
    frames: Sequence[OC20Frame],
    *,
    energy: EnergyKind = "stored",
    labels: set[str] | frozenset[str] = frozenset(("energy", "forces")),
) -> AtomGraph:
    """Return one graph, without edges, of some frames.

    Args:
        frames: At least one.
        energy: Which energy is the label.
        labels: Of ``energy`` and ``forces`` those to give; NaN where a frame lacks one.

    Returns:
        Float64 positions; ``tags``, ``fixed`` and ``weight`` with the labels.
    """
    fields: dict[str, torch.Tensor] = {
        "tags": torch.from_numpy(np.concatenate([frame.tags for frame in frames])),
        "fixed": torch.from_numpy(np.concatenate([frame.fixed for frame in frames])),
        "weight": torch.ones(len(frames), dtype=torch.float64),
    }
    if "energy" in labels:
        targets = [frame.target(energy) for frame in frames]
        fields["energy"] = torch.tensor(
            [float("nan") if target is None else target for target in targets],
            dtype=torch.float64,
        )
    if "forces" in labels:
        forces = [
            np.full((frame.n_atoms, 3), np.nan) if frame.forces is None else frame.forces
            for frame in frames
        ]
        fields["forces"] = torch.from_numpy(np.concatenate(forces))
    return AtomGraph(
        torch.from_numpy(np.concatenate([frame.positions for frame in frames])),
        torch.from_numpy(np.concatenate([frame.numbers for frame in frames])),
        cell=torch.from_numpy(np.stack([frame.cell for frame in frames])),
        pbc=torch.tensor([frame.pbc for frame in frames]),
        natoms=torch.tensor([frame.n_atoms for frame in frames]),
        **fields,
    )


class JoinedFrames:
    """Several sets of frames, one after another.

    Args:
        parts: At least one.
    """

    def __init__(self, parts: Sequence[Frames]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> OC20Frame:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[OC20Frame]:
        for part in self.parts:
            yield from part


class OC20DataModule(AtomisticDataModule):
    """Serves S2EF or IS2RE data in batches, straight from its files.

    IS2RE frames are labelled with the energy of their relaxed structure, so training on them is the
    direct approach.

    Args:
        train: Folder, file or several of them to train on, in any format of OC20.
        val: The same to validate on.
        test: Test sets by name; each gets its own line in the results.
        predict: What to predict.
        energy: The label: ``total``, ``referenced``, or what the files hold (``stored``).
        max_structures: Structures per batch.
        max_atoms: Atoms per batch, which balances them; None is no limit.
        eval_factor: Batches without gradients of the weights may be this much larger.
        seed: Of the order of the training batches.
        num_workers: Processes that read frames and build graphs; 0 does it in the training process.

    Raises:
        DataError: On setup: data are missing or damaged.
    """

    def __init__(
        self,
        train: DataFiles | None = None,
        *,
        val: DataFiles | None = None,
        test: dict[str, DataFiles] | None = None,
        predict: DataFiles | None = None,
        energy: EnergyKind = "stored",
        max_structures: int = 8,
        max_atoms: int | None = None,
        eval_factor: int = 2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train,
            val=val,
            test=test,
            predict=predict,
            max_structures=max_structures,
            max_atoms=max_atoms,
            eval_factor=eval_factor,
            seed=seed,
            num_workers=num_workers,
        )
        self.energy: EnergyKind = energy

    def setup(self, stage: str) -> None:
        """Open the files that a stage needs."""
        if stage == "fit" and self.train_set is None:
            self.train_set = self._open(self.train_files, "train")
        if stage in ("fit", "validate") and self.val_set is None and self.val_files is not None:
            self.val_set = self._open(self.val_files, "val")
        if stage == "test" and not self.test_sets:
            if not self.test_files:
                raise DataError("nothing to test: give data.test, folders or files by name")
            self.test_sets = {
                name: self._open(files, f"test/{name}") for name, files in self.test_files.items()
            }
        if stage == "predict" and self.predict_set is None:
            self.predict_set = self._open(self.predict_files, "predict")

    def _open(self, files: DataFiles | dict[str, DataFiles] | None, name: str) -> FrameDataset:
        if isinstance(files, dict):
            raise DataError("OC20's files are of one head; files by head are extended XYZ")
        if files is None:
            raise DataError(f"no data for {name}: give data.{name}, a folder or file of OC20 data")
        paths = [expand_data_path(path) for path in (files if isinstance(files, list) else [files])]
        parts = [open_frames(path) for path in paths]
        told = [_metadata(path, part) for path, part in zip(paths, parts, strict=True)]
        n_atoms = [sizes for sizes, _ in told if sizes is not None]
        elements = [found for _, found in told if found is not None]
        frames = parts[0] if len(parts) == 1 else JoinedFrames(parts)
        logger.info("%s: %d frames", name, len(frames))
        return FrameDataset(
            frames,
            self._graph_builder(),
            name=name,
            energy=self.energy,
            n_atoms=np.concatenate(n_atoms) if len(n_atoms) == len(parts) else None,
            elements=sorted(set().union(*elements)) if len(elements) == len(parts) else None,
        )


def _metadata(path: DataFile, frames: Frames) -> tuple[NDArray[np.int64] | None, list[int] | None]:
    """Return the sizes of frames and the elements from metadata.npz; None for what it lacks."""
    file = metadata_file(path)
    if not file.is_file():
        return None, None
    try:
        with np.load(file, allow_pickle=False) as archive:
            sizes = archive["natoms"].astype(np.int64) if "natoms" in archive else None
            elements = archive["elements"].tolist() if "elements" in archive else None
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error}); delete it") from error
    if sizes is not None and len(sizes) != len(frames):
        raise DataError(
            f"{file} speaks of {len(sizes)} frames, but {path} has {len(frames)}; write it anew "
            f"with `atomeq data metadata {path}`"
        )
    return sizes, elements
