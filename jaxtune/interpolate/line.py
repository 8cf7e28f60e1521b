"""The straight line between two models."""

import numpy as np

from jaxtune.tree import check_same, is_float, map_leaves
from jaxtune.types import Leaf, Params


def interpolate_linear(first: Params, second: Params, weight: float | Leaf) -> dict:
    """`(1 - weight) * first + weight * second`, in float32 or wider, rounded once to the dtypes of `first`.

    Args:
        first, second: Two models of one architecture.
        weight: 0 gives `first` and 1 `second`, bit for bit where their dtypes agree; outside [0, 1] the line goes
            on. Traceable, so a whole line is one `vmap`.

    Returns:
        A tree as `first`. Integer and boolean leaves are `first`'s: there is no line between counters.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.

    Reference:
        Wortsman et al. 2022, arXiv:2109.01903 (WiSE-FT).
    """
    check_same({"first": first, "second": second})
    if isinstance(weight, float | int | np.generic | np.ndarray):
        weight = np.float64(weight)

    def mix(_, a, b):
        if not is_float(a):
            return a
        if isinstance(weight, np.float64) and weight in (0, 1):  # no arithmetic: it turns -0 into 0, Inf into NaN
            return (a, b)[int(weight)].astype(a.dtype)
        wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
        shares = (1 - weight).astype(wide), weight.astype(wide)
        mixed = (shares[0] * a.astype(wide) + shares[1] * b.astype(wide)).astype(a.dtype)
        return mixed if isinstance(weight, np.float64) else _keep_ends(weight, a, b.astype(a.dtype), mixed)

    return map_leaves(mix, first, second)


def _keep_ends(weight, a, b, mixed):
    """The same where `weight` is known on the device alone."""
    import jax.numpy as jnp

    return jnp.where(weight == 0, a, jnp.where(weight == 1, b, mixed))
