import ctypes
import subprocess
import sys
import threading

import pytest
import torch

from atomeq.ops.edge.cpu import memory

ROWS = (300, 1000)  # over a megabyte: below an eighth of one the C library serves
LIKE = torch.empty(0)


def test_memory_is_used_again_when_the_last_view_is_gone() -> None:
    rows = memory.empty(ROWS, LIKE)
    address, view = rows.data_ptr(), rows[:10, 3]
    del rows
    assert memory.empty(ROWS, LIKE).data_ptr() != address
    del view
    places = {memory.empty(ROWS, LIKE).data_ptr() for _ in range(3)}
    assert len(places) == 1  # one of the two that are idle


def test_two_in_use_never_share_memory() -> None:
    kept = [memory.empty((n, 1000), LIKE).fill_(n) for n in (300, 301, 299, 300)]
    assert [int(rows.unique()) for rows in kept] == [300, 301, 299, 300]


def test_tensors_are_like_others() -> None:
    rows = memory.empty(ROWS, LIKE.double())
    assert rows.shape == ROWS
    assert rows.dtype == torch.float64
    assert rows.is_contiguous()
    assert rows.data_ptr() % 64 == 0  # what vector instructions like
    assert memory.empty((0, 7), LIKE).shape == (0, 7)


def test_idle_memory_is_bounded() -> None:
    for n in range(1, 12):  # each too large for the buffers before it
        memory.empty((2**n, 2**13), LIKE)
    idle = sum(buffer.nbytes for buffer in memory._buffers.every)
    assert idle <= memory._MOST + 2**26 + 8192  # the last one may exceed the bound alone


def test_threads_have_memory_of_their_own() -> None:
    mine = memory.empty(ROWS, LIKE)
    address = mine.data_ptr()
    del mine
    theirs: list[int] = []
    thread = threading.Thread(target=lambda: theirs.append(memory.empty(ROWS, LIKE).data_ptr()))
    thread.start()
    thread.join()
    assert theirs[0] != address


FREED_TOGETHER = """
import resource
import torch
from atomeq.ops.c_compiler import unavailable
assert unavailable() is None
faults = []
for _ in range(4):
    arrays = [torch.ones(2**20) for _ in range(6)]  # 24 MB
    del arrays
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[3] - faults[1])
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="it is glibc that is brought to"
)
def test_pages_of_arrays_are_kept_once_kernels_are_loaded() -> None:
    # before, all 6,144 pages came anew in each of two rounds; where an array moves once, its 1,024
    made = subprocess.run(
        [sys.executable, "-c", FREED_TOGETHER], capture_output=True, text=True, check=True
    )
    assert int(made.stdout) < 6144
