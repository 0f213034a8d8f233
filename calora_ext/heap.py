"""Free memory that glibc keeps: how to give it back, and how to have less of it.

Where there is no glibc, nothing here does anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
LARGE = 2 << 20  # bytes; the smallest tensors that are mapped alone while memory is scarce
STEP = 5 << 20  # the same in a training step, which frees tensors of 2 to 4 MB so often that mapping them anew takes a sixth of its time
LARGEST = 32 << 20  # where glibc's own threshold ends once it has seen something large freed (DEFAULT_MMAP_THRESHOLD_MAX)


def trim() -> None:
    """Give free memory back: glibc keeps most of what tensors of a few megabytes took, of every thread apart."""
    if release := _function("malloc_trim"):
        release(0)


@contextmanager
def frugal(smallest: int = LARGE) -> Iterator[None]:
    """Tensors of that many bytes and more go back to the system when they are freed.

    glibc raises the size from which it does that to the largest that was ever freed, up to 32 MB, and keeps twice as much at the end of its
    heap: 40 to 90 MB that nobody uses, by chance, while layers of 4 million weights are packed, and 400 of 1,450 MB in a training step of a
    1B model. Costs page faults, some microseconds per megabyte. Afterwards the thresholds are what glibc's own end at.
    """
    option = _function("mallopt")
    if option is None:
        yield
        return
    option(MMAP_THRESHOLD, smallest)
    option(TRIM_THRESHOLD, smallest)
    try:
        yield
    finally:
        option(MMAP_THRESHOLD, LARGEST)
        option(TRIM_THRESHOLD, 2 * LARGEST)


def _function(name: str):
    return getattr(ctypes.CDLL(None), name, None)
