"""Interpolate between the weights of a potential and of one that was fine-tuned from it.

``.venv/bin/python scripts/weights_between.py START TUNED 0.9 OUT`` writes a potential whose weights
are 0.1 of the first's and 0.9 of the second's. A little of the old weights costs little of what was
learned, and brings more back of what was forgotten: Wortsman et al., Robust fine-tuning of
zero-shot models, CVPR 2022 (arXiv:2109.01903). Which share is best, errors on both sets tell:
``atomeq evaluate OUT new.extxyz old.extxyz``.
"""

import argparse
import copy
from pathlib import Path

import torch

from atomeq.potential.checkpoint import load_potential, save_potential
from atomeq.potential.potential import Potential


def between(start: Potential, tuned: Potential, share: float) -> Potential:
    """Return a potential with weights start + share (tuned - start).

    Raises:
        ValueError: The share is not from 0 to 1, the networks are not the same, or their energies
            have other zeros.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the second is from 0 to 1, not {share}")
    ours, theirs = (dict(one.named_parameters()) for one in (start, tuned))
    unlike = {
        name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape
    }
    if unlike := sorted(unlike | ours.keys() ^ theirs.keys()):
        raise ValueError(f"these are two networks: they differ in {unlike[0]}, of {len(unlike)}")
    for name, own in start.references.named_buffers():
        if not torch.allclose(own, tuned.references.get_buffer(name)):
            raise ValueError(
                f"their references differ in {name}: fine-tune with `references: none`"
            )
    result = copy.deepcopy(tuned)
    result.uncertainty = None  # that of other weights
    with torch.no_grad():
        for name, weight in result.named_parameters():
            weight.copy_(torch.lerp(ours[name], theirs[name], share))
    return result


def main() -> None:
    """Write the potential between two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", help="potential that the fine-tuning started from")
    parser.add_argument("tuned", help="what it became")
    parser.add_argument("share", type=float, help="of the second, 0 to 1")
    parser.add_argument("target", type=Path, help="a new folder")
    options = parser.parse_args()
    if options.target.exists():
        parser.error(f"{options.target} exists: name a new folder, or remove it")
    try:
        start, tuned = load_potential(options.start), load_potential(options.tuned)
        found = between(start, tuned, options.share)
    except ValueError as error:
        parser.error(str(error))
    made_of = {options.start: 1 - options.share, options.tuned: options.share}
    save_potential(found, options.target, metadata={"weights_between": made_of})
    print(f"potential saved in {options.target}")


if __name__ == "__main__":
    main()
