"""Residual networks for large images (ResNet-18 to 152, wide ones): 7x7 stem, max pool, basic or bottleneck blocks.

Reference:
    He et al. 2015, arXiv:1512.03385. A bottleneck strides in its 3x3 convolution ("v1.5", as torchvision, timm and
    transformers have it) or, as in the paper, in its first 1x1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.models.batch_norm import (
    STATISTICS,
    BatchNorm,
    convolution,
    is_statistic,
    norm_axes,
    put_statistics,
)
from jaxtune.models.config import check_fields
from jaxtune.models.inputs import at_least_float32, draw_images, image_of, open_params
from jaxtune.rng import named_key
from jaxtune.symmetry import Group, Spec, make_spec
from jaxtune.types import Params

SCALES = ("fixed", "free")
EXAMPLE_SIZE = 64  # two by two positions in the last stage; the network itself takes any


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one network; the images may have any height and width.

    Attributes:
        num_outputs: Of the linear layer; with head "none" the width of the last stage.
        block: Two 3x3 convolutions, or 1x1, 3x3 and 1x1.
        depths: Blocks of each stage.
        widths: Channels of each stage's stream.
        inner_widths: Channels inside the blocks of each stage; of basic blocks the same as `widths`.
        stem_width: Channels of the stem.
        first_stride: Stride of the first stage; that of the others is 2.
        stride_in: Which convolution of a bottleneck has the stride; a basic block strides in its first.
        head: A linear layer on the mean over all positions, or that mean itself.
        momentum: Share of the old running statistics that a training batch leaves.
    """

    num_outputs: int
    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    inner_widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int = 64
    first_stride: Literal[1, 2] = 1
    stride_in: Literal["conv1", "conv2"] = "conv2"
    head: Literal["linear", "none"] = "linear"
    channels: int = 3
    norm_eps: float = 1e-5
    momentum: float = 0.9

    def __post_init__(self):
        check_fields(self)
        lengths = {len(self.depths), len(self.widths), len(self.inner_widths)}
        if len(lengths) != 1 or 0 in lengths:
            raise ConfigError(
                f"depths {self.depths}, widths {self.widths} and inner_widths {self.inner_widths} must name the same "
                "stages, one or more."
            )
        if self.block == "basic" and (self.inner_widths != self.widths or self.stride_in != "conv2"):
            raise ConfigError(
                f"basic blocks are as wide inside as out, and stride_in, left at 'conv2', says of bottlenecks alone; "
                f"got widths {self.widths}, inner_widths {self.inner_widths}, stride_in {self.stride_in!r}."
            )
        if self.head == "none" and self.num_outputs != self.widths[-1]:
            raise ConfigError(f"without a head num_outputs is {self.widths[-1]}, the last of widths.")
        if self.momentum >= 1:
            raise ConfigError(f"momentum {self.momentum} never lets a batch in; it must be below 1.")


@dataclass(frozen=True)
class Layer:
    """One convolution of a block and the norm behind it.

    Attributes:
        index: 1, 2 or 3: "conv1" and "norm1".
        num_in, num_out, size, stride: Of the convolution.
    """

    index: int
    num_in: int
    num_out: int
    size: int
    stride: int


@dataclass(frozen=True)
class Block:
    """One residual block: its layers, and the one on its shortcut where the shape changes."""

    stage: int
    index: int
    layers: tuple[Layer, ...]
    shortcut: Layer | None

    @property
    def path(self) -> str:
        """Where its leaves lie."""
        return f"stage_{self.stage}_block_{self.index}"


def blocks_of(config: Config) -> Iterator[Block]:
    """Every block, in order."""
    num_in = config.stem_width
    for stage, (depth, width, inner) in enumerate(zip(config.depths, config.widths, config.inner_widths, strict=True)):
        for index in range(depth):
            stride = 1 if index else (2 if stage else config.first_stride)
            in_conv1, in_conv2 = (stride, 1) if config.stride_in == "conv1" else (1, stride)
            if config.block == "basic":
                layers = (Layer(1, num_in, width, 3, stride), Layer(2, width, width, 3, 1))
            else:
                layers = (
                    Layer(1, num_in, inner, 1, in_conv1),
                    Layer(2, inner, inner, 3, in_conv2),
                    Layer(3, inner, width, 1, 1),
                )
            has_shortcut = stride != 1 or num_in != width
            yield Block(stage, index, layers, Layer(0, num_in, width, 1, stride) if has_shortcut else None)
            num_in = width


class ResNet(nn.Module):
    """float[N, H, W, C] -> float[N, num_outputs], in the dtype of the images."""

    config: Config
    is_training: bool

    @nn.compact
    def __call__(self, image):
        config = self.config
        norm = partial(BatchNorm, config.norm_eps, config.momentum, self.is_training)
        x = nn.relu(norm(name="stem_norm")(convolution(config.stem_width, 7, 2, name="stem_conv")(image)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in blocks_of(config):
            x = ResidualBlock(block, norm, name=block.path)(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(config.num_outputs, name="head")(x) if config.head == "linear" else x


class ResidualBlock(nn.Module):
    """Convolutions with norms, ReLU between them and behind the sum."""

    block: Block
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = x
        for layer in self.block.layers:
            y = nn.relu(y) if layer.index > 1 else y
            y = convolution(layer.num_out, layer.size, layer.stride, name=f"conv{layer.index}")(y)
            y = self.norm(name=f"norm{layer.index}")(y)
        shortcut = self.block.shortcut
        if shortcut:
            x = convolution(shortcut.num_out, shortcut.size, shortcut.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters; running means 0 and variances 1."""
    image = jax.ShapeDtypeStruct((1, 32, 32, config.channels), jnp.float32)
    return ResNet(config, is_training=False).lazy_init(key, image)["params"]


def apply(config: Config, params: Params, batch: Params) -> jax.Array:
    """Outputs of a batch, normalised by the running statistics.

    Shapes:
        batch["image"]: float[N, H, W, channels].
        result: float32[N, num_outputs]; float64 where the parameters are.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: the images are not this config's.
    """
    return _run(config, params, batch, is_training=False)[0]


def apply_train(config: Config, params: Params, batch: Params) -> tuple[jax.Array, dict[str, Any]]:
    """Outputs of a batch, normalised by its own statistics, and the tree with the running ones moved.

    Shapes, Raises: as `apply`. Only the "mean" and "var" leaves of the returned tree are new.
    """
    outputs, variables = _run(config, params, batch, is_training=True)
    return outputs, put_statistics(params, variables["updated"])


def observe_norms(config: Config, params: Params, batch: Params, *, is_training: bool) -> dict[str, Any]:
    """Mean and variance, over a batch, of what every batch norm is given: see `resnet.observe_norms`."""
    return _run(config, params, batch, is_training=is_training, mutable=["observed", "updated"])[1]["observed"]


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Images to compare two networks on, see `inputs.draw_images`."""
    return {"image": draw_images(named_key(key, "image"), size, EXAMPLE_SIZE, EXAMPLE_SIZE, config.channels)}


def symmetry(config: Config, *, scales: str = "fixed") -> Spec:
    """One order per stage, shared by all that its stream touches, and one behind every convolution inside a block.

    Groups: "stem/channel" (part of "stage_0/channel" where the first block has nothing on its shortcut),
    "stage_s/channel", "stage_s_block_b/channel_1" and, in a bottleneck, "channel_2". Fixed axes: pixels, kernel
    windows, outputs; without a head the last stage's channels are the outputs.

    Args:
        config: The network.
        scales: "fixed": elements that keep every norm. "free": every channel has a positive scale too, as in
            `resnet.symmetry`; it passes the max pool as it passes ReLU.

    Raises:
        UnknownNameError: another value of `scales`.
    """
    if scales not in SCALES:
        raise unknown_name("scales", scales, SCALES)
    kind = "scaled_permutation" if scales == "free" else "permutation"
    groups: dict[str, Group] = {}
    axes: dict[str, tuple[str | None, ...]] = {}

    def add(conv, norm, before, group, size):
        if group is not None:
            groups.setdefault(group, Group(group, size, kind, role="channel"))
        axes[f"{conv}/kernel"] = (None, None, before and f"{before}*", group and f"{group}~")
        axes.update(norm_axes(norm, group))

    blocks = list(blocks_of(config))
    streams: list[str | None] = [f"stage_{stage}/channel" for stage in range(len(config.depths))]
    if config.head == "none":
        streams[-1] = None
    stream = "stem/channel" if blocks[0].shortcut else streams[0]
    add("stem_conv", "stem_norm", None, stream, config.stem_width)
    for block in blocks:
        before, stream = stream, streams[block.stage]
        inside = before
        for layer in block.layers:
            is_last = layer is block.layers[-1]
            group = stream if is_last else f"{block.path}/channel_{layer.index}"
            add(f"{block.path}/conv{layer.index}", f"{block.path}/norm{layer.index}", inside, group, layer.num_out)
            inside = group
        if block.shortcut:
            add(f"{block.path}/shortcut_conv", f"{block.path}/shortcut_norm", before, stream, block.shortcut.num_out)
    if config.head == "linear":
        axes |= {"head/kernel": (f"{stream}*", None), "head/bias": (None,)}
    statistics = [path for path in axes if is_statistic(path)]
    nonnegative = [path for path in statistics if path.endswith(STATISTICS[1])]
    return make_spec(groups.values(), axes, unmatched=statistics, nonnegative=nonnegative)


def is_trainable(config: Config, path: str) -> bool:
    """False for running statistics."""
    del config
    return not is_statistic(path)


def _run(config, params, batch, *, is_training, mutable=("updated",)):
    image = image_of(batch, (None, None, config.channels))
    params = open_params(init, config, params)
    dtype = params["stem_norm"]["bias"].dtype
    outputs, variables = ResNet(config, is_training).apply(
        {"params": params}, jnp.asarray(image).astype(dtype), mutable=list(mutable)
    )
    return outputs.astype(at_least_float32(dtype)), variables
