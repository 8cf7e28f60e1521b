"""Residual network for small images (depth 6n + 2), batch norm with its running statistics in the tree."""

from dataclasses import dataclass
from functools import partial
from typing import Any

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

NUM_STAGES = 3
STAGE_WIDTHS = (16, 32, 64)
SCALES = ("fixed", "free")
EXAMPLE_SIZE = 32  # CIFAR's; the network itself takes any


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one ResNet; the images may have any height and width.

    Attributes:
        depth: 6n + 2 with n blocks a stage: 20, 32, 44, 56, 110.
        width_multiplier: Times the 16, 32 and 64 channels of the stages.
        momentum: Share of the old running statistics that a training batch leaves.
    """

    num_outputs: int
    depth: int = 20
    width_multiplier: int = 1
    channels: int = 3
    norm_eps: float = 1e-5
    momentum: float = 0.9

    def __post_init__(self):
        check_fields(self)
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ConfigError(
                f"depth {self.depth} is not 6n + 2; nearest: {max(1, round((self.depth - 2) / 6)) * 6 + 2}."
            )
        if self.momentum >= 1:
            raise ConfigError(f"momentum {self.momentum} never lets a batch in; it must be below 1.")

    @property
    def num_blocks(self) -> int:
        """Blocks of one stage."""
        return (self.depth - 2) // 6


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; a 1x1 one on the shortcut where the shape changes ("option B")."""

    config: Config
    width: int
    stride: int
    is_training: bool

    @nn.compact
    def __call__(self, x):
        norm = partial(BatchNorm, self.config.norm_eps, self.config.momentum, self.is_training)
        y = convolution(self.width, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(convolution(self.width, 3, 1, name="conv2")(y))
        if y.shape != x.shape:
            x = convolution(self.width, 1, self.stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """float[N, H, W, C] -> float[N, num_outputs], in the dtype of the images."""

    config: Config
    is_training: bool

    @nn.compact
    def __call__(self, image):
        config = self.config
        x = convolution(STAGE_WIDTHS[0] * config.width_multiplier, 3, 1, name="stem_conv")(image)
        x = nn.relu(BatchNorm(config.norm_eps, config.momentum, self.is_training, name="stem_norm")(x))
        for stage, width in enumerate(STAGE_WIDTHS):
            for block in range(config.num_blocks):
                stride = 2 if stage and not block else 1
                x = ResidualBlock(
                    config, width * config.width_multiplier, stride, self.is_training, name=_block(stage, block)
                )(x)
        return nn.Dense(config.num_outputs, name="head")(x.mean(axis=(1, 2)))


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters; running means 0 and variances 1."""
    image = jax.ShapeDtypeStruct((1, 8, 8, config.channels), jnp.float32)
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
    outputs, _ = _run(config, params, batch, is_training=False)
    return outputs


def apply_train(config: Config, params: Params, batch: Params) -> tuple[jax.Array, dict[str, Any]]:
    """Outputs of a batch, normalised by its own statistics, and the tree with the running ones moved.

    Shapes, Raises: as `apply`. Only the "mean" and "var" leaves of the returned tree are new, and keep
    their dtype; no gradient flows through them.
    """
    outputs, variables = _run(config, params, batch, is_training=True)
    return outputs, put_statistics(params, variables["updated"])


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Images to compare two networks on, see `inputs.draw_images`."""
    return {"image": draw_images(named_key(key, "image"), size, EXAMPLE_SIZE, EXAMPLE_SIZE, config.channels)}


def observe_norms(config: Config, params: Params, batch: Params, *, is_training: bool) -> dict[str, Any]:
    """Mean and variance, over a batch, of what every batch norm is given.

    Args:
        config, params, batch: As `apply`.
        is_training: Whether the norms divide by the batch's statistics, or by the running ones.

    Shapes:
        result: a tree of the "mean" and "var" leaves alone.
    """
    return _run(config, params, batch, is_training=is_training, mutable=["observed", "updated"])[1]["observed"]


def symmetry(config: Config, *, scales: str = "fixed") -> Spec:
    """One order per stage, shared by all that its stream touches, and one inside every block.

    Groups: "stage_s/channel" and "stage_s_block_b/channel". Fixed axes: pixels, kernel windows, outputs.

    Args:
        config: The network.
        scales: "fixed": elements that keep every norm. "free": every channel has a positive scale too. It enters
            through the gain and the offset of a batch norm, passes ReLU, sums and means, and leaves through the
            kernels that read it; in a stage, whose shortcuts carry it on, all blocks share it. The kernel in front
            of a batch norm takes none: what reads it is blind to scales, but for `norm_eps`. Not the default: see
            `mlp.symmetry`.

    Raises:
        UnknownNameError: another value of `scales`.
    """
    if scales not in SCALES:
        raise unknown_name("scales", scales, SCALES)
    kind = "scaled_permutation" if scales == "free" else "permutation"
    groups, axes, unmatched, nonnegative = [], {}, [], []

    def add_norm(path, group):
        axes.update(norm_axes(path, group))
        unmatched.extend(f"{path}/{name}" for name in STATISTICS)
        nonnegative.append(f"{path}/var")

    axes["stem_conv/kernel"] = (None, None, None, "stage_0/channel~")
    add_norm("stem_norm", "stage_0/channel")
    before = "stage_0/channel*"
    for stage, width in enumerate(STAGE_WIDTHS):
        stream = f"stage_{stage}/channel"
        groups.append(Group(stream, width * config.width_multiplier, kind, role="channel"))
        for block in range(config.num_blocks):
            path = _block(stage, block)
            inner = f"{path}/channel"
            groups.append(Group(inner, width * config.width_multiplier, kind, role="channel"))
            axes[f"{path}/conv1/kernel"] = (None, None, before, f"{inner}~")
            axes[f"{path}/conv2/kernel"] = (None, None, f"{inner}*", f"{stream}~")
            add_norm(f"{path}/norm1", inner)
            add_norm(f"{path}/norm2", stream)
            if before != f"{stream}*":
                axes[f"{path}/shortcut_conv/kernel"] = (None, None, before, f"{stream}~")
                add_norm(f"{path}/shortcut_norm", stream)
            before = f"{stream}*"
    axes |= {"head/kernel": (before, None), "head/bias": (None,)}
    return make_spec(groups, axes, unmatched=unmatched, nonnegative=nonnegative)


def is_trainable(config: Config, path: str) -> bool:
    """False for running statistics."""
    del config
    return not is_statistic(path)


def _run(config, params, batch, *, is_training, mutable=("updated",)):
    image = image_of(batch, (None, None, config.channels))
    params = open_params(init, config, params)
    dtype = params["head"]["bias"].dtype
    outputs, variables = ResNet(config, is_training).apply(
        {"params": params}, jnp.asarray(image).astype(dtype), mutable=list(mutable)
    )
    return outputs.astype(at_least_float32(dtype)), variables


def _block(stage, block):
    return f"stage_{stage}_block_{block}"
