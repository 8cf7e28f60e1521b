"""Multi-layer perceptrons: a plain one, and one with a residual stream."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.models import transformer
from jaxtune.models.config import check_fields
from jaxtune.models.inputs import at_least_float32, draw_images, image_of, open_params
from jaxtune.rng import named_key
from jaxtune.symmetry import Group, Spec, make_spec
from jaxtune.types import Params

ACTIVATIONS = {**transformer.ACTIVATIONS, "tanh": jnp.tanh}
SCALES = ("fixed", "free")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one perceptron.

    Attributes:
        image_shape: Height, width, channels; flattened at the door.
        widths: Plain: one per hidden layer. Residual: first the stream, then the hidden layer of each block.
        residual: Whether blocks add to a stream instead of following each other.
    """

    image_shape: tuple[int, int, int]
    widths: tuple[int, ...]
    num_outputs: int
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    residual: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.residual and not self.widths:
            raise ConfigError("a residual perceptron needs the width of its stream: widths is empty.")


class PlainMlp(nn.Module):
    """Layer, activation, layer, activation, ..., head."""

    config: Config

    @nn.compact
    def __call__(self, x):
        for index, width in enumerate(self.config.widths):
            x = nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"layer_{index}")(x)
            x = ACTIVATIONS[self.config.activation](x)
        return nn.Dense(self.config.num_outputs, name="head")(x)


class ResidualMlp(nn.Module):
    """`x + down(activation(up(x)))` a block, between a stem and a head that are linear."""

    config: Config

    @nn.compact
    def __call__(self, x):
        stream, *hidden = self.config.widths
        x = nn.Dense(stream, name="stem")(x)
        for index, width in enumerate(hidden):
            x = x + ResidualBlock(width, self.config.activation, name=f"block_{index}")(x)
        return nn.Dense(self.config.num_outputs, name="head")(x)


class ResidualBlock(nn.Module):
    """What one block adds to the stream."""

    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(self.hidden, kernel_init=nn.initializers.he_normal(), name="up")(x)
        return nn.Dense(x.shape[-1], name="down")(ACTIVATIONS[self.activation](hidden))


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Fresh float32 parameters."""
    height, width, channels = config.image_shape
    flat = jax.ShapeDtypeStruct((1, height * width * channels), jnp.float32)
    return _module_of(config).lazy_init(key, flat)["params"]


def apply(config: Config, params: Params, batch: Params) -> jax.Array:
    """Outputs of a batch.

    Shapes:
        batch["image"]: float[N, *image_shape].
        result: float32[N, num_outputs]; float64 where the parameters are.

    Raises:
        TreeMismatchError: the parameters are not this config's.
        DataError: the images are not this config's.
    """
    image = image_of(batch, config.image_shape)
    params = open_params(init, config, params)
    dtype = params["head"]["bias"].dtype
    flat = jnp.asarray(image).astype(dtype).reshape(image.shape[0], -1)
    return _module_of(config).apply({"params": params}, flat).astype(at_least_float32(dtype))


def example(key: jax.Array, config: Config, size: int) -> dict[str, jax.Array]:
    """Images to compare two networks on, see `inputs.draw_images`."""
    return {"image": draw_images(named_key(key, "image"), size, *config.image_shape)}


def symmetry(config: Config, *, scales: str = "fixed") -> Spec:
    """One order per hidden layer ("layer_i/hidden" or "block_i/hidden") and, if residual, one "stream".

    Behind tanh, which is odd, every hidden unit has a sign too. Fixed axes: those of the pixels and of the outputs.

    Args:
        config: The network.
        scales: "fixed": elements that keep every norm. "free": behind ReLU every hidden unit has a positive scale
            too, which its outgoing weights divide by. Not the default: a scale changes how long a task vector is
            and how far apart two networks lie, which whoever compares them must want.

    Raises:
        UnknownNameError: another value of `scales`.
        ConfigError: free scales behind an activation that sees them.
    """
    if scales not in SCALES:
        raise unknown_name("scales", scales, SCALES)
    if scales == "free" and config.activation != "relu":
        raise ConfigError(
            f'scales="free" needs activation relu, which a positive scale passes; this config has {config.activation}. '
            'Use scales="fixed".'
        )
    kind = "signed_permutation" if config.activation == "tanh" else "permutation"
    kind = "scaled_permutation" if scales == "free" else kind
    return _residual_symmetry(config, kind) if config.residual else _plain_symmetry(config, kind)


def _plain_symmetry(config, kind):
    groups, axes, before = [], {}, None
    for index, width in enumerate(config.widths):
        layer = f"layer_{index}"
        groups.append(Group(f"{layer}/hidden", width, kind))
        axes |= {f"{layer}/kernel": (before, f"{layer}/hidden"), f"{layer}/bias": (f"{layer}/hidden",)}
        before = f"{layer}/hidden*"
    axes |= {"head/kernel": (before, None), "head/bias": (None,)}
    return make_spec(groups, axes)


def _residual_symmetry(config, kind):
    stream, *hidden = config.widths
    groups = [Group("stream", stream, role="stream")]
    axes = {"stem/kernel": (None, "stream"), "stem/bias": ("stream",)}
    for index, width in enumerate(hidden):
        block, inside = f"block_{index}", f"block_{index}/hidden"
        groups.append(Group(inside, width, kind))
        axes |= {f"{block}/up/kernel": ("stream", inside), f"{block}/up/bias": (inside,)}
        axes |= {f"{block}/down/kernel": (f"{inside}*", "stream"), f"{block}/down/bias": ("stream",)}
    axes |= {"head/kernel": ("stream", None), "head/bias": (None,)}
    return make_spec(groups, axes, junctions=["stream"])


def _module_of(config):
    return ResidualMlp(config) if config.residual else PlainMlp(config)
