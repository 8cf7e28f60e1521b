"""Written pages on their way to the disk while the next ones are computed, so that little is left to wait for."""

import ctypes
import functools
import sys
from collections.abc import Callable

START = 2  # SYNC_FILE_RANGE_WRITE of Linux's fs.h


def start_writing(descriptor: int, place: int, num_bytes: int) -> None:
    """Asks the system to begin writing a range of a file to the disk; where it cannot be asked, nothing happens.

    This is no promise that anything arrives: `fsync` is.
    """
    call = _find_call()
    if call is not None:
        call(descriptor, place, num_bytes, START)


@functools.cache
def _find_call() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
