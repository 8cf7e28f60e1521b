"""A frozen read-out: every class has one fixed unit vector, whatever the model, the run or the other classes.

Bases that share it can exchange fine-tunes of classes which none of them had seen in pre-training, as the
text tower of CLIP allows.
"""

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.models.inputs import at_least_float32

DEFAULT_SCALE = 1 / 0.07  # the temperature that CLIP starts from


def class_embeddings(class_names: Sequence[str], dim: int) -> np.ndarray:
    """A random direction per class, a function of the class's name and of `dim` alone.

    Args:
        class_names: Any strings; equal names get equal vectors.
        dim: Width of the features that will be read out, at least 1.

    Shapes:
        result: float32[C, dim], rows of norm 1, uniform on the sphere.

    Raises:
        ConfigError: `dim` below 1.
    """
    if dim < 1:
        raise ConfigError(f"class embeddings need dim at least 1, got {dim}.")
    embeddings = np.empty((len(class_names), dim), np.float32)
    for row, name in zip(embeddings, class_names, strict=True):
        seed = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
        # NumPy freezes the stream of RandomState for good; that of its newer Generator may change.
        direction = np.random.RandomState(seed).standard_normal(dim)
        row[:] = direction / math.sqrt(math.fsum(direction**2))  # fsum: the same bits on every machine
    return embeddings


def frozen_readout(class_names: Sequence[str], num_outputs: int | None) -> np.ndarray | None:
    """How outputs become classes: None where they are one a class, or nothing says which, else `class_embeddings`."""
    if not class_names or num_outputs is None or num_outputs == len(class_names):
        return None
    return class_embeddings(class_names, num_outputs)


def read_out(features: jax.Array, embeddings: jax.Array, *, scale: float | jax.Array = DEFAULT_SCALE) -> jax.Array:
    """Logits of classes: scaled cosines of features and class embeddings.

    Args:
        features: float[N, D], any length.
        embeddings: float[C, D]; their lengths count, as in CLIP's ensembles that are not renormalised.
        scale: Inverse temperature.

    Shapes:
        result: float32[N, C]; float64 where the features are.
    """
    features = normalise_features(features)
    embeddings = jnp.asarray(embeddings).astype(features.dtype)
    return jnp.asarray(scale, features.dtype) * (features @ embeddings.T)


def normalise_features(features: jax.Array) -> jax.Array:
    """Rows at length 1, in float32 or wider; a row of zeros stays zeros and has a finite gradient."""
    wide = jnp.asarray(features).astype(at_least_float32(features.dtype))
    squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
