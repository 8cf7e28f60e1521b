"""From two texts to logits: the encoder, the decoder that reads it, the head."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models.encoder_parts import ACTIVATIONS, attend, look_up, project, rms_norm
from jaxtune.models.inputs import at_least_float32, open_params
from jaxtune.models.t5.config import Config
from jaxtune.models.t5.distances import bucket_of, distances
from jaxtune.models.t5.leaves import init
from jaxtune.models.text import draw_text, text_of
from jaxtune.rng import named_key
from jaxtune.types import Params

EXAMPLE_LENGTH, EXAMPLE_DECODER_LENGTH = 24, 14


def apply(config: Config, params: Params, batch: Mapping[str, Any]) -> jax.Array:
    """Outputs of a batch of pairs of texts.

    The decoder's text is what it has written so far, its start token first; nothing is shifted here.

    Shapes:
        batch["text"]: int[N, L]. Under `jit` an id outside the vocabulary gives NaN.
        batch["mask"]: bool[N, L], True where a token is real, optional.
        batch["decoder_text"], batch["decoder_mask"]: The same, int[N, M] and bool[N, M], where there is a decoder.
        result: float32[N, M, vocab_size]; without a head float32[N, M, width], of an encoder alone
            float32[N, L, width]. float64 where the parameters are.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: a text is missing or not this config's.
    """
    text, mask = text_of(batch, vocab_size=config.vocab_size)
    if config.decoder_depth is not None:
        names = {"text_name": "decoder_text", "mask_name": "decoder_mask"}
        decoder_text, decoder_mask = text_of(batch, vocab_size=config.vocab_size, **names)
    params = open_params(init, config, params)
    stream = encode(config, params, text, mask)
    if config.decoder_depth is not None:
        stream = decode(config, params, decoder_text, decoder_mask, stream, mask)
    outputs = read_out(config, params, stream)
    return outputs.astype(at_least_float32(outputs.dtype))


def encode(config: Config, params: Params, text: jax.Array, mask: jax.Array) -> jax.Array:
    """What the encoder makes of a text, behind its final norm.

    Shapes:
        text: int[N, L]; mask: bool[N, L]; result: float[N, L, width].
    """
    stack, stream = params["encoder"], look_up(params["embed"]["token"], text)
    bias = _bias_of(config, stack["distance"], text.shape[1], is_causal=False)
    for index in range(config.depth):
        block = stack[f"block_{index}"]
        stream = _add_attention(config, block, stream, mask[:, None, None, :], bias)
        stream = _add_mlp(config, block, stream)
    return rms_norm(stream, stack["final_norm"], config.norm_eps)


def decode(
    config: Config, params: Params, text: jax.Array, mask: jax.Array, source: jax.Array, source_mask: jax.Array
) -> jax.Array:
    """What the decoder makes of a text beside the encoder's, behind its final norm.

    Args:
        config: Sizes.
        params: Of the whole network.
        text, mask: What it has written so far.
        source, source_mask: From `encode`, and which tokens of that text are real.

    Shapes:
        text: int[N, M]; mask: bool[N, M]; source: float[N, L, width]; source_mask: bool[N, L].
        result: float[N, M, width].
    """
    length, stack, stream = text.shape[1], params["decoder"], look_up(params["embed"]["token"], text)
    bias = _bias_of(config, stack["distance"], length, is_causal=True)
    seen = mask[:, None, None, :] & jnp.tril(jnp.ones((1, 1, length, length), bool))
    for index in range(config.decoder_depth):
        block = stack[f"block_{index}"]
        stream = _add_attention(config, block, stream, seen, bias)
        normal = rms_norm(stream, block["cross_norm"], config.norm_eps)
        stream = stream + attend(block["cross"], normal, source, source_mask[:, None, None, :], scale=1.0)
        stream = _add_mlp(config, block, stream)
    return rms_norm(stream, stack["final_norm"], config.norm_eps)


def read_out(config: Config, params: Params, stream: jax.Array) -> jax.Array:
    """What the head makes of the last stream.

    Shapes:
        stream: float[N, M, width]; result: as of `apply`, in the dtype of the stream.
    """
    if config.head == "none":
        return stream
    if config.scaled:
        stream = stream * config.width**-0.5
    return project(stream, {"kernel": params["embed"]["token"].T} if config.tied else params["head"])


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """`size` pairs of texts of random tokens and several lengths.

    Shapes:
        result["text"]: int32[size, L]; result["mask"]: bool[size, L]; with a decoder "decoder_text", "decoder_mask".
    """
    batch = draw_text(key, size, EXAMPLE_LENGTH, config.vocab_size)
    if config.decoder_depth is None:
        return batch
    other = draw_text(named_key(key, "decoder"), size, EXAMPLE_DECODER_LENGTH, config.vocab_size)
    return batch | {f"decoder_{name}": values for name, values in other.items()}


def _add_attention(config, block, stream, seen, bias):
    normal = rms_norm(stream, block["norm1"], config.norm_eps)
    return stream + attend(block["attn"], normal, normal, seen, scale=1.0, bias=bias)


def _add_mlp(config, block, stream):
    normal, mlp = rms_norm(stream, block["norm2"], config.norm_eps), block["mlp"]
    act = ACTIVATIONS[config.activation]
    if config.gated:
        return stream + project(act(project(normal, mlp["gate"])) * project(normal, mlp["up"]), mlp["down"])
    return stream + project(act(project(normal, mlp["up"])), mlp["down"])


def _bias_of(config, table, length, *, is_causal):
    """What the distance of two tokens adds to their score: float[1, head, query, key]."""
    sizes = {"num_buckets": config.num_buckets, "max_distance": config.max_distance}
    buckets = bucket_of(distances(length, length), is_causal=is_causal, **sizes)
    return table[buckets].transpose(2, 0, 1)[None]
