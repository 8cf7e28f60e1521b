"""Optimisers and learning-rate schedules from plain arguments."""

from functools import partial

import jax
import optax

from jaxtune import tree
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.types import Params

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(
    learning_rate: float,
    num_steps: int,
    *,
    num_warmup_steps: int = 0,
    schedule: str = "cosine",
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Learning rate as a function of the step: a linear warm-up from 0, then a decay to the end of training.

    Args:
        learning_rate: The peak, reached at step `num_warmup_steps`.
        num_steps: Length of the whole run, warm-up included.
        num_warmup_steps: Steps of the warm-up; 0 begins at the peak.
        schedule: One of `SCHEDULES`: how the rate falls after the peak.
        final_fraction: Rate at `num_steps`, as a fraction of the peak; "constant" has no use for it.

    Raises:
        ConfigError: a number out of range.
        UnknownNameError: `schedule` is unknown.
    """
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate is {learning_rate}; it must be positive.")
    if not 0 <= num_warmup_steps < num_steps:
        raise ConfigError(
            f"num_warmup_steps is {num_warmup_steps} of num_steps {num_steps}; it must be at least 0 and smaller."
        )
    if not 0 <= final_fraction <= 1:
        raise ConfigError(f"final_fraction is {final_fraction}; it must lie between 0 and 1.")
    num_decay_steps = num_steps - num_warmup_steps
    if schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, num_decay_steps, alpha=final_fraction)
    elif schedule == "linear":
        decay = optax.linear_schedule(learning_rate, final_fraction * learning_rate, num_decay_steps)
    else:
        decay = optax.constant_schedule(learning_rate)
    if not num_warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, num_warmup_steps)
    return optax.join_schedules([warmup, decay], [num_warmup_steps])


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    name: str = "adamw",
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """AdamW, or SGD with Nesterov momentum, behind a clip of the global gradient norm.

    Args:
        learning_rate: A number, or a schedule of `make_schedule`.
        name: One of `OPTIMIZERS`.
        weight_decay: Decoupled from the gradient and multiplied by the learning rate, in both optimisers;
            it touches only the leaves that `decays` names.
        clip_norm: Longest gradient that passes unscaled; None never clips.
        beta1: Decay of the first moment; AdamW only.
        beta2: Decay of the second moment; AdamW only.
        momentum: SGD only.

    Raises:
        ConfigError: a number out of range.
        UnknownNameError: `name` is unknown.

    Reference:
        Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    if weight_decay < 0:
        raise ConfigError(f"weight_decay is {weight_decay}; it must not be negative.")
    if clip_norm is not None and not clip_norm > 0:
        raise ConfigError(f"clip_norm is {clip_norm}; it must be positive, or None for no clipping.")
    for label, value in (("beta1", beta1), ("beta2", beta2), ("momentum", momentum)):
        if not 0 <= value < 1:
            raise ConfigError(f"{label} is {value}; it must be at least 0 and below 1.")
    if name == "adamw":
        direction = optax.scale_by_adam(b1=beta1, b2=beta2)
    else:
        direction = optax.trace(decay=momentum, nesterov=True)
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm is not None else optax.identity(),
        direction,
        optax.add_decayed_weights(weight_decay, mask=decayed_leaves),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.GradientTransformation(chain.init, partial(_update_promoting, chain.update))


def decayed_leaves(params: Params) -> Params:
    """True for the leaves that weight decay touches: rank 2 or more, and not a bias.

    Attention biases are float32[H, dh], so rank alone would take them for matrices.
    """
    return tree.map_leaves(lambda path, leaf: decays(path, leaf), params)


def decays(path: str, leaf: jax.Array) -> bool:
    """Whether weight decay touches one leaf."""
    return leaf.ndim >= 2 and path.rsplit("/", 1)[-1] != "bias"


def _update_promoting(update, *arguments):
    """optax raises floats to an int32 step count, which a caller's strict dtype promotion would refuse."""
    with jax.numpy_dtype_promotion("standard"):
        return update(*arguments)
