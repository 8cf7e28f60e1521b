"""Random bits that belong to an element: the same whatever the order, the chunk or the device that asks.

Each 32-bit word is a hash of its place under a key of its stream, in integer arithmetic that NumPy and XLA agree on to
the bit.

Reference:
    The mixing function is `triple32` of C. Wellons' hash-prospector, a bijection of 32-bit integers found by search for
    the least bias: every bit in decides every bit out with a probability within 0.02 % of one half. Counter-based
    generators: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.merge.aligned import empty_aligned
from jaxtune.types import Leaf


@dataclass(frozen=True)
class Stream:
    """One stream of random bits.

    Attributes:
        low, high: Two 32-bit words that stand for seed, model and leaf; numbers, or traced.
    """

    low: Any
    high: Any


def make_stream(seed: int, model: int, name: str) -> Stream:
    """The stream of one model's leaf under a seed."""
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    return Stream(np.uint32(int.from_bytes(digest[:4], "little")), np.uint32(int.from_bytes(digest[4:8], "little")))


def draw_bits(xp: Any, stream: Stream, start: Any, shape: tuple[int, ...]) -> Leaf:
    """uint32[shape]: the words of the stream at places `start`, `start + 1`, …

    A word is its place plus the first key, mixed; the second key comes in between two steps of the mixing, so that
    streams whose first keys are near are no shifts of each other.
    """
    size = math.prod(shape)
    if xp is np:
        start = int(start)
        if (start >> 32) != ((start + max(size, 1) - 1) >> 32):  # a run across 2^32 is two runs
            first = (1 << 32) - (start & 0xFFFFFFFF)
            parts = [draw_bits(xp, stream, start, (first,)), draw_bits(xp, stream, start + first, (size - first,))]
            return np.concatenate(parts).reshape(shape)
        with np.errstate(over="ignore"):
            first = np.uint32(start & 0xFFFFFFFF) + stream.low
            words = np.add(_count_to(size), first, out=empty_aligned((size,), np.uint32))
            return _mix_in_place(words, stream.high + np.uint32(start >> 32) * BLOCK_STEP).reshape(shape)
    start = xp.asarray(start)
    low, high = start.astype(np.uint32), (start >> 32 if start.dtype.itemsize == 8 else start * 0).astype(np.uint32)
    return _mix(xp.arange(size, dtype=np.uint32) + (low + stream.low), stream.high + high * BLOCK_STEP).reshape(shape)


def draw_uniform(xp: Any, stream: Stream, start: Any, shape: tuple[int, ...]) -> Leaf:
    """float32[shape] in [0, 1): multiples of 2^-24."""
    words = draw_bits(xp, stream, start, shape)
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def draw_below(xp: Any, stream: Stream, start: Any, shape: tuple[int, ...], share: Any) -> Leaf:
    """bool[shape]: true with probability `share`, at places `start`, `start + 1`, …

    One word stands for two places. Its halves are compared with the share's first 16 bits; where they are equal, once
    in 65,536, a word of the place's own decides by the next 16. So words cost half, and the share is exact to 32 bits.
    """
    size, own = math.prod(shape), Stream(stream.high, stream.low)
    if xp is not np:
        scaled = xp.asarray(share) * 2.0**16
        coarse = xp.floor(scaled)
        fine = xp.floor((scaled - coarse) * 2.0**16).astype(np.uint32)
        return _draw_below_traced(xp, stream, own, start, size, coarse.astype(np.uint32), fine).reshape(shape)
    start, coarse = int(start), math.floor(float(share) * 2.0**16)
    fine = math.floor((float(share) * 2.0**16 - coarse) * 2.0**16)
    if coarse > 0xFFFF:
        return np.ones(shape, np.bool_)
    first = start % 2
    words = draw_bits(np, stream, start // 2, ((first + size + 1) // 2,))
    halves = words.astype("<u4", copy=False).view("<u2")[first : first + size]
    below, equal = (empty_aligned((size,), np.bool_) for _ in range(2))
    np.less(halves, np.uint16(coarse), out=below)
    if np.equal(halves, np.uint16(coarse), out=equal).any():
        for place in np.flatnonzero(equal).tolist():
            below[place] = _draw_word(own, start + place) >> 16 < fine
    return below.reshape(shape)


def _draw_word(stream, place):
    """One word as `draw_bits` has it, in Python's integers: for one alone they are ten times as fast as arrays."""
    word = ((place & WORD) + int(stream.low)) & WORD
    for step, (shift, factor) in enumerate(STEPS):
        if step == 1:
            word ^= (int(stream.high) + (place >> 32) * int(BLOCK_STEP)) & WORD
        word = ((word ^ (word >> shift)) * factor) & WORD
    return word ^ (word >> 14)


def _draw_below_traced(xp, stream, own, start, size, coarse, fine):
    from jax import lax

    start = xp.asarray(start)
    words = draw_bits(xp, stream, start // 2, ((size + 2) // 2,))
    halves = xp.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)
    halves = lax.dynamic_slice(halves, ((start % 2).astype(np.int32),), (size,))
    again = draw_bits(xp, own, start, (size,)) >> 16
    return (halves < coarse) | ((halves == coarse) & (again < fine))


def _mix(words, key):
    """triple32, with a key before its second step."""
    for step, (shift, factor) in enumerate(STEPS):
        words = words ^ key if step == 1 else words
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(factor)
    return words ^ (words >> np.uint32(14))


def _mix_in_place(words, key):
    """The same in the memory of `words`: twice as fast."""
    shifted = empty_aligned(words.shape, words.dtype)
    for step, (shift, factor) in enumerate(STEPS_OF_NUMPY):
        if step == 1:
            words ^= key
        np.right_shift(words, shift, out=shifted)
        words ^= shifted
        words *= factor
    np.right_shift(words, LAST_OF_NUMPY, out=shifted)
    words ^= shifted
    return words


@functools.lru_cache(maxsize=8)
def _count_to(size):
    """0, 1, …: the same for every run of a length."""
    return np.arange(size, dtype=np.uint32)


WORD = 0xFFFFFFFF
STEPS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
STEPS_OF_NUMPY = tuple((np.uint32(shift), np.uint32(factor)) for shift, factor in STEPS)
LAST_OF_NUMPY = np.uint32(14)
BLOCK_STEP = np.uint32(0x9E3779B9)  # between the keys of a leaf's parts of 2^32 elements
