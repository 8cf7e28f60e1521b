"""The straight line between two models."""

import numpy as np

from jaxtune.tree import check_same, is_float, map_leaves
from jaxtune.types import Leaf, Params


def interpolate_linear(first: Params, second: Params, weight: float | Leaf) -> dict:
    """`(1 - weight) * first + weight * second`, in float32 or wider, rounded once to the dtypes of `first`.

    Args:
        first, second: Two models of one architecture.
        weight: 0 gives `first` and 1 `second`, bit for bit; outside [0, 1] the line goes on. Traceable, so
            a whole line is one `vmap`.

    Returns:
        A tree as `first`. Integer and boolean leaves are `first`'s: there is no line between counters.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.

    Reference:
        Wortsman et al. 2022, arXiv:2109.01903 (WiSE-FT).
    """
    check_same({"first": first, "second": second})
    end = _end_of(weight)

    def mix(_, a, b):
        if not is_float(a):
            return a
        if end is not None:
            return (a, b)[end].astype(a.dtype)
        wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
        a_share = (1 - np.float64(weight)).astype(wide) if isinstance(weight, float | int) else 1 - weight.astype(wide)
        b_share = wide(weight) if isinstance(weight, float | int) else weight.astype(wide)
        return (a_share * a.astype(wide) + b_share * b.astype(wide)).astype(a.dtype)

    return map_leaves(mix, first, second)


def _end_of(weight):
    """0 or 1 at an end of the line, where no arithmetic may touch the bits; else None."""
    if isinstance(weight, float | int) and weight in (0, 1):
        return int(weight)
    return None
