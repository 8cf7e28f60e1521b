"""A mixture of gated experts in the place of an MLP: a router sends every token to a few of many.

Every expert runs on every token, and what the router did not choose counts with weight 0: the sum is the sparse one, in
the same order, at the price of running all experts. Gather and scatter would save that work where batches are large.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError
from jaxtune.models.config import check_fields
from jaxtune.models.inputs import at_least_float32
from jaxtune.rng import named_key
from jaxtune.symmetry import Group
from jaxtune.types import Params

KERNELS = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Sizes and choices of one mixture.

    Attributes:
        num_experts: How many there are.
        num_chosen: How many a token is sent to.
        hidden: Hidden width of one expert.
        is_normalised: Whether the weights of the chosen ones are divided by their sum.
        softmax: "all": over the logits of all experts, then the largest are chosen. "chosen": the largest logits
            are chosen, then softmax over those; already normalised.
        shared_hidden: Hidden width of one more expert that sees every token, behind a sigmoid gate of its own; None
            where there is none.
    """

    num_experts: int
    num_chosen: int
    hidden: int
    is_normalised: bool = True
    softmax: Literal["all", "chosen"] = "all"
    shared_hidden: int | None = None

    def __post_init__(self):
        check_fields(self)
        if self.num_chosen > self.num_experts:
            raise ConfigError(f"num_chosen {self.num_chosen} of only num_experts {self.num_experts}.")


def init_experts(key: jax.Array, config: Experts, width: int) -> dict[str, Any]:
    """Fresh float32 parameters, gaussian of variance 1 / fan_in.

    Args:
        key: Every leaf draws from the stream of its own path.
        config: Sizes.
        width: Of the residual stream.

    Shapes:
        router/kernel: [width, experts].
        experts/gate/kernel, experts/up/kernel: [experts, width, hidden]; experts/down/kernel: [experts, hidden, width].
        shared/gate/kernel, shared/up/kernel: [width, shared]; shared/down/kernel: [shared, width].
        shared_gate/kernel: [width, 1].
    """

    def draw(name, *shape):
        return {"kernel": jax.random.normal(named_key(key, name), shape, jnp.float32) / math.sqrt(shape[-2])}

    def mlp(name, hidden, *before):
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        return {part: draw(f"{name}/{part}", *before, *shape) for part, shape in zip(KERNELS, shapes, strict=True)}

    params = {
        "router": draw("router", width, config.num_experts),
        "experts": mlp("experts", config.hidden, config.num_experts),
    }
    if config.shared_hidden is not None:
        params["shared"] = mlp("shared", config.shared_hidden)
        params["shared_gate"] = draw("shared_gate", width, 1)
    return params


def apply_experts(
    config: Experts, params: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
) -> jax.Array:
    """What the mixture adds to the stream.

    Args:
        config: Static under `jit`.
        params: As `init_experts` makes them, in the dtype of `x`.
        x: Normalised stream.
        activation: Of the gates.

    Shapes:
        x: float[..., width]; result the same, in its dtype.
    """
    tokens = x.reshape(-1, x.shape[-1])
    weights = route(config, params, tokens)  # [token, expert]
    wide = at_least_float32(x.dtype)

    def add(total, expert):
        kernels, weight = expert
        return total + (_run_gated(kernels, tokens, activation) * weight[:, None]).astype(wide), None

    stacked = {part: params["experts"][part]["kernel"] for part in KERNELS}
    # One expert at a time: all at once would hold [token, expert, hidden].
    total, _ = jax.lax.scan(add, jnp.zeros(tokens.shape, wide), (stacked, weights.T))
    if config.shared_hidden is not None:
        shared = _run_gated({part: params["shared"][part]["kernel"] for part in KERNELS}, tokens, activation)
        gate = jax.nn.sigmoid(tokens @ params["shared_gate"]["kernel"])  # [token, 1]
        total = total + (gate * shared).astype(wide)
    return total.astype(x.dtype).reshape(x.shape)


def route(config: Experts, params: Params, tokens: jax.Array) -> jax.Array:
    """Weight of every expert for every token, 0 where it was not chosen: float[token, expert] in the tokens' dtype.

    Softmax is taken in float32 or wider. Of equal scores the expert of the lowest index is chosen.
    """
    kernel = params["router"]["kernel"]
    logits = (tokens @ kernel).astype(at_least_float32(tokens.dtype))
    scores = jax.nn.softmax(logits, axis=-1) if config.softmax == "all" else logits
    chosen, index = jax.lax.top_k(scores, config.num_chosen)  # [token, chosen]
    if config.softmax == "chosen":
        chosen = jax.nn.softmax(chosen, axis=-1)
    elif config.is_normalised:
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros(logits.shape, chosen.dtype).at[rows, index].set(chosen).astype(tokens.dtype)


def declare_experts(
    config: Experts, prefix: str, *, width_owner: str | None = "stream"
) -> tuple[list[Group], dict[str, tuple[str | None, ...]]]:
    """Who owns which axis: rows for `make_spec`.

    Experts change places with their columns of the router. The hidden units of one expert change places and signs
    among themselves: the sign of `up` comes out of the product with the gate and goes into `down`.

    Args:
        config: Sizes.
        prefix: Stands before every path and group, for instance "block_0/mlp".
        width_owner: Owner of the stream's axis.

    Returns:
        (groups, axes). Group `prefix/expert` is a permutation; its child `prefix/experts/hidden` and, if there is a
        shared expert, `prefix/shared/hidden` are signed permutations.
    """
    expert, hidden = f"{prefix}/expert", f"{prefix}/experts/hidden"
    groups = [
        Group(expert, config.num_experts, role="expert"),
        Group(hidden, config.hidden, kind="signed_permutation", parent=expert),
    ]
    axes = {f"{prefix}/router/kernel": (width_owner, expert)}
    axes |= {f"{prefix}/experts/{part}": (expert, *row) for part, row in _gated_rows(width_owner, hidden).items()}
    if config.shared_hidden is not None:
        shared = f"{prefix}/shared/hidden"
        groups.append(Group(shared, config.shared_hidden, kind="signed_permutation"))
        axes |= {f"{prefix}/shared/{part}": row for part, row in _gated_rows(width_owner, shared).items()}
        axes[f"{prefix}/shared_gate/kernel"] = (width_owner, None)
    return groups, axes


def _gated_rows(stream, hidden):
    return {
        "gate/kernel": (stream, f"{hidden}~"),  # behind the activation no sign is left to cancel
        "up/kernel": (stream, hidden),
        "down/kernel": (f"{hidden}*", stream),
    }


def _run_gated(kernels, tokens, activation):
    """float[token, width] -> float[token, width] through one gated MLP."""
    return (activation(tokens @ kernels["gate"]) * (tokens @ kernels["up"])) @ kernels["down"]
