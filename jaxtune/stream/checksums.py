"""CRC-32 of large files: of the whole, of parts that are put together, or of a sample that tells files apart."""

import functools
import os
import zlib
from pathlib import Path

from jaxtune.checkpoint.files import open_regular

PART = 1 << 20
POLYNOMIAL = 0xEDB88320
WHOLE, PIECES, PIECE = 1 << 26, 256, 1 << 16


def crc32_of_file(path: str | Path) -> int:
    """The CRC-32 of a file, as zlib, gzip and `cksum -a crc32b` have it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    crc = 0
    with open_regular(Path(path)) as file:
        while part := file.read(PART):
            crc = zlib.crc32(part, crc)
    return crc


def crc32_of_sample(path: str | Path) -> tuple[int, bool]:
    """The CRC-32 of a file up to 64 MiB; of a larger one that of 256 evenly spaced pieces of 64 KiB, end to end.

    The first piece holds the beginning (names, shapes), the last the end. To read all of what was merged only for its
    checksum would double the reading where files are larger than memory.

    Returns:
        The CRC-32, and whether it is that of the whole.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_regular(Path(path)) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= WHOLE:
            return zlib.crc32(file.read()), True
        crc = 0
        for n in range(PIECES):
            file.seek((num_bytes - PIECE) * n // (PIECES - 1))
            crc = zlib.crc32(file.read(PIECE), crc)
        return crc, False


def combine_crc32(first: int, second: int, length: int) -> int:
    """CRC-32 of two texts, one after the other, from theirs; `length` is that of the second, in bytes.

    The first is carried over as many zero bytes, a linear map over GF(2) that is squared for every bit of `length`.
    """
    return _times(_zeros(length), first) ^ second


@functools.lru_cache(maxsize=256)
def _zeros(length: int) -> tuple[int, ...]:
    """The map of a CRC that `length` zero bytes make; column n is where bit n goes."""
    # Map of one zero bit: shift, and the polynomial where a bit falls out.
    power = [POLYNOMIAL, *(1 << n for n in range(31))]
    for _ in range(3):
        power = [_times(power, column) for column in power]  # of one zero byte
    result = [1 << n for n in range(32)]
    while length:
        if length & 1:
            result = [_times(power, column) for column in result]
        power = [_times(power, column) for column in power]
        length >>= 1
    return tuple(result)


def _times(matrix, vector):
    total, n = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[n]
        vector >>= 1
        n += 1
    return total
