"""The pre-LN transformer block, shared by the image and the text tower."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError
from jaxtune.models.inputs import at_least_float32

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)`: the GELU of OpenAI's CLIP, up to 0.02 away from the exact one."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
}


class StackConfig(Protocol):
    """What the image and the text config have in common."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    activation: Activation
    norm_eps: float


def check_heads(config: StackConfig) -> None:
    """Raises `ConfigError` unless the heads share the width equally."""
    if config.width % config.num_heads:
        raise ConfigError(f"width {config.width} cannot be shared equally by num_heads {config.num_heads}.")


class LayerNorm(nn.Module):
    """Layer norm over the last axis; flax's own mixes dtypes under strict promotion."""

    eps: float

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - wide.mean(axis=-1, keepdims=True)
        # Two passes: the mean of squares less the squared mean cancels where the mean is large.
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.eps)
        ones = (1,) * (x.ndim - 1)
        scale, bias = (leaf.astype(wide.dtype).reshape(*ones, width) for leaf in (scale, bias))
        return (normal * scale + bias).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; heads are axes of their own in the kernels."""

    num_heads: int
    is_causal: bool = False

    @nn.compact
    def __call__(self, x):
        num_tokens, width = x.shape[1:]
        head_width = width // self.num_heads
        dense = partial(nn.DenseGeneral, kernel_init=nn.initializers.xavier_uniform())
        q, k, v = (dense((self.num_heads, head_width), name=name)(x) for name in "qkv")  # [batch, token, head, unit]
        wide = at_least_float32(x.dtype)
        scores = jnp.einsum("bqhu,bkhu->bhqk", q, k, preferred_element_type=wide) * head_width**-0.5
        if self.is_causal:
            sees = jnp.tril(jnp.ones((1, 1, num_tokens, num_tokens), bool))
            scores = jnp.where(sees, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhu->bqhu", weights, v)
        return dense(width, axis=(-2, -1), name="out")(mixed)


class Mlp(nn.Module):
    """Up, activation, down."""

    hidden: int
    activation: Activation

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
        hidden = ACTIVATIONS[self.activation](dense(self.hidden, name="up")(x))
        return dense(x.shape[-1], name="down")(hidden)


class Block(nn.Module):
    """`y = S1 x + attn(norm1(x))`, then `S2 y + mlp(norm2(y))`; S1 = S2 = I where `shortcuts` is False."""

    config: StackConfig
    is_causal: bool = False
    shortcuts: bool = False

    @nn.compact
    def __call__(self, x):
        config = self.config
        x = self._skip(x, "shortcut_attn") + Attention(config.num_heads, self.is_causal, name="attn")(
            LayerNorm(config.norm_eps, name="norm1")(x)
        )
        return self._skip(x, "shortcut_mlp") + Mlp(config.mlp_width, config.activation, name="mlp")(
            LayerNorm(config.norm_eps, name="norm2")(x)
        )

    def _skip(self, x, name):
        if not self.shortcuts:
            return x
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=_identity, name=name)(x)


def _identity(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jnp.eye(*shape, dtype=dtype)
