"""Checkpoints that lie, expand, or do not fit: a CheckpointError of one line, and soon."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ase.build import bulk
from ase.io import write
from safetensors.torch import load_file, save_file
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.potential.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    load_potential,
    save_potential,
    sha256,
)

HEADER = "checkpoint_version: 1\ndtype: float32\nsha256: x\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "alias bomb": HEADER + BOMB + "model: *i\n",
    "self-reference": HEADER + "model: &m\n  class_path: *m\n",
    "deep nesting": HEADER + "model: " + "[" * 5000 + "]" * 5000,
    "deep mappings": HEADER + "model: " + "{a: " * 3000 + "1" + "}" * 3000,
    "endless digits": HEADER + "model: " + "9" * 10_000,
    "no date": HEADER + "model: 2026-99-99\n",
    "a list": "[1, 2]",
    "a number": "5",
    "nothing": "",
    "bytes": "\x00\x01",
    "unhashable": "{[1]: 2, {}: 3}",
    "missing": "model: {}\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_potential(small_potential(torch.float32), tmp_path / "small")


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    document = yaml.safe_load((folder / CONFIG_FILE).read_text())
    change(document)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(document))
    return folder


def with_arguments(folder: Path, **arguments: Any) -> Path:
    return changed(folder, lambda document: document["model"]["init_args"].update(arguments))


def exit_code(folder: Path, tmp_path: Path) -> object:
    write(tmp_path / "cu.extxyz", bulk("Cu"))
    words = f"single-point {tmp_path}/cu.extxyz --potential {folder} --out {tmp_path}/o.extxyz"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    return ended.value.code


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_yaml_that_is_no_description(text: str, folder: Path, tmp_path: Path, capsys):
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=CONFIG_FILE) as caught:
        load_potential(folder)
    assert len(str(caught.value)) < 2000
    assert exit_code(folder, tmp_path) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_honest_aliases_are_read(folder: Path):
    errors = [0.1, 0.2]
    changed(folder, lambda document: document.update(metadata={"a": errors, "b": errors}))
    assert "*id001" in (folder / CONFIG_FILE).read_text()
    load_potential(folder)


WRONG = [None, True, -1, 0, 1.5, float("nan"), float("inf"), "x", [], [1], {}, {"a": 1}, 10**30]


def paths(value: Any) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict):
        return [()]
    return [(), *((key, *rest) for key, inside in value.items() for rest in paths(inside))]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # 0 channels
def test_wrong_types_anywhere(folder: Path):
    """Each place of model.yaml takes each wrong value: it loads as before or is refused so."""
    original = (folder / CONFIG_FILE).read_text()
    wanted = small_potential(torch.float32).state_dict()
    messages = []
    for path in paths(yaml.safe_load(original)):
        if not path or path[0] == "metadata":
            continue
        for value in WRONG:
            document = yaml.safe_load(original)
            place = document
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            (folder / CONFIG_FILE).write_text(yaml.safe_dump(document))
            try:
                loaded = load_potential(folder)
            except CheckpointError as error:
                messages.append(str(error))
            else:
                torch.testing.assert_close(loaded.state_dict(), wanted)
    assert len(messages) > 100
    assert all("small" in message for message in messages)


@pytest.mark.parametrize("value", [0, -1.0, "20", None, True, [20.0], float("nan"), float("inf")])
def test_neighbours_are_counted_in_numbers_above_zero(value: Any, folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="avg_num_neighbors"):
        load_potential(with_arguments(folder, avg_num_neighbors=value))
    assert exit_code(folder, tmp_path) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden_channels": 2**40},
        {"hidden_channels": 100_000},
        {"num_layers": 10**12},
        {"num_elements": 10**15},
        {"num_radial": 10**11},
        {"hidden_channels": -4},
    ],
    ids=str,
)
def test_a_network_larger_than_its_weights_is_not_built(arguments: dict[str, int], folder: Path):
    """It would need terabytes: that it ends at all is the test."""
    with pytest.raises(CheckpointError, match="init_args"):
        load_potential(with_arguments(folder, **arguments))


def test_huge_orders_of_spherical_harmonics_are_not_built(folder: Path):
    arguments = {"lmax": 10**6, "mmax": 10**6, "num_layers": 1}
    node = {"class_path": "atomeq.models.escn.ESCN", "init_args": arguments}
    with pytest.raises(CheckpointError, match="init_args"):
        load_potential(changed(folder, lambda document: document.update(model=node)))


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.int32])
def test_weights_of_another_dtype_than_declared(stored: torch.dtype, folder: Path, tmp_path: Path):
    weights = load_file(folder / WEIGHTS_FILE)
    name = "model.embedding.weight"
    weights[name] = weights[name].to(stored)
    save_file(weights, folder / WEIGHTS_FILE)
    changed(folder, lambda document: document.update(sha256=sha256(folder / WEIGHTS_FILE)))
    with pytest.raises(CheckpointError, match=rf"{name} is {stored}"):
        load_potential(folder)
    assert exit_code(folder, tmp_path) == 2


@pytest.mark.parametrize("key", ["terms", "target", "view"])
@pytest.mark.parametrize("value", [5, "x", [1], {"a": 1}, {"name": 5}, {"kind": []}], ids=str)
def test_parts_of_other_kinds(key: str, value: Any, folder: Path):
    with pytest.raises(CheckpointError, match="small"):
        load_potential(changed(folder, lambda document: document.update({key: value})))


def test_autocast_changes_no_result():
    potential = small_potential(torch.float32)
    graph = potential.build_graph(bulk("Cu", cubic=True))
    keys = ("energy", "forces", "stress")
    outside = potential(graph, keys)
    with torch.autocast("cpu", torch.bfloat16):
        inside = potential(graph, keys)
    for key in keys:
        assert torch.equal(inside[key], outside[key])


def test_a_meta_default_device_is_named(folder: Path):
    calculator = AtomeqCalculator(folder)
    with torch.device("meta"):
        for ask in (
            lambda: load_potential(folder),
            lambda: calculator.evaluate([bulk("Cu")]),
            lambda: calculator.potential.build_graph(bulk("Cu")),
        ):
            with pytest.raises(ValueError, match="default device is 'meta'"):
                ask()
    assert calculator.evaluate([bulk("Cu")])
