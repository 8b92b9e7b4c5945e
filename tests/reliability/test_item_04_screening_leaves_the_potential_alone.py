"""Item 4: a screening computes as and where it is told, with a copy of the potential."""

import pytest
import torch
from analytic_potentials import Pairs, crystal, of

from atomeq.screening.engines import Job
from atomeq.screening.results import read_rows, read_run
from atomeq.screening.run import screen
from atomeq.screening.sources import Found


def test_the_callers_potential_stays_as_it_was(tmp_path):
    potential = of(Pairs())
    before = {name: value.clone() for name, value in potential.state_dict().items()}
    found = [Found("s#0", crystal())]
    screen(found, potential, out=tmp_path, steps=["single_point"], dtype="float32")
    assert potential.dtype == torch.float64
    assert all(torch.equal(before[k], v) for k, v in potential.state_dict().items())
    assert read_run(tmp_path)["provenance"]["dtype"] == "float32"
    (row,) = read_rows(tmp_path)
    exact = float(potential(potential.build_graph(crystal()))["energy"])
    assert 0 < abs(row["energy"] - exact) < 1e-4 * abs(exact)  # it did compute in float32


def test_the_device_is_honoured(tmp_path):
    potential = of(Pairs())
    job = Job(potential, [{"single_point": {}}], device="meta")
    assert job.load(potential).device.type == "meta"
    assert potential.device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA"):
            screen([], potential, out=tmp_path, device="cuda")


def test_what_nobody_can_train_is_not_copied():
    """A copy would make its radial tables again; what can be trained may change meanwhile."""
    potential = of(Pairs()).requires_grad_(False).eval()
    job = Job(potential, [{"single_point": {}}])
    assert job.load(potential) is potential
    assert Job(potential, [], dtype="float32").load(potential) is not potential
    assert job.load(potential.train()) is not potential
