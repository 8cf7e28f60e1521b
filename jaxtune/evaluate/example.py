"""A fixed batch of inputs for any model: what functional equivalence is checked on when there is no data."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.lazy import is_lazy
from jaxtune.models import registry
from jaxtune.tree import flatten
from jaxtune.types import Params


def example_batch(key: jax.Array, config: Any, size: int) -> dict[str, jax.Array]:
    """Inputs that fit the model: smooth random images in [0, 1], random token ids of several lengths.

    Args:
        key: Draws the inputs.
        config: Of a model family.
        size: Number of inputs, N.

    Shapes:
        result["image"]: float32[N, H, W, C]; result["text"]: int32[N, L]; what the family takes.

    Raises:
        ConfigError: no model config.
    """
    return registry.example(key, config, size)


def apply_to_matrix(config: Any, params: Params, batch: Mapping[str, Any]) -> jax.Array:
    """Outputs of any family as float[N, K]: logits or features; for CLIP, the logits of images against texts.

    Compiled once for each config and batch shape, however often weights are compared; not compiled where leaves are
    lazy, so that the network is read part by part.
    """
    run = _apply if any(map(is_lazy, flatten(params).values())) else _apply_jitted
    return run(config, params, batch)


def _apply(config, params, batch):
    return registry.as_matrix(config, registry.apply(config, params, batch))


_apply_jitted = jax.jit(_apply, static_argnames="config")
