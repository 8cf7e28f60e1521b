"""From the dtype of the arithmetic to the dtype of the file, in one rounding that may not lose a value."""

import numpy as np

from jaxtune.errors import CheckpointError
from jaxtune.tree import describe_leaf, is_float


def check_castable(name: str, leaf, dtype: np.dtype) -> None:
    """Checks dtypes alone, before any value is known.

    Raises:
        CheckpointError: one side is a float and the other is not, or only one side is an integer.
    """
    if (
        leaf.dtype == dtype
        or (is_float(leaf) and _is_float_dtype(dtype))
        or (_is_integer(leaf.dtype) and _is_integer(dtype))
    ):
        return
    raise CheckpointError(
        f"tensor {name!r}: stored as {dtype}, got {describe_leaf(leaf)}. "
        "Floats are rounded to floats and integers fitted to integers; nothing else is converted."
    )


def round_to_stored(name: str, leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`leaf` in the dtype that the file stores.

    Floats are rounded once, to nearest, ties to even. Integers must fit.

    Args:
        name: For the message.
        leaf: What was computed; usually float32.
        dtype: What is stored.

    Raises:
        CheckpointError: a finite value would become infinite or NaN, an infinite one something else, an integer
            does not fit, or the dtypes cannot be converted at all.
    """
    dtype = np.dtype(dtype)
    check_castable(name, leaf, dtype)
    if leaf.dtype == dtype:
        return leaf
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if not is_float(leaf):
            stored = leaf.astype(dtype)
            lost = stored != leaf
        else:
            stored = _keep_sticky_bit(leaf, dtype).astype(dtype)
            lost = (np.isfinite(leaf) & ~np.isfinite(stored)) | (np.isinf(leaf) & ~np.isinf(stored))
    num_lost = int(np.count_nonzero(lost))
    if num_lost:
        example = leaf[lost].flat[0] if leaf.ndim else leaf[()]
        raise CheckpointError(
            f"tensor {name!r}: {num_lost} of {leaf.size} values of {describe_leaf(leaf)} do not fit the stored "
            f"{dtype}, the first is {example}. Make them smaller (for a task vector: a smaller scale), "
            "or write to a target stored in a wider dtype."
        )
    return np.asarray(stored)


def _keep_sticky_bit(leaf, dtype):
    """float64 on its way to a type of ml_dtypes, which converts it through float32 and so rounds twice.

    Rounding to odd first (truncate, then set the last bit where anything was cut off) makes the second rounding
    the only one that counts: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums". It takes two
    bits more than the final type has, and float32 has them.
    """
    if leaf.dtype != np.float64 or dtype in (np.float16, np.float32):
        return leaf
    near = leaf.astype(np.float32)
    is_inexact = np.isfinite(leaf) & (near.astype(np.float64) != leaf)
    bits = near.view(np.uint32) - (np.abs(near.astype(np.float64)) > np.abs(leaf)).astype(np.uint32)
    return (bits | is_inexact.astype(np.uint32)).view(np.float32)


def _is_float_dtype(dtype):
    return is_float(np.empty((), dtype))


def _is_integer(dtype):
    return np.dtype(dtype).kind in "iu"
