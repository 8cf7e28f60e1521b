"""The pre-LN transformer block, shared by the image and the text tower, and the head that pools by attention."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError
from jaxtune.models.inputs import at_least_float32

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)`: the GELU of OpenAI's CLIP, up to 0.02 away from the exact one."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
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
    """Multi-head attention; heads are axes of their own in the kernels.

    Attributes:
        has_bias: Whether queries, keys and values have biases; the output always has one.
    """

    num_heads: int
    is_causal: bool = False
    has_bias: bool = True

    @nn.compact
    def __call__(self, x, *, asking=None, mask=None):
        """Self-attention of `x`; with `asking`, [batch, query, width], its tokens ask and those of `x` answer.

        `mask`, bool[batch, token], is False where nobody may look; a query that may look nowhere gets a mean.
        """
        num_tokens, width = x.shape[1:]
        head_width = width // self.num_heads
        dense = partial(nn.DenseGeneral, kernel_init=nn.initializers.xavier_uniform())
        read = partial(dense, (self.num_heads, head_width), use_bias=self.has_bias)
        # [batch, token, head, unit]
        q, k, v = (read(name=name)(x if name != "q" or asking is None else asking) for name in "qkv")
        wide = at_least_float32(x.dtype)
        scores = jnp.einsum("bqhu,bkhu->bhqk", q, k, preferred_element_type=wide) * head_width**-0.5
        if self.is_causal:
            sees = jnp.tril(jnp.ones((1, 1, num_tokens, num_tokens), bool))
            scores = jnp.where(sees, scores, -jnp.inf if mask is None else jnp.finfo(wide).min)
        if mask is not None:
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhu->bqhu", weights, v)
        return dense(width, axis=(-2, -1), name="out")(mixed)


class Mlp(nn.Module):
    """Up, activation, down; gated: the activation of a gate times up, then down."""

    hidden: int
    activation: Activation
    is_gated: bool = False

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
        activate = ACTIVATIONS[self.activation]
        hidden = dense(self.hidden, name="up")(x)
        hidden = activate(dense(self.hidden, name="gate")(x)) * hidden if self.is_gated else activate(hidden)
        return dense(x.shape[-1], name="down")(hidden)


class LayerScale(nn.Module):
    """One gain a channel on what a branch adds to the stream (CaiT, arXiv:2103.17239)."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.constant(0.1), (x.shape[-1],), jnp.float32)
        return x * scale.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)


class Block(nn.Module):
    """`y = S1 x + attn(norm1(x))`, then `S2 y + mlp(norm2(y))`; S1 = S2 = I where `shortcuts` is False.

    Attributes:
        layer_scale: Whether both branches end in a `LayerScale`.
        is_gated: Whether the MLP is gated.
        has_qkv_bias: Whether queries, keys and values have biases.
    """

    config: StackConfig
    is_causal: bool = False
    shortcuts: bool = False
    layer_scale: bool = False
    is_gated: bool = False
    has_qkv_bias: bool = True

    @nn.compact
    def __call__(self, x, mask=None):
        config = self.config
        attention = Attention(config.num_heads, self.is_causal, self.has_qkv_bias, name="attn")
        branch = attention(LayerNorm(config.norm_eps, name="norm1")(x), mask=mask)
        x = self._skip(x, "shortcut_attn") + self._scale(branch, "layer_scale1")
        mlp = Mlp(config.mlp_width, config.activation, self.is_gated, name="mlp")
        branch = mlp(LayerNorm(config.norm_eps, name="norm2")(x))
        return self._skip(x, "shortcut_mlp") + self._scale(branch, "layer_scale2")

    def _skip(self, x, name):
        if not self.shortcuts:
            return x
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=_identity, name=name)(x)

    def _scale(self, branch, name):
        return LayerScale(name=name)(branch) if self.layer_scale else branch


class AttentionPool(nn.Module):
    """One vector of all tokens: a learnt probe asks them, then `y + mlp(norm(y))`; float[N, T, D] -> float[N, D].

    Reference:
        Set Transformer's pooling (arXiv:1810.00825) as SigLIP has it (arXiv:2303.15343): no residual around the
        attention.
    """

    config: StackConfig

    @nn.compact
    def __call__(self, x):
        config, width = self.config, x.shape[-1]
        probe = self.param("probe", nn.initializers.normal(width**-0.5), (width,), jnp.float32)
        probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
        x = Attention(config.num_heads, name="attn")(x, asking=probe)[:, 0]
        mlp = Mlp(config.mlp_width, config.activation, name="mlp")
        return x + mlp(LayerNorm(config.norm_eps, name="norm")(x))


def _identity(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jnp.eye(*shape, dtype=dtype)
