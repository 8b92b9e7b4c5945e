"""A fit on a Ray cluster: python docs/examples/ray_train.py EXPERIMENT.yaml NUM_WORKERS [GPU].

Ray starts the workers and tells them their ranks; each runs the command that one would run alone.
The experiment, its data and the run's folder have to be where every worker sees them.
"""

import os
import sys

import ray.train
from ray.train.torch import TorchTrainer

from atomeq.cli import main


def fit(config: dict[str, str | int]) -> None:
    """Run ``atomeq fit`` as one of the processes."""
    context = ray.train.get_context()
    os.environ |= {"LOCAL_RANK": str(context.get_local_rank()), "OMP_NUM_THREADS": "1"}
    devices = context.get_local_world_size()
    words = ["fit", "-c", str(config["experiment"]), "--trainer.strategy=ddp", "--ckpt_path=last"]
    words += [f"--trainer.num_nodes={int(config['workers']) // devices}"]
    main([*words, f"--trainer.devices={devices}"])


if __name__ == "__main__":
    experiment, workers = os.path.abspath(sys.argv[1]), int(sys.argv[2])
    scaling = ray.train.ScalingConfig(num_workers=workers, use_gpu="GPU" in sys.argv[3:])
    TorchTrainer(
        fit,
        train_loop_config={"experiment": experiment, "workers": workers},
        scaling_config=scaling,
    ).fit()
