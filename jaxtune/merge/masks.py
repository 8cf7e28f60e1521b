"""Masks of elements, applied without a branch for each: on random masks `numpy.where` takes ten times as long."""

import functools
from typing import Any

import numpy as np

from jaxtune.merge.aligned import empty_aligned
from jaxtune.types import Leaf


def pack(mask: np.ndarray) -> np.ndarray:
    """A mask's bits, eight a byte."""
    return np.packbits(mask.reshape(-1))


def weigh(xp: Any, mask: Leaf, like: Leaf, factor: Any = 1.0) -> Leaf:
    """`factor` where a mask is true, zero elsewhere, in shape and dtype of another array; on the host of its bits."""
    if xp is not np:
        return xp.where(mask, xp.asarray(factor, like.dtype), 0.0)
    weights = empty_aligned((len(mask), 8), like.dtype)
    np.take(BYTES[like.dtype.itemsize] * factor, mask, axis=0, out=weights, mode="clip")
    return weights.reshape(-1)[: like.size].reshape(like.shape)


def keep(xp: Any, mask: Leaf, values: Leaf) -> Leaf:
    """The values where the mask is true, zero elsewhere; what is not finite should be kept."""
    return values * mask if xp is np else xp.where(mask, values, 0.0)


def keep_scaled(xp: Any, mask: Leaf, values: Leaf, factor: Any) -> Leaf:
    """The same times a factor; on the host of packed bits, and written into the values."""
    if xp is not np:
        return keep(xp, mask, values) * factor
    values *= weigh(xp, mask, values, factor)
    return values


def choose(xp: Any, mask: Leaf, one: Leaf, other: Leaf) -> Leaf:
    """The bits of `one` where the mask is true, of `other` elsewhere; both of one dtype."""
    if xp is not np or one.ndim == 0:
        return xp.where(mask, one, other)
    words = _words_of(one.dtype)
    one, other = (np.ascontiguousarray(array).view(words) for array in (one, other))
    return (other ^ ((one ^ other) & -mask.astype(words))).view(f"f{words.itemsize}")


def sizes_of(xp: Any, values: Leaf) -> Leaf:
    """Their magnitudes; on the host in memory that was used before."""
    return np.abs(values, out=empty_aligned(values.shape, values.dtype)) if xp is np else xp.abs(values)


def sign_of(is_plus: Leaf, dtype: Any) -> Leaf:
    """1 where true, -1 elsewhere."""
    return is_plus.astype(dtype) * 2 - 1


def signs_of(xp: Any, values: Leaf) -> Leaf:
    """What `turn` takes: the sign of every value; zero is either."""
    if xp is not np:
        return sign_of(values >= 0, values.dtype)
    words = _words_of(values.dtype)
    signs = empty_aligned(values.shape, words)
    return np.bitwise_and(values.view(words), np.iinfo(words).min, out=signs)


def turn(xp: Any, signs: Leaf, values: Leaf) -> Leaf:
    """The values, negated where the sign is negative; on the host written into them."""
    if xp is not np:
        return values * signs
    words = values.view(signs.dtype)
    words ^= signs
    return values


def turn_and_clip(xp: Any, signs: Leaf, values: Leaf) -> Leaf:
    """The same, and zero where that is negative (never -0, of which `numpy.maximum` takes either)."""
    if xp is not np:
        return xp.maximum(values * signs, 0.0)
    words = turn(xp, signs, values).view(signs.dtype)
    # Beside an array of zeros four times as fast as beside a single one.
    np.maximum(words, _zeros(words.size, words.dtype).reshape(words.shape), out=words)
    return values


@functools.lru_cache(maxsize=8)
def _zeros(size, dtype):
    return np.zeros(size, dtype)


@functools.cache
def _words_of(dtype):
    return np.dtype(f"i{dtype.itemsize}")


BYTES = {
    size: np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(f"f{size}") for size in (4, 8)
}  # bytes of a float -> its zeros and ones for every eight bits
