"""Freed memory stays with the process: what one step of dynamics needed, the next needs again.

The C library of Linux gives the top of its heap back to the system whenever enough of it is free,
and maps large blocks anew each time. A step of a batch allocates and frees tens of megabytes, so
every step paid for thousands of page faults: a tenth to a fifth of its time
(``scripts/benchmark.py dynamics --memory``).
"""

import ctypes
import os
import platform
from functools import cache

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 << 20  # bytes; glibc takes none that is larger
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Let the process keep what it frees, for good; blocks above 32 MiB go back nevertheless.

    The most that the process needed at one time is what it keeps. Nothing is changed where the C
    library is another than glibc, or where the environment sets glibc's thresholds.

    Returns:
        Whether memory is kept.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS):
        return False
    library = ctypes.CDLL(None)
    thresholds = ((_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER))
    return all(library.mallopt(name, value) == 1 for name, value in thresholds)
