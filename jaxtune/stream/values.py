"""Between stored bits and the numbers that a merge computes with, for blocks that fit into a cache."""

import ml_dtypes
import numpy as np

from jaxtune.checkpoint.rounding import round_to_stored

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What NumPy and ml_dtypes round once, to nearest, ties to even; the other ways take care in `round_to_stored`.
DIRECT = {np.dtype(np.float32): (np.dtype(np.float16), BFLOAT16), np.dtype(np.float64): (np.dtype(np.float32),)}


def narrow_into(name: str, values: np.ndarray, out: np.ndarray) -> bool:
    """Puts values into an array of the dtype of the file: rounded once, to nearest, ties to even.

    Returns:
        Whether all that came in is finite; where not, nothing is said of `out`.

    Raises:
        CheckpointError: a finite value would become infinite.
    """
    if values.dtype == out.dtype or out.dtype in DIRECT.get(values.dtype, ()):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(out, values, casting="unsafe")
        if is_finite(out):
            return True
    if not is_finite(values):
        return False
    out[...] = round_to_stored(name, values, out.dtype)
    return True


def is_finite(values: np.ndarray) -> bool:
    """Whether neither NaN nor Inf is among floats of any dtype."""
    if not values.size:
        return True
    if values.dtype == BFLOAT16:  # by its exponent: four times as fast as by its value
        return int((values.view(np.uint16) & np.uint16(0x7FFF)).max()) < 0x7F80
    if values.dtype.itemsize == 1:
        values = values.astype(np.float32)
    return bool(np.isfinite(values).all())
