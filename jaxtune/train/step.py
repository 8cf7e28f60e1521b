"""One optimisation step of a classifier, compiled once and sharded over the batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune import tree
from jaxtune.errors import ConfigError, DataError
from jaxtune.models.readout import read_out
from jaxtune.rng import named_key
from jaxtune.types import Params

Batch = Mapping[str, jax.Array | np.ndarray]

# (params, frozen, batch, key) -> (outputs float32[N, num_outputs], params with updated statistics)
Forward = Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, Params]]

# (state, frozen, batch) -> (next state, metrics of the batch); `state` is donated
TrainStep = Callable[["TrainState", Params, Batch], tuple["TrainState", dict[str, jax.Array]]]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Shapes:
        params: What is learnt, with the running statistics among it: a model's tree, or LoRA factors.
        opt_state: Of the trainable leaves alone.
        step: int32[]. Number of updates done.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array


def make_mesh(batch_size: int, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of one axis, "data", over `devices`: all local ones unless told.

    Raises:
        ConfigError: the batch cannot be cut into equal parts.
    """
    devices = jax.local_devices() if devices is None else devices
    if batch_size % len(devices):
        nearest = max(1, round(batch_size / len(devices))) * len(devices)
        raise ConfigError(
            f"batch_size {batch_size} cannot be shared equally by {len(devices)} devices; {nearest} would do."
        )
    return jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicate(params: Params, mesh: jax.sharding.Mesh) -> Params:
    """A copy of a tree on every device of the mesh; donating it leaves the original alone."""
    # device_put alone shares the buffer of the device that has one, whatever `may_alias` says (jax 0.10).
    return jax.device_put(jax.tree.map(jnp.copy, params), jax.NamedSharding(mesh, jax.P()))


def split_trainable(params: Params, is_trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """The leaves that gradients move and the leaves that they do not; `join_trainable` undoes it."""
    flat = tree.flatten(params)
    moving = {path: leaf for path, leaf in flat.items() if is_trainable(path)}
    still = {path: leaf for path, leaf in flat.items() if path not in moving}
    return tree.unflatten(moving), tree.unflatten(still)


def join_trainable(moving: Params, still: Params) -> Params:
    """The whole tree from the two parts of `split_trainable`."""
    return tree.unflatten({**tree.flatten(moving), **tree.flatten(still)})


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    is_trainable: Callable[[str], bool] = lambda path: True,
) -> TrainState:
    """State before the first step, replicated over the mesh. `params` is copied: it outlives the donated state."""
    params = replicate(params, mesh)
    moving, _ = split_trainable(params, is_trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=jax.NamedSharding(mesh, jax.P()))(moving)
    return TrainState(params, opt_state, replicate(jnp.zeros((), jnp.int32), mesh))


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Mean softmax cross-entropy in nats.

    Args:
        logits: float32[N, C].
        labels: int32[N].
        label_smoothing: Share of the target spread evenly over all C classes.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    on_label = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    even = jnp.mean(log_probabilities, axis=-1)
    return -jnp.mean((1.0 - label_smoothing) * on_label + label_smoothing * even)


def mix_images(key: jax.Array, batch: Batch, alpha: float) -> tuple[dict, jax.Array, jax.Array]:
    """Every image mixed with another one of its batch.

    Shapes:
        result: the batch, int32[N] labels of the others, float32[] the share that each image keeps of itself.

    Raises:
        DataError: the batch has no images; token ids cannot be mixed.
    """
    if "image" not in batch:
        raise DataError(f"mixup mixes images, the batch has: {', '.join(batch)}. Use label_smoothing for texts.")
    images, labels = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
    share = jax.random.beta(named_key(key, "share"), alpha, alpha)
    order = jax.random.permutation(named_key(key, "order"), len(labels))
    kept = share.astype(images.dtype)
    return {**batch, "image": kept * images + (1 - kept) * images[order]}, labels[order], share


def make_train_step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    key: jax.Array,
    *,
    embeddings: jax.Array | None = None,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    is_trainable: Callable[[str], bool] = lambda path: True,
) -> TrainStep:
    """Compiles one step: loss of a batch, gradient of the trainable leaves, update, new statistics.

    The batch is cut along its first axis over the mesh, everything else is replicated; means, batch statistics
    included, are over the whole batch, so the number of devices does not change the result beyond rounding.

    Args:
        forward: The model in training mode.
        optimizer: Sees the trainable leaves only.
        mesh: Of `make_mesh`.
        key: Source of the model's random bits; step `s` uses `fold_in(key, s)`, so a resumed run draws the same.
        embeddings: float32[C, D], the frozen read-out of D features; None where the outputs are logits.
        label_smoothing: Share of the target spread evenly over the classes.
        mixup: α of Beta(α, α), from which each step draws the share that every image, and its label, keeps of itself;
            the rest is another image of the batch. 0: none. Images only.
        is_trainable: Path of a leaf of `state.params` -> whether the optimiser moves it.

    Returns:
        `step(state, frozen, batch) -> (state, metrics)`. `frozen` is handed to `forward` unchanged. `metrics` are
        float32[]: "loss", "accuracy" and "grad_norm", of the parameters before the update.

    Raises:
        ConfigError: `label_smoothing` outside [0, 1), or `mixup` below 0.

    Reference:
        Zhang et al. 2018, arXiv:1710.09412 (mixup).
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1.")
    if not 0 <= mixup < np.inf:
        raise ConfigError(f"mixup is {mixup}; it must be at least 0.")

    def step(state, frozen, batch):
        moving, still = split_trainable(state.params, is_trainable)
        step_key = jax.random.fold_in(key, state.step)
        others, share = None, 1.0
        if mixup:
            batch, others, share = mix_images(named_key(step_key, "mixup"), batch, mixup)

        def loss_of(moving):
            outputs, params = forward(join_trainable(moving, still), frozen, batch, step_key)
            logits = outputs if embeddings is None else read_out(outputs, embeddings)
            loss = cross_entropy(logits, batch["label"], label_smoothing)
            if others is not None:
                loss = share * loss + (1 - share) * cross_entropy(logits, others, label_smoothing)
            return loss, (logits, params)

        (loss, (logits, params)), gradient = jax.value_and_grad(loss_of, has_aux=True)(moving)
        updates, opt_state = optimizer.update(gradient, state.opt_state, moving)
        _, statistics = split_trainable(params, is_trainable)
        next_params = join_trainable(optax.apply_updates(moving, updates), statistics)
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean((jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)),
            "grad_norm": optax.tree.norm(gradient),
        }
        return TrainState(next_params, opt_state, state.step + 1), metrics

    everywhere, cut = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    return jax.jit(
        step, donate_argnums=0, in_shardings=(everywhere, everywhere, cut), out_shardings=(everywhere, everywhere)
    )
