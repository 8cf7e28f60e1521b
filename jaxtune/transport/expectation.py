"""What a transport is worth, told from the residual that it leaves between the bases, before anything is measured."""

import math

import numpy as np

# Share of the fine-tuning gain that arrived against the residual left by the transport, on the ladder of base pairs
# (docs/ladder.md): lines under and over what was measured there, on narrow and on wide models. They were drawn on the
# narrow pairs; the knots at 0.25, where no narrow pair lies, and the upper line from 1.05 on, above which wider
# strangers came out, were placed with the wide pairs in sight. So the ladder shows how tight they are and does not
# test them.
RESIDUALS = (0.0, 0.05, 0.15, 0.25, 0.75, 0.85, 1.05, 1.13, 1.2, 1.4)
LOW = (0.97, 0.94, 0.87, 0.80, 0.20, 0.13, 0.03, -0.01, -0.05, -0.05)
HIGH = (1.0, 1.0, 0.95, 0.92, 0.46, 0.32, 0.30, 0.28, 0.18, 0.05)


def expect_recovery(residual: float) -> tuple[float, float]:
    """Between which shares of the gain of fine-tuning the new base itself a transport at scale 1 may be expected.

    Args:
        residual: `||target - g(source)|| / ||target||` after what moved the task vector; of `auto`,
            `info["residuals"][info["chosen"]]`.

    Returns:
        (low, high), 1 being all of the gain. From vision transformers of width 32 to 256 on images of 28 x 28; what
        lies between the kin (up to 0.25) and the estranged (from 0.7) is a straight line between them. Among
        strangers (from 1.0) the residual no longer tells pairs apart: there width and training length decide within
        the range. A guide to whether it is worth measuring, not a promise.

    Raises:
        ValueError: the residual is negative or NaN.
    """
    if not residual >= 0 or math.isinf(residual):
        raise ValueError(f"residual is {residual}; it must be a number of at least 0.")
    return float(np.interp(residual, RESIDUALS, LOW)), float(np.interp(residual, RESIDUALS, HIGH))
