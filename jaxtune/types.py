"""Names for the two things every function passes around."""

from collections.abc import Mapping
from typing import Any

# One array: `jax.Array`, `numpy.ndarray` or a tracer of either.
Leaf = Any

# A nested dict of leaves, found by path "block_0/attn/q/kernel".
Params = Mapping[str, Any]
