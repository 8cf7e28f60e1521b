"""The network: embedding, post-LN blocks, heads; and what two of them are compared on."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import tree
from jaxtune.errors import DataError
from jaxtune.models.encoder.config import Config
from jaxtune.models.encoder.leaves import init
from jaxtune.models.encoder_parts import ACTIVATIONS, attend, layer_norm, look_up, project
from jaxtune.models.inputs import at_least_float32, open_params
from jaxtune.models.text import draw_text, text_of
from jaxtune.rng import named_key
from jaxtune.types import Params

EXAMPLE_LENGTH = 24


def apply(config: Config, params: Params, batch: Mapping[str, Any]) -> jax.Array | dict[str, jax.Array]:
    """Outputs of a batch.

    Shapes:
        batch["text"]: int[N, L] with L at most `config.max_length`. Under `jit` an id outside the vocabulary gives NaN.
        batch["mask"]: bool[N, L], True on real tokens; all where it is missing.
        batch["segments"]: int[N, L]; 0 where it is missing.
        result: By the head: "none" float32[N, L, width]; "vocabulary" float32[N, L, vocab_size]; "sequence"
            float32[N, num_outputs]; "tokens" float32[N, L, num_outputs]. float64 where the parameters are.
            With a pooler, head "none" gives a dict of this as "hidden" and "pooled" float32[N, width]; with
            `next_sentence`, "vocabulary" gives a dict of "logits" and "next" float32[N, 2].

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: no text, or not this config's.
    """
    text, mask = text_of(batch, vocab_size=config.vocab_size, max_length=config.max_length)
    segments = _segments_of(config, batch, text)
    params = open_params(init, config, params)
    stream = embed(config, params, text, segments)
    for index in range(config.depth):
        stream = apply_block(config, params[f"block_{index}"], stream, mask)
    outputs = read_out(config, params, stream)
    return jax.tree.map(lambda leaf: leaf.astype(at_least_float32(leaf.dtype)), outputs)


def embed(config: Config, params: Params, text: jax.Array, segments: jax.Array) -> jax.Array:
    """The stream before the first block.

    Args:
        config: Sizes.
        params: Of these only "embed" is read.
        text: Token ids.
        segments: Row of the table of segments of every token; not read where there is no such table.

    Shapes:
        text, segments: int[N, L]; result: float[N, L, width].
    """
    tables = params["embed"]
    stream = look_up(tables["token"], text)
    if config.num_segments is not None:
        stream = stream + look_up(tables["segment"], segments)
    stream = stream + look_up(tables["position"], _positions(config, text))
    return layer_norm(stream, tables["norm"], config.norm_eps)


def apply_block(config: Config, params: Params, stream: jax.Array, mask: jax.Array) -> jax.Array:
    """The stream behind one block.

    Args:
        config: Sizes.
        params: Of this block alone: `params["block_3"]` of the whole network.
        stream: From `embed` or from the block before.
        mask: True where a token is real.

    Shapes:
        stream: float[N, L, width]; mask: bool[N, L]; result as the stream.
    """
    scale = (config.width // config.num_heads) ** -0.5
    mixed = attend(params["attn"], stream, stream, mask[:, None, None, :], scale=scale)
    stream = layer_norm(stream + mixed, params["norm1"], config.norm_eps)
    hidden = ACTIVATIONS[config.activation](project(stream, params["mlp"]["up"]))
    return layer_norm(stream + project(hidden, params["mlp"]["down"]), params["norm2"], config.norm_eps)


def read_out(config: Config, params: Params, stream: jax.Array) -> jax.Array | dict[str, jax.Array]:
    """What the head makes of the last stream.

    Shapes:
        stream: float[N, L, width]; result: as of `apply`, in the dtype of the stream.
    """
    head, first = params.get("head", {}), stream[:, 0]
    pooled = jnp.tanh(project(first, params["pooler"])) if config.pooler else None  # not computed where not read
    match config.head:
        case "none":
            return {"hidden": stream, "pooled": pooled} if config.pooler else stream
        case "tokens":
            return project(stream, head)
        case "sequence" if config.head_dense == "none":
            return project(pooled, head)
        case "sequence":
            return project(ACTIVATIONS[config.head_dense](project(first, head["dense"])), head)
    hidden = ACTIVATIONS[config.head_dense](project(stream, head["dense"]))
    hidden = layer_norm(hidden, head["norm"], config.norm_eps)
    kernel = params["embed"]["token"].T if config.tied else head["kernel"]
    logits = project(hidden, {"kernel": kernel, "bias": head["bias"]})
    return {"logits": logits, "next": project(pooled, params["next_sentence"])} if config.next_sentence else logits


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """`size` texts of random tokens and several lengths, in two segments where the model knows two.

    Shapes:
        result["text"], result["segments"]: int32[size, L]; result["mask"]: bool[size, L].
    """
    batch = draw_text(key, size, min(EXAMPLE_LENGTH, config.max_length), config.vocab_size)
    batch["text"] = jnp.where(batch["mask"], batch["text"], config.padding)
    if (config.num_segments or 1) > 1:
        length = batch["text"].shape[1]
        starts = jax.random.randint(named_key(key, "segments"), (size, 1), 1, length + 1, jnp.int32)
        batch["segments"] = (jnp.arange(length, dtype=jnp.int32)[None] >= starts).astype(jnp.int32)
    return batch


def as_matrix(outputs: jax.Array | Mapping[str, jax.Array]) -> jax.Array:
    """Outputs as float[M, K]; what is given once a text stands beside every token of it."""
    if not isinstance(outputs, Mapping):
        return outputs.reshape(-1, outputs.shape[-1])
    tokens, text = outputs.values()
    text = jnp.broadcast_to(text[:, None], (*tokens.shape[:2], text.shape[-1]))
    return jnp.concatenate([tokens, text], axis=-1).reshape(-1, tokens.shape[-1] + text.shape[-1])


def _segments_of(config, batch, text):
    """Segment of every token, 0 where the batch does not say."""
    segments = batch.get("segments")
    if segments is None:
        return jnp.zeros_like(text)
    if segments.shape != text.shape or segments.dtype.kind not in "iu":
        raise DataError(f'batch["segments"] is {tree.describe_leaf(segments)}, the model takes int{list(text.shape)}.')
    if not isinstance(segments, jax.core.Tracer) and not 0 <= segments.min() <= segments.max() < (
        config.num_segments or 1
    ):
        raise DataError(
            f'batch["segments"] has {segments.min()} to {segments.max()}, the model knows '
            f"{config.num_segments or 1} of them. Leave them out, or use the tokenizer of this checkpoint."
        )
    return jnp.asarray(segments).astype(text.dtype)


def _positions(config, text):
    """Row of the table of positions of every token: int[N, L] or int[1, L]."""
    if config.counted_from is None:
        return jnp.arange(text.shape[1], dtype=text.dtype)[None, :]
    is_real = (text != config.padding).astype(text.dtype)
    return jnp.cumsum(is_real, axis=1, dtype=text.dtype) * is_real + config.padding
