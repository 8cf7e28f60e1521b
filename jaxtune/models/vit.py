"""Vision transformer: pre-LN, learned positions, pooled by a class token, the mean of the patches or attention."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models.config import check_fields
from jaxtune.models.inputs import at_least_float32, draw_images, image_of, open_params
from jaxtune.models.transformer import Activation, AttentionPool, Block, LayerNorm, check_heads
from jaxtune.models.transformer_symmetry import Inside, Junctions
from jaxtune.models.vit_symmetry import declare_tower, declare_tower_form, why_no_form
from jaxtune.rng import named_key
from jaxtune.symmetry import Spec, make_spec
from jaxtune.types import Params

Pooling = Literal["class", "mean", "patches", "class_and_patches", "class_and_distillation", "attention"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one vision transformer.

    Attributes:
        image_size, patch_size: Side in pixels; patches tile the image.
        ignores_rest: Whether pixels beyond the last whole patch may be left over, which nothing reads.
        num_outputs: Classes, or the width of an embedding space.
        pooling: What the final norm's tokens become. "class": the class token's. "mean": no class token; mean of the
            patches. "patches": mean of the patches beside a class token that nothing reads. "class_and_patches": the
            class token's and the mean of the patches, side by side (DINOv2). "class_and_distillation": one head each
            for the class and the distillation token, averaged (DeiT). "attention": no class token; a learnt probe asks
            all tokens (SigLIP).
        stream_norm: Whether a norm stands before the first block (CLIP's `ln_pre`).
        shortcuts: Whether every residual junction has its own matrix, initially I. Costs two width²
            products a block and exists for one thing: to run TransFusion's per-junction permutations,
            which a plain residual stream cannot express, exactly (`with_shortcuts`).
        qkv_bias: Whether queries, keys and values have biases.
        layer_scale: Whether every branch ends in a gain a channel.
        is_gated: Whether the MLPs are gated (SwiGLU where the activation is silu).
        norm_after_pooling: Whether the final norm comes behind the mean of the patches (timm's `fc_norm`).
        distillation_token: Whether a second token stands behind the class token.
        num_registers: Tokens that nothing reads, between those and the patches; None for none.
        positions: Tokens that have one: "all", "class_and_patches", or only "patches".
        mask_token: Whether the token that stands for hidden patches in pre-training is kept; nothing reads it.
        head: "linear"; "tanh": tanh behind it (the pooler of ViT); "none": the features come out, in the stream's own
            order.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_outputs: int
    channels: int = 3
    pooling: Pooling = "class"
    stream_norm: bool = False
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    head_bias: bool = True
    patch_bias: bool = True
    shortcuts: bool = False
    qkv_bias: bool = True
    layer_scale: bool = False
    is_gated: bool = False
    norm_after_pooling: bool = False
    distillation_token: bool = False
    num_registers: int | None = None
    positions: Literal["all", "class_and_patches", "patches"] = "all"
    mask_token: bool = False
    head: Literal["linear", "tanh", "none"] = "linear"
    ignores_rest: bool = False

    def __post_init__(self):
        check_fields(self)
        check_heads(self)
        if self.image_size % self.patch_size and not (self.ignores_rest and self.image_size > self.patch_size):
            raise ConfigError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}.")
        means = self.pooling in ("mean", "patches")
        two = self.pooling == "class_and_distillation"
        if self.norm_after_pooling and not means:
            raise ConfigError(f"norm_after_pooling needs the mean of the patches, pooling is {self.pooling!r}.")
        if two and not self.distillation_token:
            raise ConfigError("pooling 'class_and_distillation' needs distillation_token.")
        if self.distillation_token and not self.has_class_token:
            raise ConfigError(f"a distillation token stands behind a class token, pooling is {self.pooling!r}.")
        if self.positions == "class_and_patches" and (not self.has_class_token or self.distillation_token):
            raise ConfigError("positions 'class_and_patches' need a class token and no distillation token.")
        width = self.width * (1 + (self.pooling == "class_and_patches"))
        if self.head == "none" and (two or self.num_outputs != width):
            raise ConfigError(
                f"without a head the features come out: pooling {self.pooling!r} gives {width} of them, "
                f"num_outputs is {self.num_outputs}."
            )

    @property
    def has_class_token(self) -> bool:
        """Whether the sequence begins with a class token."""
        return self.pooling not in ("mean", "attention")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.has_class_token + self.distillation_token + (self.num_registers or 0)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: patches, and the tokens before them."""
        return self.num_patches + self.num_prefix

    @property
    def num_positions(self) -> int:
        """Tokens that have a position."""
        known = {"all": self.num_prefix, "class_and_patches": 1, "patches": 0}
        return self.num_patches + known[self.positions]

    @property
    def head_names(self) -> tuple[str, ...]:
        """Kernels that read what was pooled; none where features come out."""
        second = {"class_and_patches": ("head_patches",), "class_and_distillation": ("head_distillation",)}
        return () if self.head == "none" else ("head", *second.get(self.pooling, ()))

    @property
    def biased_head_names(self) -> tuple[str, ...]:
        """Those of `head_names` that have a bias: what is one kernel over two features has one."""
        return tuple(name for name in self.head_names if self.head_bias and name != "head_patches")


class VisionTransformer(nn.Module):
    """float[N, H, W, C] -> float[N, num_outputs], in the dtype of the images."""

    config: Config

    @nn.compact
    def __call__(self, image):
        config = self.config
        x = self._embed(image)
        if config.stream_norm:
            x = LayerNorm(config.norm_eps, name="stream_norm")(x)
        for index in range(config.depth):
            x = Block(
                config,
                shortcuts=config.shortcuts,
                layer_scale=config.layer_scale,
                is_gated=config.is_gated,
                has_qkv_bias=config.qkv_bias,
                name=f"block_{index}",
            )(x)
        norm = LayerNorm(config.norm_eps, name="final_norm")
        if config.pooling == "class":
            return self._read(norm(x[:, 0]))
        if config.norm_after_pooling:
            return self._read(norm(x[:, config.num_prefix :].mean(axis=1)))
        x = norm(x)
        if config.pooling == "attention":
            return self._read(AttentionPool(config, name="pool")(x))
        patches = x[:, config.num_prefix :]
        if config.pooling == "class_and_distillation":
            return (self._read(x[:, 0]) + self._read(x[:, 1], "head_distillation")) / 2
        if config.pooling == "class_and_patches":
            both = (x[:, 0], patches.mean(axis=1))
            if config.head == "none":
                return jnp.concatenate(both, axis=-1)
            return self._read(both[0]) + self._read(both[1], "head_patches")
        return self._read(patches.mean(axis=1))

    def _embed(self, image):
        """Patches and the tokens before them, with positions: [batch, token, channel]."""
        config, small = self.config, nn.initializers.normal(0.02)
        size = (config.patch_size, config.patch_size)
        x = nn.Conv(config.width, size, size, padding="VALID", use_bias=config.patch_bias, name="patch")(image)
        x = x.reshape(x.shape[0], -1, config.width)  # [batch, token, channel], rows of patches first

        def token(name, *lead):
            leaf = self.param(name, small, (*lead, config.width), jnp.float32)
            return jnp.tile(leaf.astype(x.dtype), (x.shape[0], 1, 1))

        if config.mask_token:
            token("mask_token")
        before = [token("class_token")] if config.has_class_token else []
        before += [token("distillation_token")] if config.distillation_token else []
        registers = [token("registers", config.num_registers)] if config.num_registers else []
        position = self.param("position", small, (config.num_positions, config.width), jnp.float32)
        position = position.astype(x.dtype)[None]
        if config.positions == "patches":
            return jnp.concatenate([*before, *registers, x + position], axis=1)
        if config.positions == "class_and_patches":
            x = jnp.concatenate([*before, x], axis=1) + position
            return jnp.concatenate([x[:, :1], *registers, x[:, 1:]], axis=1)
        return jnp.concatenate([*before, *registers, x], axis=1) + position

    def _read(self, features, name="head"):
        config = self.config
        if config.head == "none":
            return features
        outputs = nn.Dense(config.num_outputs, use_bias=name in config.biased_head_names, name=name)(features)
        return jnp.tanh(outputs) if config.head == "tanh" else outputs


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters."""
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), jnp.float32)
    return VisionTransformer(config).lazy_init(key, image)["params"]


def apply(config: Config, params: Params, batch: Params) -> jax.Array | dict[str, jax.Array]:
    """Outputs of a batch.

    Shapes:
        batch["image"]: float[N, image_size, image_size, channels].
        result: float32[N, num_outputs]; float64 where the parameters are. Without a head {"features": the same}.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: the images are not this config's.
    """
    outputs = encode(config, params, batch)
    return {"features": outputs} if config.head == "none" else outputs


def encode(config: Config, params: Params, batch: Params) -> jax.Array:
    """`apply`, but the array alone, whether there is a head or not."""
    image = image_of(batch, (config.image_size, config.image_size, config.channels))
    params = open_params(init, config, params)
    dtype = params["position"].dtype
    outputs = VisionTransformer(config).apply({"params": params}, jnp.asarray(image).astype(dtype))
    return outputs.astype(at_least_float32(dtype))


def as_matrix(outputs: jax.Array | Mapping[str, jax.Array]) -> jax.Array:
    """Outputs as float[N, K]; features without a head as their inner products, float[N, N].

    Features lie in the stream's own order, which a symmetry may change: what stays is how inputs relate.
    """
    if not isinstance(outputs, Mapping):
        return outputs
    features = outputs["features"]
    return features @ features.T


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Images to compare two networks on, see `inputs.draw_images`."""
    return {"image": draw_images(named_key(key, "image"), size, config.image_size, config.image_size, config.channels)}


def symmetry(config: Config, *, junctions: Junctions = "shared", inside: Inside = "separate") -> Spec:
    """What the weights may do; see `declare_stack` for the options and the names of the groups.

    Fixed axes: those of the image, of the patch grid, of the positions' tokens and of the outputs. Features that come
    out without a head move with the stream, save those pooled by attention, which are fixed.

    Raises:
        UnknownNameError: another value of an option.
        ConfigError: shared junctions of a network with shortcuts.
    """
    stack = declare_tower(config, junctions=junctions, inside=inside)
    return make_spec(
        stack.groups,
        stack.axes,
        unmatched=stack.unmatched,
        junctions=stack.junctions,
        form=declare_tower_form(config),
        no_form=why_no_form(config),
    )


def is_trainable(config: Config, path: str) -> bool:
    """False for shortcut kernels: they say where a permutation went and are I in every trained network."""
    del config
    return path.split("/")[-2:-1] not in (["shortcut_attn"], ["shortcut_mlp"])


def with_shortcuts(config: Config, params: Params) -> tuple[Config, dict[str, Any]]:
    """The same function with an explicit shortcut matrix I at every residual junction.

    Args:
        config, params: A network without shortcuts; one that has them comes back as it is.

    Shapes:
        block_i/shortcut_attn/kernel, block_i/shortcut_mlp/kernel: [width, width], dtype of the block's
        `mlp/up/kernel`.

    Reference:
        arXiv:2505.22697, section "residual connections"; the released code patches every block so.
    """
    if config.shortcuts:
        return config, tree.map_leaves(lambda _, leaf: leaf, params)
    flat = tree.flatten(params)
    for index in range(config.depth):
        near = flat[f"block_{index}/mlp/up/kernel"]
        xp = np if isinstance(near, np.ndarray) else jnp
        for name in ("shortcut_attn", "shortcut_mlp"):
            flat[f"block_{index}/{name}/kernel"] = xp.eye(config.width, dtype=near.dtype)
    return replace(config, shortcuts=True), tree.unflatten(flat)
