"""What encoders, and encoders with decoders, are put together from: plain functions over dicts of leaves.

Every one computes in the dtype of its input, with sums in float32 or wider.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxtune.models.inputs import at_least_float32
from jaxtune.models.transformer import ACTIVATIONS as GELU_AND_RELU

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **GELU_AND_RELU,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table; an id outside it reads NaN, not a neighbour's row.

    Shapes:
        table: [rows, width]; ids: int[N, L]; result: [N, L, width].
    """
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def project(x: jax.Array, params: Mapping[str, jax.Array], *, num_in: int = 1) -> jax.Array:
    """`x @ kernel + bias`, over the last `num_in` axes of `x`; the bias where there is one.

    Shapes:
        x: [..., inputs]; params["kernel"]: [inputs, outputs]; params["bias"]: [outputs]; inputs and outputs may each
            be several axes.
        result: [..., outputs].
    """
    wide = at_least_float32(x.dtype)
    product = jnp.tensordot(x, params["kernel"], axes=num_in, preferred_element_type=wide)
    if "bias" in params:
        bias = params["bias"].astype(wide)
        product = product + bias.reshape((1,) * (product.ndim - bias.ndim) + bias.shape)
    return product.astype(x.dtype)


def layer_norm(x: jax.Array, params: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """Layer norm over the last axis."""
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return (normal * _lift(params["scale"], wide) + _lift(params["bias"], wide)).astype(x.dtype)


def rms_norm(x: jax.Array, params: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """RMS norm over the last axis: no mean is taken off, nothing is added."""
    wide = x.astype(at_least_float32(x.dtype))
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + eps)
    return (normal * _lift(params["scale"], wide)).astype(x.dtype)


def attend(
    params: Mapping[str, Mapping[str, jax.Array]],
    x: jax.Array,
    source: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention of the tokens of `x` to those of `source`.

    Args:
        params: "q", "k", "v" with kernels [width, head, unit], "out" with [head, unit, width]; biases where there are.
        x, source: The same for self-attention.
        mask: Which tokens of `source` are seen. Where none is, all count alike: never NaN.
        scale: Factor of the scores.
        bias: Added to them.

    Shapes:
        x: [batch, query, width]; source: [batch, key, width]; mask: bool[batch or 1, 1, query or 1, key].
        bias: [batch or 1, head, query, key].
        result: [batch, query, width].
    """
    q, k, v = (project(tokens, params[name]) for name, tokens in (("q", x), ("k", source), ("v", source)))
    wide = at_least_float32(x.dtype)
    scores = jnp.einsum("bqhu,bkhu->bhqk", q, k, preferred_element_type=wide) * scale
    if bias is not None:
        scores = scores + bias.astype(wide)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1).astype(x.dtype)
    mixed = jnp.einsum("bhqk,bkhu->bqhu", weights, v, preferred_element_type=wide).astype(x.dtype)
    return project(mixed, params["out"], num_in=2)


def _lift(leaf, like):
    """A vector in the dtype of `like`, along its last axis."""
    return leaf.astype(like.dtype).reshape((1,) * (like.ndim - 1) + leaf.shape)
