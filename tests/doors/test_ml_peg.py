"""ml-peg loads our calculator by its list of models; skipped where it is missing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.models.egnn import EGNN
from atomeq.potential.checkpoint import save_potential
from atomeq.potential.potential import Potential

MODELS = """
ours:
  module: atomeq
  class_name: AtomeqCalculator
  device: cpu
  trained_on_dispersion: false
  kwargs: {potential: %s, ignore: [charge, spin]}
"""
#: In a process of its own: its sets are pytest's functions, with marks that ours does not know.
RUN = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
from ml_peg import models
models.models_file = folder / "models.yml"
from ml_peg.calcs.physicality.translational_symmetry import calc_translational_symmetry as symmetry
symmetry.OUT_PATH = folder
symmetry.test_translational_symmetry(("ours", symmetry.MODELS["ours"]))
"""


@pytest.mark.filterwarnings("ignore")
def test_a_set_of_ml_peg_sees_the_symmetry_of_the_potential(tmp_path: Path):
    try:
        import mlipx.nodes.generic_ase  # noqa: F401
    except ImportError as error:
        pytest.skip(f"{error}: pip install ml-peg==0.7.0")
    torch.manual_seed(0)
    model = EGNN(cutoff=4.0, num_layers=1, hidden_channels=8).double()
    save_potential(Potential(model), tmp_path / "egnn")
    (tmp_path / "models.yml").write_text(MODELS % (tmp_path / "egnn"))
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = sorted((tmp_path / "ours").glob("*.xyz"))
    assert len(written) == 10
    calculator = AtomeqCalculator(tmp_path / "egnn", ignore=["charge", "spin"])
    for path in written:
        start, *moved = read(path, ":")
        energy = calculator.get_potential_energy(start)
        assert len(moved) == 3
        assert start.get_potential_energy() == pytest.approx(energy, abs=1e-6)
        for atoms in moved:
            assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-6)
            assert np.allclose(atoms.get_forces(), start.get_forces(), atol=1e-6)
