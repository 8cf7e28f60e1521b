"""Masks of elements, applied without a branch for each: on random masks `numpy.where` takes ten times as long."""

from typing import Any

import numpy as np

from jaxtune.types import Leaf


def keep(xp: Any, mask: Leaf, values: Leaf) -> Leaf:
    """The values where the mask is true, zero elsewhere; what is not finite should be kept."""
    return values * mask if xp is np else xp.where(mask, values, 0.0)


def choose(xp: Any, mask: Leaf, one: Leaf, other: Leaf) -> Leaf:
    """The bits of `one` where the mask is true, of `other` elsewhere; both of one dtype."""
    if xp is not np or one.ndim == 0:
        return xp.where(mask, one, other)
    words = np.dtype(f"i{one.dtype.itemsize}")
    one, other = (np.ascontiguousarray(array).view(words) for array in (one, other))
    return (other ^ ((one ^ other) & -mask.astype(words))).view(f"f{words.itemsize}")


def sign_of(is_plus: Leaf, dtype: Any) -> Leaf:
    """1 where true, -1 elsewhere."""
    return is_plus.astype(dtype) * 2 - 1
