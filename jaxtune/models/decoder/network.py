"""From tokens to logits, whole or block by block."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models.decoder.blocks import apply_attention, apply_mlp, apply_norm, multiply
from jaxtune.models.decoder.config import Config
from jaxtune.models.decoder.leaves import init
from jaxtune.models.inputs import at_least_float32, open_parts
from jaxtune.models.text import draw_text, text_of
from jaxtune.types import Params

EXAMPLE_LENGTH = 24


def apply(config: Config, params: Params, batch: Mapping[str, Any]) -> jax.Array:
    """Outputs of a batch of texts.

    Shapes:
        batch["text"]: int[N, L]. Learned positions bound L. Under `jit` an id outside the vocabulary gives NaN.
        batch["mask"]: bool[N, L], True where a token is real, optional. Padding stands before or behind a text.
        result: float32[N, L, vocab_size]; [N, num_outputs] of the head "last"; [N, L, width] without a head.
            float64 where the parameters are.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: no text, ids outside the vocabulary, or a text too long.
    """
    text, mask = text_of(batch, vocab_size=config.vocab_size, max_length=config.num_positions)
    params = open_parts(init, config, params)
    stream = embed(config, params, text, mask)
    for index in range(config.depth):
        stream = apply_block(config, index, params[f"block_{index}"], stream, mask)
    outputs = read_out(config, params, stream, mask)
    return outputs.astype(at_least_float32(outputs.dtype))


def embed(config: Config, params: Params, text: jax.Array, mask: jax.Array) -> jax.Array:
    """The stream before the first block.

    Args:
        config: Sizes.
        params: Of these only "embed" is read.
        text, mask: As `text.text_of` gives them.

    Shapes:
        text: int[N, L]; mask: bool[N, L].
        result: float[N, L, width], in the dtype of the table.
    """
    params = params["embed"]
    # An id outside the vocabulary reads NaN, not a neighbour's row.
    inside = jnp.where(text < 0, config.vocab_size, text)
    stream = params["token"].at[inside].get(mode="fill", fill_value=jnp.nan)
    if config.embed_scale != 1:
        stream = stream * jnp.asarray(config.embed_scale, jnp.float32).astype(stream.dtype)
    if config.embed_width is not None:
        stream = multiply("nle,ew->nlw", stream, params["project_in"])
    if config.num_positions is None:
        return stream
    if config.positions_skip_padding:
        positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    else:
        positions = jnp.arange(text.shape[1])[None]
    return stream + params["position"][positions + (config.position_offset or 0)]


def apply_block(config: Config, index: int, params: Params, stream: jax.Array, mask: jax.Array) -> jax.Array:
    """The stream behind block `index`.

    Args:
        config: Sizes; says which window, rotary and MLP this block has.
        index: Which block.
        params: Of this block alone: `params["block_3"]` of the whole network, in the dtype of the stream.
        stream: From `embed` or from the block before.
        mask: True where a token is real.

    Shapes:
        stream: float[N, L, width]; mask: bool[N, L]; result as the stream.
    """

    def norm(name, x):
        return apply_norm(config, params[name], x)

    def attend(x):
        return apply_attention(config, index, params["attn"], x, mask) * config.residual_scale

    def transform(x):
        return apply_mlp(config, index, params["mlp"], x) * config.residual_scale

    match config.placement:
        case "pre":
            stream = stream + attend(norm("norm1", stream))
            return stream + transform(norm("norm2", stream))
        case "post":
            stream = norm("norm1", stream + attend(stream))
            return norm("norm2", stream + transform(stream))
        case "output":
            stream = stream + norm("post_norm1", attend(stream))
            return stream + norm("post_norm2", transform(stream))
        case "sandwich":
            stream = stream + norm("post_norm1", attend(norm("norm1", stream)))
            return stream + norm("post_norm2", transform(norm("norm2", stream)))
        case "parallel":
            return stream + attend(norm("norm1", stream)) + transform(norm("norm2", stream))
        case "parallel_shared":
            normal = norm("norm1", stream)
            return stream + attend(normal) + transform(normal)
    raise AssertionError(config.placement)


def read_out(config: Config, params: Params, stream: jax.Array, mask: jax.Array) -> jax.Array:
    """What the head makes of the last stream: final norm, logits.

    Shapes:
        stream: float[N, L, width]; mask: bool[N, L].
        result: As of `apply`, in the dtype of the stream.
    """
    if config.final_norm:
        stream = apply_norm(config, params["final_norm"], stream)
    if config.embed_width is not None:
        stream = multiply("nlw,we->nle", stream, params["embed"]["project_out"])
    if config.head == "none":
        return stream
    if config.head == "last":
        last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1])[None], 0), axis=1)
        stream = jnp.take_along_axis(stream, last[:, None, None], axis=1)
        return multiply("nlw,wo->nlo", stream, params["head"])[:, 0]
    if config.tied:
        logits = multiply("nlw,vw->nlv", stream, {"kernel": params["embed"]["token"], **params.get("head", {})})
    else:
        logits = multiply("nlw,wv->nlv", stream, params["head"])
    logits = logits / config.logit_divisor
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """`size` texts of random tokens and several lengths, longer than the window where that is short.

    Shapes:
        result["text"]: int32[size, L]; result["mask"]: bool[size, L].
    """
    length = EXAMPLE_LENGTH if config.window is None else max(EXAMPLE_LENGTH, min(2 * config.window, 64))
    return draw_text(key, size, min(length, config.num_positions or length), config.vocab_size)
