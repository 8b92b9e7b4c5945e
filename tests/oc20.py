"""Small catalysis frames with all that OC20's have, for tests of its readers and tasks."""

import numpy as np
from ase.build import add_adsorbate, fcc111, molecule

from atomeq.data.oc20_frame import OC20Frame


def slab_frames(n_frames: int = 5, *, is2re: bool = False) -> list[OC20Frame]:
    """Slabs of 12 metal atoms with one of three adsorbates; labels are random numbers."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(n_frames):
        slab = fcc111(("Cu", "Pt", "Ag")[k % 3], size=(2, 2, 3), vacuum=6.0, periodic=True)
        layers = slab.get_tags()
        add_adsorbate(slab, molecule(("CO", "OH", "CH3")[k % 3]), 2.0, "ontop")
        slab.rattle(0.05, seed=k)
        n_adsorbed = len(slab) - len(layers)
        frames.append(
            OC20Frame(
                numbers=slab.numbers.astype(np.int64),
                positions=slab.positions,
                cell=slab.cell.array,
                tags=np.concatenate([(layers == 1).astype(np.int64), np.full(n_adsorbed, 2)]),
                fixed=np.concatenate([layers > 1, np.zeros(n_adsorbed, dtype=bool)]),
                sid=1000 + k,
                fid=None if is2re else 7 * k,
                energy=None if is2re else float(rng.normal(-300, 1)),
                reference_energy=None if is2re else float(rng.normal(-299, 1)),
                forces=None if is2re else rng.normal(size=(len(slab), 3)),
                relaxed_energy=float(rng.normal()) if is2re else None,
                initial_energy=float(rng.normal()) if is2re else None,
                relaxed_positions=slab.positions + 0.1 if is2re else None,
            )
        )
    return frames
