"""How much a reader must follow from a call to its arithmetic: frames, files, changes of file."""

from pathlib import Path

import pytest
from trace_layer import forces, layer, trace

from atomeq.ops.c_compiler import unavailable

SHIPPED = Path(__file__).parents[2] / "potentials" / "cu-pbe"

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")


def test_the_way_from_an_edge_layer_to_c_is_short() -> None:
    way = trace(layer(), until="_call_layer")
    assert 5 < len(way.files) <= 72
    assert len(set(way.files)) <= 8


def test_the_way_from_a_structure_to_its_forces_turns_few_pages() -> None:
    # Ten operations in C, each some 11 pages on the way and half as many on the way back: fewer
    # pages for an operation is what would shorten this. ZBL beside the network has another 18, and
    # three are what replays of small systems and threads are asked on the way, five are
    # whether the host may look at numbers, and four the memory of an edge layer, which has a file.
    assert 20 < trace(forces(str(SHIPPED))).n_changes <= 287
