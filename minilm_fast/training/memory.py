"""Memory that the C library holds without need."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

# A trim takes some 50 ms and what it gives back is soon asked for again.
TRIM_EVERY = 64


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return None


def release_free_memory() -> None:
    """Give free pages back to the system, where the C library can.

    Batches of ever new sizes leave holes in glibc's heap that fit nothing later; without this a long run on a CPU
    grows to several times of what it uses.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
