"""Examples that are held out, and whether they see one network clearly better than another."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.gradients import Loss
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.types import Params

# Standard errors that a gain must exceed: to leave the start (one side of 95 %, so that one example of a dozen that
# comes out right is not enough), and for a higher rate to come before a lower one.
LEAVING, CHANGING = 1.645, 1.0
MIN_HELD = 4  # held-out examples; fewer say nothing
CHUNK = 64  # examples that are judged at once


def hold_out(sample: Sample, fraction: float, key: jax.Array, *, turn: int = 0) -> tuple[Sample, Sample | None]:
    """(what is learned on, what the choice is made by); the latter None where fewer than `MIN_HELD` would be held.

    Other turns hold out other examples, as `Sample.split`.

    Raises:
        ConfigError: `fraction` outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"held_out is {fraction}; it must be at least 0 and below 1.")
    if round(fraction * len(sample)) < MIN_HELD:
        return sample, None
    seed = int(jax.random.bits(named_key(key, "held out"), dtype=jnp.uint32))
    return sample.split(fraction, seed=seed, turn=turn)


def find_gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(what the mean of `exp(-loss)` rises by, its standard error: 0 of a single example).

    `exp(-loss)` is a right answer's probability, at most 1: of a few examples one with a great loss would decide.

    Shapes:
        before, after: float[N]. Loss of the same examples under the two networks.
    """
    gains = np.exp(-np.asarray(after, np.float64)) - np.exp(-np.asarray(before, np.float64))
    error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return float(np.mean(gains)), float(error)


def add_gains(task: tuple[float, float], kept: tuple[float, float], protect: float) -> tuple[float, float]:
    """(gain, standard error) of a task and, `protect` times, of a support set that is judged apart."""
    return task[0] + protect * kept[0], (task[1] ** 2 + (protect * kept[1]) ** 2) ** 0.5


def each_loss(
    loss: Loss, sample: Sample, numbers: Any, *, build: Callable[[Any, Any], Params] | None = None, fixed: Any = None
) -> np.ndarray:
    """float64[N]: the loss of every example under the network that the numbers are, or that `build` makes of them."""
    parts = [
        np.asarray(_losses(loss, build or _as_given, fixed, numbers, chunk), np.float64)
        for chunk in sample.chunks(min(CHUNK, len(sample)))
    ]
    return np.concatenate(parts)[: len(sample)]


def _as_given(fixed, numbers):
    del fixed
    return numbers


@partial(jax.jit, static_argnames=("loss", "build"))
def _losses(loss, build, fixed, numbers, batch):
    return loss(build(fixed, numbers), batch)
