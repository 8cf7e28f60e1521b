"""What a transport must beat to have carried anything."""

from typing import Any

import jax
import numpy as np

from jaxtune.rng import named_key
from jaxtune.tree import map_leaves
from jaxtune.types import Params


def draw_as_long(key: jax.Array, vector: Params) -> dict[str, Any]:
    """Gaussian noise with the norm of each leaf of a task vector: float32 leaves, a step of the same size anywhere."""

    def draw(path, leaf):
        noise = np.asarray(jax.random.normal(named_key(key, path), leaf.shape, dtype=np.float32))
        return noise * (np.linalg.norm(leaf) / max(np.linalg.norm(noise), np.finfo(np.float32).tiny))

    return map_leaves(draw, vector)
