"""What propagators are trained on: few bodies, simulated here, and one molecule's trajectory."""

from lightning.pytorch import LightningDataModule

from atomeq.propagation.batches import PropagationSet
from atomeq.propagation.molecule import read_motion
from atomeq.propagation.nbody import FRAME_TIME, NBodyRecipe, Trajectories, load_nbody
from atomeq.propagation.particles import ParticleView


class PropagationDataModule(LightningDataModule):
    """Sets of systems, and the view that a propagator has of them.

    A subclass fills both in :meth:`setup`, once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, PropagationSet] = {}
        self.view = ParticleView()

    def train_dataloader(self) -> PropagationSet:
        """Return the training systems, shuffled by seed and epoch."""
        return self.sets["train"]

    def val_dataloader(self) -> PropagationSet:
        """Return the validation systems."""
        return self.sets["val"]

    def test_dataloader(self) -> PropagationSet:
        """Return the test systems."""
        return self.sets["test"]


class NBodyDataModule(PropagationDataModule):
    """Simulates few-body systems once, keeps them in a folder and serves them in batches.

    Args:
        folder: Where simulated sets are kept.
        recipe: What to simulate.
        from_frame: What the model sees; a frame is 0.1 units of time.
        to_frame: What it predicts.
        max_train: Only the first of the training systems are used; None is all.
        batch_size: Systems in a training batch.
        eval_batch_size: Systems in a batch without gradients.
        seed: Of the order of the training systems.
    """

    def __init__(
        self,
        folder: str = "runs/nbody-data",
        *,
        recipe: NBodyRecipe | None = None,
        from_frame: int = 30,
        to_frame: int = 40,
        max_train: int | None = 3000,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.recipe = recipe if recipe is not None else NBodyRecipe()
        self.from_frame = from_frame
        self.to_frame = to_frame
        self.max_train = max_train
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read or simulate the set, once."""
        if self.sets:
            return
        frames = self.to_frame - self.from_frame
        self.view = ParticleView(self.recipe.system, time=frames * FRAME_TIME)
        for name, part in load_nbody(self.recipe, self.folder).items():
            train = name == "train"
            chosen = slice(self.max_train) if train else slice(None)
            self.sets[name] = PropagationSet(
                Trajectories(
                    part.pos[chosen], part.velocities[chosen], part.charges[chosen], part.frames
                ),
                self.view,
                from_frame=self.from_frame,
                to_frame=self.to_frame,
                batch_size=self.batch_size if train else self.eval_batch_size,
                seed=self.seed if train else None,
            )


class MoleculeDataModule(PropagationDataModule):
    """Serves pairs of frames of one molecule's trajectory, a long step apart.

    Training, validation and test are consecutive stretches of it, and no pair reaches from one into
    the next: frames drawn at random, as published, have neighbours in time in every set.

    Args:
        path: The trajectory; any file that ASE reads.
        time: Duration of the long step, fs.
        frame_time: Time between two frames, fs; by default what the frames call ``time_fs``.
        bond_length: Atoms nearer than this in the first frame see each other, Å.
        train_share: Share of the frames that train.
        val_share: Share of the frames that validate; the rest tests.
        max_train: At most this many training pairs, evenly spread; None is all.
        max_eval: At most this many pairs to validate, and to test.
        batch_size: Pairs in a training batch.
        eval_batch_size: Pairs in a batch without gradients.
        seed: Of the order of the training pairs.
    """

    def __init__(
        self,
        path: str,
        time: float,
        *,
        frame_time: float | None = None,
        bond_length: float = 2.5,
        train_share: float = 0.8,
        val_share: float = 0.1,
        max_train: int | None = 500,
        max_eval: int | None = 2000,
        batch_size: int = 100,
        eval_batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(train_share, val_share) <= 0 or train_share + val_share >= 1:
            raise ValueError(
                f"shares {train_share} and {val_share} of the frames leave nothing to test"
            )
        self.path = path
        self.time = time
        self.frame_time = frame_time
        self.bond_length = bond_length
        self.shares = (train_share, val_share)
        self.most = {"train": max_train, "val": max_eval, "test": max_eval}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the trajectory, once."""
        if self.sets:
            return
        motion = read_motion(self.path, frame_time=self.frame_time)
        stride = motion.stride(self.time)
        bonds = motion.bonds(self.bond_length)
        self.view = ParticleView("molecule", self.time, motion.atomic_numbers, bonds)
        n_frames = len(motion.pos)
        train_end = int(n_frames * self.shares[0])
        val_end = int(n_frames * sum(self.shares))
        stretches = {"train": (0, train_end), "val": (train_end, val_end)}
        stretches["test"] = (val_end, n_frames)
        for name, (first, end) in stretches.items():
            train = name == "train"
            self.sets[name] = PropagationSet(
                motion.windows(first, end, stride, self.most[name]),
                self.view,
                from_frame=0,
                to_frame=stride,
                batch_size=self.batch_size if train else self.eval_batch_size,
                seed=self.seed if train else None,
            )
