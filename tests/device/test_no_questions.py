"""Models on a device that has no memory: nothing waits for it, nothing is made on the host.

What a model sends to the device is counted; a number of the table goes down, or it is said why not.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
SCRIPT = Path(__file__).parents[1] / "fake_device.py"
WORK = ("forces", "stress", "training")
ORDERS = ["reference"]
if find_spec("triton"):
    ORDERS.append("triton,reference")

#: Operations sent to the device, at most: energy and forces, with stress, a step of training; in
#: plain torch, then with kernels where there are some. Weights are single precision, and fixed but
#: in training, so that with kernels radial networks are read off tables.
MOST = {
    "clifford": ((860, 890, 2600), (860, 890, 2600)),
    "egnn": ((570, 600, 1500), (560, 590, 1490)),
    "equiformer_v2": ((640, 670, 1930), (250, 280, 1700)),
    "equiformer_v3": ((635, 665, 1870), (295, 325, 1675)),
    "equihgnn": ((690, 720, 2420), (670, 700, 2410)),
    "escn": ((540, 570, 1530), (110, 140, 1190)),
    "esen": ((550, 580, 1570), (120, 150, 1230)),
    "faenet": ((580, 610, 1440), (560, 590, 1380)),
    "faenet_canonical": ((900, 930, 2510), (870, 905, 2440)),
    "geometric_algebra": ((575, 605, 1290), (565, 595, 1280)),
    "mace": ((570, 600, 1240), (450, 480, 890)),
    "nequip": ((740, 780, 1760), (660, 700, 1500)),
    "ponita": ((510, 540, 1100), (510, 540, 1100)),
    "se3_transformer": ((830, 860, 2865), (825, 855, 2860)),
    "segno": ((630, 660, 1630), (620, 650, 1620)),
}
#: How many frames a structure has depends on its symmetry, and how many neighbours or pairs of them
#: an atom has on where they are, which only the device knows.
QUESTIONS = {
    "faenet": ["nn/frame_averaging.py"],
    "faenet_canonical": ["models/frame_averaged.py"],
    "geometric_algebra": ["models/geometric_algebra.py"],
    "ponita": ["nn/local_frames.py", "nn/local_frames.py"],
}
#: Whether atoms are closer than in a potential's data is asked of what is not trained on.
OF_DISTANCES = ["potential/distances.py"]
#: A stress of a cell without volume is refused before anything is computed.
OF_STRESS = ["potential/derivatives.py"]


@pytest.fixture(scope="module", params=ORDERS)
def found(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    process = subprocess.run(
        [sys.executable, str(SCRIPT), request.param, *map(str, CONFIGS)],
        env=os.environ | {"TRITON_INTERPRET": "1"},  # kernels do not run, but may be chosen
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return ORDERS.index(request.param), json.loads(process.stdout)


@pytest.mark.parametrize("model", MOST)
def test_what_a_cuda_graph_records_asks_nothing(found, model: str) -> None:
    seen = found[1][model]["recorded"]
    assert seen["questions"] == seen["on_host"] == []
    # Frames ask, and hypergraphs are not padded; whatever else is in the table can be recorded.
    recorded = model not in QUESTIONS and model != "equihgnn"
    assert (seen["dispatches"] > 0) == recorded


def test_every_model_is_in_the_table() -> None:
    assert {path.stem for path in CONFIGS} == set(MOST)


@pytest.mark.parametrize("model", MOST)
def test_no_model_asks_the_device(found, model: str) -> None:
    for work in WORK:
        known = OF_DISTANCES * (work != "training") + OF_STRESS * (work == "stress")
        known = known + QUESTIONS.get(model, [])
        asked = [line.partition(":")[0] for line in found[1][model][work]["questions"]]
        assert asked == known, (work, found[1][model][work]["questions"])


@pytest.mark.parametrize("model", MOST)
def test_no_model_makes_tensors_of_the_host(found, model: str) -> None:
    assert [line for work in WORK for line in found[1][model][work]["on_host"]] == []


@pytest.mark.parametrize("model", MOST)
def test_no_model_sends_more_than_it_did(found, model: str) -> None:
    order, rows = found
    sent = [rows[model][work]["dispatches"] for work in WORK]
    assert all(n <= most for n, most in zip(sent, MOST[model][order], strict=True)), sent


def test_what_a_fake_device_is_asked_is_seen() -> None:
    code = """
import fake_device, torch
fake_device._setup_privateuseone_for_python_backend(fake_device.DEVICE)
fake_device.FakeTensor.tolist = fake_device.nested_zeros
with fake_device.MODE:
    x = torch.ones(4, device=fake_device.DEVICE)
    for ask in (lambda: bool(x.any()), lambda: x.sum().item(), lambda: torch.nonzero(x),
                lambda: x.tolist(), lambda: x[x > 0], lambda: x.cpu()):
        with fake_device.Dispatches() as seen:
            ask()
        print(len(seen.questions), len(seen.on_host))
    with fake_device.Dispatches() as seen:
        torch.zeros(4)
    print(len(seen.questions), len(seen.on_host))
    try:
        x + torch.zeros(4)
    except RuntimeError:
        print("refused")
"""
    paths = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert said == ["1 0"] * 5 + ["0 1"] * 2 + ["refused", ""]
