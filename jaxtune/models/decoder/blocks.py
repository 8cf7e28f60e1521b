"""The parts of one block: norm, attention, MLP. All take and give streams float[N, L, width] and keep their dtype."""

import jax
import jax.numpy as jnp

from jaxtune.models.decoder.config import Config
from jaxtune.models.decoder.rotary import rotate
from jaxtune.models.experts import apply_experts
from jaxtune.models.inputs import at_least_float32
from jaxtune.models.transformer import ACTIVATIONS as GELU_AND_RELU
from jaxtune.types import Params

ACTIVATIONS = {**GELU_AND_RELU, "silu": jax.nn.silu}


def multiply(pattern: str, x: jax.Array, params: Params) -> jax.Array:
    """`einsum` with the kernel and plus the bias, if there is one; accumulates in float32 or wider."""
    out = jnp.einsum(pattern, x, params["kernel"], preferred_element_type=at_least_float32(x.dtype)).astype(x.dtype)
    if "bias" not in params:
        return out
    return out + jnp.expand_dims(params["bias"], range(out.ndim - params["bias"].ndim))


def apply_norm(config: Config, params: Params, x: jax.Array, *, num_axes: int = 1) -> jax.Array:
    """The config's norm over the last `num_axes` axes together, whose gain has the last axes of `x`, one or all."""
    wide = x.astype(at_least_float32(x.dtype))
    axes = tuple(range(x.ndim - num_axes, x.ndim))
    if config.norm == "layer":
        wide = wide - wide.mean(axis=axes, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=axes, keepdims=True) + config.norm_eps)
    scale = _spread(params["scale"], wide)
    wide = wide * (1 + scale if config.norm == "rms_plus_one" else scale)
    if config.norm == "layer":
        wide = wide + _spread(params["bias"], wide)
    return wide.astype(x.dtype)


def apply_attention(config: Config, index: int, params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    """What the attention of block `index` makes of the stream.

    Shapes:
        x: float[N, L, width].
        mask: bool[N, L], True where a token is real. A token that sees none reads 0.
        result: float[N, L, width].
    """
    rotary = config.rotary_of(index)
    queries = _project("nlw,wgqu->nlgqu", x, params["q"])  # [batch, token, kv head, query, unit]
    keys = _project("nlw,wgu->nlgu", x, params["k"])
    values = multiply("nlw,wgu->nlgu", x, params["v"])
    if config.qk_norm != "none":
        whole = config.qk_norm == "whole"
        queries = apply_norm(config, params["q_norm"], queries, num_axes=3 if whole else 1)
        keys = apply_norm(config, params["k_norm"], keys, num_axes=2 if whole else 1)
    if rotary is not None:
        queries, keys = (_rotate_first(rotary, x, config.num_rotary) for x in (queries, keys))
    wide = at_least_float32(x.dtype)
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    scores = jnp.einsum("nlgqu,nmgu->ngqlm", queries, keys, preferred_element_type=wide) * scale
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    sees = _who_sees_whom(config.window_of(index), mask)[:, None, None]  # [batch, 1, 1, token, token]
    weights = jax.nn.softmax(jnp.where(sees, scores, jnp.finfo(wide).min), axis=-1)
    weights = jnp.where(sees, weights, 0).astype(x.dtype)
    mixed = jnp.einsum("ngqlm,nmgu->nlgqu", weights, values, preferred_element_type=wide).astype(x.dtype)
    return multiply("nlgqu,gquw->nlw", mixed, params["out"])


def apply_mlp(config: Config, index: int, params: Params, x: jax.Array) -> jax.Array:
    """What the MLP of block `index` makes of the stream: float[N, L, width] -> the same."""
    activation, experts = ACTIVATIONS[config.activation], config.experts_of(index)
    if experts is not None:
        return apply_experts(experts, params, x, activation)
    hidden = multiply("nlw,wh->nlh", x, params["up"])
    passed = activation(multiply("nlw,wh->nlh", x, params["gate"]) if config.gated else hidden)
    hidden = passed * hidden if config.gated else passed
    return multiply("nlh,hw->nlw", hidden, params["down"])


def _project(pattern, x, params):
    """Queries or keys, whole or from their two parts."""
    if "kernel" in params:
        return multiply(pattern, x, params)
    return jnp.concatenate([multiply(pattern, x, params[part]) for part in ("rotary", "plain")], axis=-1)


def _rotate_first(rotary, x, num_rotary):
    if num_rotary == x.shape[-1]:
        return rotate(rotary, x)
    return jnp.concatenate([rotate(rotary, x[..., :num_rotary]), x[..., num_rotary:]], axis=-1)


def _who_sees_whom(window, mask):
    """bool[N, L, L]: whether the token of the row reads that of the column."""
    tokens = jnp.arange(mask.shape[1])
    row, column = tokens[:, None], tokens[None, :]
    sees = column <= row
    if window is not None:
        sees &= column > row - window
    return sees[None] & mask[:, None, :]


def _spread(leaf, x):
    """The leaf in the dtype of `x`, with as many axes."""
    return jnp.expand_dims(leaf.astype(x.dtype), range(x.ndim - leaf.ndim))
