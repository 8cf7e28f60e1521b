"""Vision transformer: pre-LN, learned positions, a class token or the mean of the patches."""

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
from jaxtune.models.transformer import Activation, Block, LayerNorm, check_heads
from jaxtune.models.transformer_form import declare_form
from jaxtune.models.transformer_symmetry import Inside, Junctions, StackSymmetry, declare_stack
from jaxtune.rng import named_key
from jaxtune.symmetry import Form, Spec, make_spec
from jaxtune.types import Params


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one vision transformer.

    Attributes:
        image_size, patch_size: Side in pixels; patches tile the image.
        num_outputs: Classes, or the width of an embedding space.
        pooling: "class": the final norm of a class token. "mean": no class token; mean of the final
            norm of the patches.
        stream_norm: Whether a norm stands before the first block (CLIP's `ln_pre`).
        shortcuts: Whether every residual junction has its own matrix, initially I. Costs two width²
            products a block and exists for one thing: to run TransFusion's per-junction permutations,
            which a plain residual stream cannot express, exactly (`with_shortcuts`).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_outputs: int
    channels: int = 3
    pooling: Literal["class", "mean"] = "class"
    stream_norm: bool = False
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    head_bias: bool = True
    patch_bias: bool = True
    shortcuts: bool = False

    def __post_init__(self):
        check_fields(self)
        check_heads(self)
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}.")

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: patches, and the class token if there is one."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "class")


class VisionTransformer(nn.Module):
    """float[N, H, W, C] -> float[N, num_outputs], in the dtype of the images."""

    config: Config

    @nn.compact
    def __call__(self, image):
        config, small = self.config, nn.initializers.normal(0.02)
        size = (config.patch_size, config.patch_size)
        x = nn.Conv(config.width, size, size, padding="VALID", use_bias=config.patch_bias, name="patch")(image)
        x = x.reshape(x.shape[0], -1, config.width)  # [batch, token, channel], rows of patches first
        if config.pooling == "class":
            token = self.param("class_token", small, (config.width,), jnp.float32)
            x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        position = self.param("position", small, (config.num_tokens, config.width), jnp.float32)
        x = x + position.astype(x.dtype)[None]
        if config.stream_norm:
            x = LayerNorm(config.norm_eps, name="stream_norm")(x)
        for index in range(config.depth):
            x = Block(config, shortcuts=config.shortcuts, name=f"block_{index}")(x)
        x = x[:, 0] if config.pooling == "class" else x
        x = LayerNorm(config.norm_eps, name="final_norm")(x)
        x = x.mean(axis=1) if config.pooling == "mean" else x
        return nn.Dense(config.num_outputs, use_bias=config.head_bias, name="head")(x)


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters."""
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), jnp.float32)
    return VisionTransformer(config).lazy_init(key, image)["params"]


def apply(config: Config, params: Params, batch: Params) -> jax.Array:
    """Outputs of a batch.

    Shapes:
        batch["image"]: float[N, image_size, image_size, channels].
        result: float32[N, num_outputs]; float64 where the parameters are.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: the images are not this config's.
    """
    image = image_of(batch, (config.image_size, config.image_size, config.channels))
    params = open_params(init, config, params)
    dtype = params["position"].dtype
    outputs = VisionTransformer(config).apply({"params": params}, jnp.asarray(image).astype(dtype))
    return outputs.astype(at_least_float32(dtype))


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Images to compare two networks on, see `inputs.draw_images`."""
    return {"image": draw_images(named_key(key, "image"), size, config.image_size, config.image_size, config.channels)}


def symmetry(config: Config, *, junctions: Junctions = "shared", inside: Inside = "separate") -> Spec:
    """What the weights may do; see `declare_stack` for the options and the names of the groups.

    Fixed axes: those of the image, of the patch grid, of the positions' tokens and of the outputs.

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
        form=None if config.shortcuts else declare_tower_form(config),
    )


def declare_tower(config: Config, *, prefix: str = "", junctions: Junctions, inside: Inside) -> StackSymmetry:
    """The rows of `symmetry`, every path and group behind `prefix`."""
    stack = declare_stack(config, prefix=prefix, shortcuts=config.shortcuts, junctions=junctions, inside=inside)
    rows = {"patch/kernel": (None, None, None, stack.entry), "position": (None, stack.entry)}
    if config.patch_bias:
        rows["patch/bias"] = (stack.entry,)
    if config.pooling == "class":
        rows["class_token"] = (stack.entry,)
    if config.stream_norm:
        rows |= {"stream_norm/scale": (stack.entry,), "stream_norm/bias": (stack.entry,)}
    rows |= {"final_norm/scale": (stack.exit,), "final_norm/bias": (stack.exit,)}
    rows["head/kernel"] = (stack.exit, None)
    if config.head_bias:
        rows["head/bias"] = (None,)
    stack.axes.update({f"{prefix}{path}": owners for path, owners in rows.items()})
    return stack


def declare_tower_form(config: Config, *, prefix: str = "") -> Form:
    """Where the norms of the tower are, every path behind `prefix`."""
    inputs = ["patch/kernel", "position"]
    inputs += ["patch/bias"] if config.patch_bias else []
    inputs += ["class_token"] if config.pooling == "class" else []
    return declare_form(
        config,
        prefix=prefix,
        inputs=inputs,
        head="head/kernel",
        head_bias="head/bias" if config.head_bias else None,
        entry_norm="stream_norm" if config.stream_norm else None,
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
