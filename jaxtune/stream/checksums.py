"""CRC-32 of large files, in parts that are read side by side: fast enough to be taken of everything, every time."""

import mmap
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxtune.checkpoint.files import open_regular

PART = 1 << 26
POLYNOMIAL = 0xEDB88320


def crc32_of_file(path: str | Path, map_parts: Callable[..., Iterable] = map) -> int:
    """The CRC-32 of a file, as zlib, gzip and `cksum -a crc32b` have it.

    Args:
        path: Of the file.
        map_parts: `map`, possibly of a pool of threads.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_regular(Path(path)) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if not num_bytes:
            return 0
        with mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:

            def sum_part(start):
                with view[start : start + PART] as part:
                    return zlib.crc32(part), len(part)

            total = 0
            for crc, length in map_parts(sum_part, range(0, num_bytes, PART)):
                total = combine_crc32(total, crc, length)
            return total


def combine_crc32(first: int, second: int, length: int) -> int:
    """CRC-32 of two texts, one after the other, from theirs; `length` is that of the second, in bytes.

    The first is carried over as many zero bytes, a linear map over GF(2) that is squared for every bit of `length`.
    """
    # Map of one zero bit: shift, and the polynomial where a bit falls out. Column n is where bit n goes.
    power = [POLYNOMIAL, *(1 << n for n in range(31))]
    for _ in range(3):
        power = [_times(power, column) for column in power]  # of one zero byte
    while length:
        if length & 1:
            first = _times(power, first)
        power = [_times(power, column) for column in power]
        length >>= 1
    return first ^ second


def _times(matrix, vector):
    total, n = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[n]
        vector >>= 1
        n += 1
    return total
