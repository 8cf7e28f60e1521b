"""Matrices cut into random shares of entries, each with a coefficient of its own."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.rng import named_key
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Params


def draw_parts(vectors: Mapping[str, Any], count: int, seed: int) -> dict[str, np.ndarray]:
    """Which share every entry of every matrix belongs to: {path: int32[...]}, shares equal to one entry.

    Leaves with fewer than two axes are left whole, and have none.
    """
    parts = {}
    for path, stacked in vectors.items():
        shape = stacked.shape[1:]
        if len(shape) >= 2:
            shares = np.arange(int(np.prod(shape)), dtype=np.int32) % count
            key = named_key(jax.random.key(seed), "partition", path)
            parts[path] = np.asarray(jax.random.permutation(key, shares)).reshape(shape)
    return parts


class BuildPartition:
    """`θ_0 + Σ_t c_t[part] ⊙ τ_t`; numbers: {path: float32[T, K], of whole leaves float32[T]}."""

    def __call__(self, fixed: Any, numbers: Mapping[str, jax.Array]) -> Params:
        flat = flatten(fixed["base"])
        moved = {}
        for path, vectors in fixed["vectors"].items():
            c = numbers[path]
            if path in fixed["parts"]:
                moved[path] = flat[path] + jnp.sum(c[:, fixed["parts"][path]] * vectors, axis=0)
            else:
                moved[path] = flat[path] + jnp.tensordot(c, vectors, axes=1)
        return unflatten({**flat, **moved})

    def __hash__(self):
        return hash(type(self))

    def __eq__(self, other):
        return isinstance(other, BuildPartition)
