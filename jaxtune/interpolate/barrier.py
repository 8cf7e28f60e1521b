"""How high the loss climbs between two models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_POINTS = 25


@dataclass(frozen=True)
class Barrier:
    """Loss along a line, against the straight line between its ends.

    Attributes:
        height: Largest excess over the ends' own line; 0 where the models are connected.
        weight: Where on the line that is, 0 at the first model.
        weights, losses: The points measured.
    """

    height: float
    weight: float
    weights: tuple[float, ...]
    losses: tuple[float, ...]


def measure_barrier(weights: Sequence[float], losses: Sequence[float]) -> Barrier:
    """The barrier of a loss measured at `weights` on the line.

    Args:
        weights: Increasing, from 0 to 1; `np.linspace(0, 1, NUM_POINTS)` is the usual choice.
        losses: Loss at each, as numbers.

    Raises:
        ValueError: lengths differ, fewer than three points, or the line does not run from 0 to 1.

    Reference:
        Frankle et al. 2020, arXiv:1912.05671: the worst point counts, not the middle.
    """
    weights, losses = np.asarray(weights, np.float64), np.asarray(losses, np.float64)
    if weights.shape != losses.shape or weights.ndim != 1 or len(weights) < 3:
        raise ValueError(f"need one loss per weight, three or more; got {weights.shape} and {losses.shape}")
    if weights[0] != 0 or weights[-1] != 1 or not (np.diff(weights) > 0).all():
        raise ValueError("weights must increase from 0 to 1")
    excess = losses - ((1 - weights) * losses[0] + weights * losses[-1])
    worst = int(np.argmax(excess))
    return Barrier(
        height=max(float(excess[worst]), 0.0),
        weight=float(weights[worst]),
        weights=tuple(weights.tolist()),
        losses=tuple(losses.tolist()),
    )
