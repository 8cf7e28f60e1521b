"""A fixed batch of inputs for any model: what functional equivalence is checked on when there is no data."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError
from jaxtune.models import clip, mlp, registry, resnet, vit
from jaxtune.rng import named_key
from jaxtune.types import Params

RESNET_SIZE = 32  # CIFAR's; the network itself takes any


def example_batch(key: jax.Array, config: Any, size: int) -> dict[str, jax.Array]:
    """Inputs that fit the model: smooth random images in [0, 1] and, for CLIP, random token ids.

    Args:
        key: Draws the inputs.
        config: Of a model family.
        size: Number of inputs, N.

    Shapes:
        result["image"]: float32[N, H, W, C]. CLIP also result["text"]: int32[N, L].

    Raises:
        ConfigError: the family has no inputs declared here.
    """
    key_image, key_text = named_key(key, "image"), named_key(key, "text")
    if isinstance(config, mlp.Config):
        return {"image": _draw_images(key_image, size, *config.image_shape)}
    if isinstance(config, resnet.Config):
        return {"image": _draw_images(key_image, size, RESNET_SIZE, RESNET_SIZE, config.channels)}
    if isinstance(config, vit.Config):
        return {"image": _draw_images(key_image, size, config.image_size, config.image_size, config.channels)}
    if isinstance(config, clip.Config):
        side, text = config.vision.image_size, config.text
        return {
            "image": _draw_images(key_image, size, side, side, config.vision.channels),
            "text": jax.random.randint(key_text, (size, text.context_length), 0, text.vocab_size, jnp.int32),
        }
    raise ConfigError(f"no example inputs for {type(config).__name__}.")


@functools.partial(jax.jit, static_argnames="config")
def apply_to_matrix(config: Any, params: Params, batch: Mapping[str, Any]) -> jax.Array:
    """Outputs of any family as float[N, K]: logits or features; for CLIP, the logits of images against texts.

    Compiled once for each config and batch shape, however often weights are compared.
    """
    outputs = registry.apply(config, params, batch)
    if not isinstance(config, clip.Config):
        return outputs
    scale = outputs["logit_scale"].astype(outputs["image_features"].dtype)
    return scale * (outputs["image_features"] @ outputs["text_features"].T)


def _draw_images(key, size, height, width, channels):
    """Noise at a quarter of the resolution, enlarged: neighbouring pixels agree, as in pictures."""
    coarse = jax.random.uniform(key, (size, -(-height // 4), -(-width // 4), channels), jnp.float32)
    return jax.image.resize(coarse, (size, height, width, channels), "linear")
