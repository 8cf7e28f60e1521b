"""Arrays that begin at a line of the processor's cache, and whose memory is used again and again.

NumPy's own begin where they happen to, and it adds and multiplies into those at half the speed.
"""

import math
import sys
import threading
from typing import Any

import numpy as np

LINE = 64  # bytes
GRAIN, MOST = 1 << 16, 1 << 20  # what is used again comes in multiples of so many bytes, and up to so many
MOST_KEPT = 32  # of a size and thread

_kept = threading.local()


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`numpy.empty` that begins at such a place; in memory of an earlier one to which nothing refers any more."""
    dtype = np.dtype(dtype)
    memory, first = _take(math.prod(shape) * dtype.itemsize)
    return np.ndarray(shape, dtype, memory, first)


def copy_aligned(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A copy in a dtype, at such a place."""
    copy = empty_aligned(array.shape, dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy


def _take(num_bytes):
    """Memory, and where in it to begin."""
    if num_bytes > MOST:
        return _make(num_bytes)
    size = -(-num_bytes // GRAIN)
    some = _kept.__dict__.setdefault(size, [])
    count = sys.getrefcount  # of the memory itself: a view of a view refers to that
    for entry in some:
        if count(entry[0]) == UNUSED:
            return entry
    entry = _make(size * GRAIN)
    if len(some) < MOST_KEPT:
        some.append(entry)
    return entry


def _make(num_bytes):
    memory = np.empty(num_bytes + LINE, np.uint8)
    return memory, -memory.ctypes.data % LINE


def _count_unused():
    entry = _make(LINE)
    return sys.getrefcount(entry[0])


UNUSED = _count_unused()
