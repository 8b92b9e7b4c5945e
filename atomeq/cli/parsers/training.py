"""The door of ``atomeq fit | validate | test | predict``: helps and absent files, before Lightning.

Every other word is a key of the classes that are trained, so they have to be imported to judge it.
"""

import argparse
import importlib
from collections.abc import Sequence

from atomeq.cli.door import existing_file
from atomeq.cli.terminal import say

_KEYS = """\
  -c, --config FILE         what to train on what; see configs/experiment/ for complete ones
  --trainer.KEY VALUE       of Lightning's Trainer: max_epochs, devices, accelerator, precision, ...
  --model.KEY VALUE         the model, its losses, optimizer and schedule
  --data.KEY VALUE          files, labels, batches
  --ckpt_path FILE          a checkpoint to start from
  --potential NAME          of test, validate, predict: a saved potential instead
  --overwrite               replace what an earlier run left in the folder
  --seeds NUMBER            of fit: so many potentials from seeds, one committee
  --seed_everything NUMBER  of weights and batches; 0 by default
  --print_config            write the whole configuration as it would be used, and end

  atomeq {verb} --help=all lists every key, --model.model.help CLASS those of a model."""

HELP = {
    "fit": """\
Train a potential. A run lives in one folder, --trainer.default_root_dir (runs/NAME of the file by
default): configuration, checkpoints, metrics and in the end the potential. Every key of the file
can be overridden; --ckpt_path last goes on where the last run in the folder stopped, --overwrite
begins again there.

examples:
  atomeq fit -c configs/experiment/acac_escn.yaml
  atomeq fit -c configs/experiment/acac_escn.yaml --trainer.max_epochs 50
  atomeq fit -c configs/experiment/acac_escn.yaml --seeds 4    (committee/ in the run's folder)
""",
    "validate": """\
Errors of a checkpoint on the validation set.

example:
  atomeq validate -c EXPERIMENT.yaml --ckpt_path runs/NAME/checkpoints/best.ckpt
""",
    "test": """\
Errors of a checkpoint or a saved potential on each test set, beside those that the experiment
names as published.

examples:
  atomeq test -c EXPERIMENT.yaml --ckpt_path runs/NAME/checkpoints/best.ckpt
  atomeq test -c configs/experiment/cu_pbe.yaml --potential cu-pbe
""",
    "predict": """\
Energies and forces, or the target, of the structures of a file.

example:
  atomeq predict -c EXPERIMENT.yaml --data.predict FILE --ckpt_path CHECKPOINT
""",
}


def main(argv: Sequence[str]) -> int | None:
    """Answer what needs no torch, and hand the rest over.

    Args:
        argv: The verb and its options.
    """
    verb, *words = argv
    if not words:
        raise ValueError(f"give a configuration: atomeq {verb} -c FILE; see atomeq {verb} --help")
    if set(words) & {"-h", "--help"}:
        say(
            f"usage: atomeq {verb} -c FILE [--KEY VALUE ...]\n\n{HELP[verb]}\n"
            f"options:\n{_KEYS.format(verb=verb)}"
        )
        return 0
    for path in named_in_words(words)[0]:
        existing_file(path)
    words = ["--help" if word == "--help=all" else word for word in words]
    return importlib.import_module("atomeq.cli.training").main([verb, *words])


def named_in_words(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the configuration files and the task that a command line names, whatever else it says.

    The task decides which keys there are, so both are looked for before the parser of all keys.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="?", action="append", default=[])
    parser.add_argument("--task", nargs="?")
    known, _ = parser.parse_known_args(list(words))
    return [path for path in known.config if path], known.task
