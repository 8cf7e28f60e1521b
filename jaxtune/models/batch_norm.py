"""Batch norm with its running statistics in the tree, and the convolution that stands before it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune import tree
from jaxtune.models.inputs import at_least_float32
from jaxtune.types import Params

STATISTICS = ("mean", "var")


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last; flax's own mixes dtypes under strict promotion.

    In training it normalises by the batch and leaves the next running statistics in "updated". The
    running variance takes the batch's own variance (over N), as flax does and torch (over N - 1) does not.
    Where "observed" is mutable it leaves the batch's own statistics there, in training and out of it.
    """

    eps: float
    momentum: float
    is_training: bool

    @nn.compact
    def __call__(self, x):
        ones, zeros, width = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        wide = x.astype(at_least_float32(x.dtype))
        scale, bias, mean, var = (
            self.param(name, fill, width, jnp.float32).astype(wide.dtype)
            for name, fill in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        )
        axes = tuple(range(x.ndim - 1))
        if self.is_mutable_collection("observed") and not self.is_initializing():
            self.put_variable("observed", "mean", wide.mean(axis=axes))
            self.put_variable("observed", "var", wide.var(axis=axes))
        if self.is_training:
            old_mean, old_var, mean, var = mean, var, wide.mean(axis=axes), wide.var(axis=axes)
            self.put_variable("updated", "mean", self.momentum * old_mean + (1 - self.momentum) * mean)
            self.put_variable("updated", "var", self.momentum * old_var + (1 - self.momentum) * var)
        lead = (1,) * (x.ndim - 1)
        scale, bias, mean, var = (leaf.reshape(*lead, *width) for leaf in (scale, bias, mean, var))
        return ((wide - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias).astype(x.dtype)


def convolution(width: int, size: int, stride: int, *, name: str) -> nn.Conv:
    """A square convolution without a bias, of odd `size`."""
    # Padding by hand: "SAME" pads a strided convolution on one side only, other frameworks on both.
    pad = (size // 2, size // 2)
    kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        width, (size, size), (stride, stride), [pad, pad], use_bias=False, kernel_init=kernel_init, name=name
    )


def put_statistics(params: Params, updated: Params) -> dict[str, Any]:
    """`params` with the statistics in `updated`, in the dtypes of `params`; no gradient flows through them."""
    leaves = tree.flatten(params)
    for path, leaf in tree.flatten(updated).items():
        leaves[path] = jax.lax.stop_gradient(leaf).astype(leaves[path].dtype)
    return tree.unflatten(leaves)


def is_statistic(path: str) -> bool:
    """Whether the leaf at `path` is a running statistic, which no gradient moves."""
    return path.rsplit("/", 1)[-1] in STATISTICS


def norm_axes(path: str, group: str | None) -> dict[str, tuple[str | None]]:
    """Owners of a batch norm's leaves: scales of the units show in gain and offset, their order everywhere."""
    return {
        **{f"{path}/{name}": (group,) for name in ("scale", "bias")},
        **{f"{path}/{name}": (group and f"{group}~",) for name in STATISTICS},
    }
