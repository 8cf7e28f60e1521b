"""What models say of examples, for whoever judges it on the host."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtune.sample import Batch
from jaxtune.types import Params


@dataclass(frozen=True)
class Logits:
    """A score of `many.score_many`: {"logits": float32[N, C] or float32[N, P, C]}, for a few models at a time.

    Attributes:
        forward: That of a `Sample`.
    """

    forward: Callable[[Params, Batch], jax.Array]

    def __call__(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        inputs = {name: values for name, values in batch.items() if name not in ("teacher", "trusted")}
        return {"logits": self.forward(params, inputs).astype(jnp.float32)}
