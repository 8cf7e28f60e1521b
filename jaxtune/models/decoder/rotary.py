"""Positions as rotations: angles in float32 whatever the network computes in, as the checkpoints were trained with."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.decoder.config import Rotary


def rotary_frequencies(rotary: Rotary, num_units: int) -> np.ndarray:
    """Angle a position of every plane.

    Shapes:
        result: float32[num_units / 2].

    Operations and their order are those of transformers in float32: at position 10^5 the last bit of a frequency is
    a hundredth of a turn.
    """
    exponents = np.arange(0, num_units, 2, dtype=np.float32) / np.float32(num_units)
    # torch's power is rounded correctly but for one in a thousand, NumPy's in float32 is not.
    powers = np.power(np.float64(rotary.theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    if rotary.scaling == "linear":
        return frequencies / np.float32(rotary.factor)
    if rotary.scaling == "llama3":
        return _ramp(rotary, frequencies)
    return frequencies


def _ramp(rotary, frequencies):
    """Long waves are stretched by the factor, short ones are not."""
    factor, low, high = (np.float32(value) for value in (rotary.factor, rotary.low_frequency, rotary.high_frequency))
    length = np.float32(rotary.original_length)
    wavelength = np.float32(2 * math.pi) / frequencies
    is_long = wavelength > np.float32(rotary.original_length / rotary.low_frequency)
    is_short = wavelength < np.float32(rotary.original_length / rotary.high_frequency)
    share = (length / wavelength - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    return np.where(is_long, frequencies / factor, np.where(is_short, frequencies, between)).astype(np.float32)


def rotate(rotary: Rotary, x: jax.Array) -> jax.Array:
    """Turns the units of the last axis; axis 1 holds the positions 0, 1, ....

    A score depends on the distance of two tokens alone, so padding before the first one changes nothing.

    Shapes:
        x: float[N, L, ..., n]. Plane i has the units i and i + n / 2.
        result: the same.
    """
    length, num_units = x.shape[1], x.shape[-1]
    positions = jnp.arange(length, dtype=jnp.float32)[:, None]
    angles = positions * jnp.asarray(rotary_frequencies(rotary, num_units))[None, :]
    shape = (1, length, *(1,) * (x.ndim - 3), num_units // 2)
    cos, sin = (turn(angles).astype(x.dtype).reshape(shape) for turn in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
