"""Trains arrays on a sample: whole weights, some of their coordinates, the logits of a mask.

One update is one compiled program for an objective, an optimiser and an architecture, whatever is trained; the order of
the examples is a function of the seed and the step, and the whole state can be kept, so that a run that is killed and
started again gives the bits of one that was not.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.errors import ConfigError, DataError, NonFiniteError
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.sample import Sample, example_losses, weighted_mean
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.optimizer import make_optimizer, make_schedule
from jaxtune.train.same_run import check_settings, own_states
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params

SAVE_EVERY = 100  # steps between two states that are kept

# (forward, what is trained, fixed arrays, batch, key) -> float32[]; pure and hashable.
Objective = Callable[[Callable[..., jax.Array], Any, Any, Mapping[str, Any], jax.Array], jax.Array]


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, and by which optimiser; hashable.

    Attributes:
        num_steps: Updates.
        learning_rate: The peak.
        batch_size: Examples of one update, at most the whole sample.
        optimizer, weight_decay, clip_norm, momentum: Of `train.optimizer.make_optimizer`.
        schedule, num_warmup_steps: Of `train.optimizer.make_schedule`.
    """

    num_steps: int = 200
    learning_rate: float = 3e-4
    batch_size: int = 32
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    momentum: float = 0.9
    schedule: str = "cosine"
    num_warmup_steps: int = 0

    def __post_init__(self):
        if self.num_steps < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"num_steps is {self.num_steps}, batch_size {self.batch_size}, learning_rate {self.learning_rate}; "
                "all must be positive."
            )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["numbers", "opt_state", "step", "losses", "scores", "best", "best_step"],
    meta_fields=[],
)
@dataclass(frozen=True)
class FitState:
    """Everything that a step changes; what `StateSeries` keeps.

    Shapes:
        losses: float32[num_steps], NaN where a step is still to come; scores: float32[1 + rounds], likewise.
        step, best_step: int32[].
    """

    numbers: Any
    opt_state: Any
    step: Any
    losses: Any
    scores: Any
    best: Any
    best_step: Any


@dataclass(frozen=True)
class Fitted:
    """What `fit` found.

    Attributes:
        numbers: The best by `score`, the last where there is none.
        losses: Of every step.
        scores: Of the start and of every round; empty without `score`.
        step: At which `numbers` stood.
    """

    numbers: Any
    losses: list[float]
    scores: list[float]
    step: int


@own_states()
def fit(
    objective: Objective,
    start: Mapping[str, Any],
    fixed: Any,
    sample: Sample,
    *,
    recipe: Recipe,
    score: Callable[[Any], float] | None = None,
    score_every: int | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Fitted:
    """Minimises `objective` over the arrays `start`.

    Args:
        objective: Of a batch.
        start: {path: floats}.
        fixed: Any pytree of arrays that the objective reads besides.
        sample: Examples; every epoch has an order of its own.
        recipe: How.
        score: (numbers) -> the higher the better; asked for of the start and every `score_every` steps. The best
            numbers are kept, the first of equals.
        score_every: None: once an epoch.
        seed: Of the order and of the objective's keys.
        series: Where states are kept, and found.

    Raises:
        DataError: the sample is empty.
        ConfigError: a number out of range, or the series belongs to a run with other numbers.
        NonFiniteError: the loss is NaN or infinite.
        CheckpointError: `series` belongs to another model or optimiser.
    """
    if not len(sample):
        raise DataError(f"{sample.name}: there are no examples.")
    if score_every is not None and score_every < 1:
        raise ConfigError(f"score_every is {score_every}; it must be at least 1.")
    optimizer, size = _optimizer(recipe), min(recipe.batch_size, len(sample))
    every = (score_every or len(sample) // size) if score is not None else recipe.num_steps + 1
    numbers, fixed = jax.tree.map(jnp.asarray, (start, fixed))
    state = FitState(
        numbers, optimizer.init(unflatten(numbers)), jnp.asarray(0, jnp.int32),
        jnp.full(recipe.num_steps, jnp.nan), jnp.full(1 + recipe.num_steps // every, jnp.nan),
        numbers, jnp.asarray(0, jnp.int32),
    )  # fmt: skip
    settings = {**asdict(recipe), "score_every": every, "seed": seed, "num_examples": len(sample)}
    if series is not None and series.latest_step is not None:
        state, saved = series.restore(state)
        check_settings(settings, saved)
    step, best, best_step = int(state.step), state.best, int(state.best_step)
    losses, scores = np.array(state.losses), np.array(state.scores)
    numbers, opt_state = state.numbers, state.opt_state
    if score is not None and step == 0:
        scores[0] = score(numbers)
    key = named_key(jax.random.key(seed), "fit")
    while step < recipe.num_steps:
        batch = _batch(sample, size, seed, step)
        numbers, opt_state, loss = _update(
            objective, sample.forward, optimizer, numbers, opt_state, fixed, batch, jax.random.fold_in(key, step)
        )
        losses[step] = float(loss)
        if not np.isfinite(losses[step]):
            raise NonFiniteError(
                f"{sample.name}, step {step}: the loss is {losses[step]}. Lower the learning rate, "
                f"{recipe.learning_rate} now."
            )
        step += 1
        if score is not None and step % every == 0:
            scores[step // every] = score(numbers)
            if scores[step // every] > np.nanmax(scores[: step // every], initial=-np.inf):
                best, best_step = numbers, step
        if series is not None and (step % SAVE_EVERY == 0 or step == recipe.num_steps):
            kept = FitState(numbers, opt_state, np.int32(step), losses, scores, best, np.int32(best_step))
            series.save(jax.tree.map(jnp.asarray, kept), settings)
    chosen = (best, best_step) if score is not None else (numbers, step)
    return Fitted(chosen[0], losses.tolist(), scores[np.isfinite(scores)].tolist(), chosen[1])


def supervised(forward: Any, numbers: Any, fixed: Any, batch: Mapping[str, Any], key: jax.Array) -> jax.Array:
    """Cross-entropy of the network whose trained leaves are `numbers` and whose other leaves are `fixed`."""
    del key
    return weighted_mean(example_losses(forward(join(numbers, fixed), batch), batch), batch)


def split(params: Params, sample: Sample) -> tuple[dict[str, Any], dict[str, Any]]:
    """({path: leaf} that gradients move, in float32, {path: leaf} of the rest); `join` undoes it.

    Integers, running statistics, and whatever else the family says, stay still.
    """
    config = getattr(sample.forward, "config", None)
    flat = flatten(params)
    moving = {
        path: jnp.asarray(leaf).astype(jnp.float32)
        for path, leaf in flat.items()
        if is_float(leaf) and (config is None or registry.is_trainable(config, path))
    }
    return moving, {path: leaf for path, leaf in flat.items() if path not in moving}


def join(moving: Mapping[str, Any], still: Mapping[str, Any]) -> dict[str, Any]:
    """The whole tree of the two parts of `split`."""
    return unflatten({**moving, **still})


def narrow(flat: Mapping[str, Any], like: Params) -> dict[str, Any]:
    """A whole tree of {path: leaf} on the host, rounded once to the dtypes of `like`."""
    return unflatten({path: np.asarray(flat[path]).astype(leaf.dtype) for path, leaf in flatten(like).items()})


def check_labelled(sample: Sample, what: str) -> None:
    """Raises `DataError` where a sample has no examples or no labels."""
    if not len(sample) or not sample.is_labelled:
        raise DataError(f"{sample.name}: {what} needs labelled examples, and here are none.")


def _batch(sample, size, seed, step):
    """Examples of one step: a function of seed and step."""
    epoch, number = divmod(step, len(sample) // size)
    order = np.random.RandomState([seed & 0xFFFFFFFF, epoch]).permutation(len(sample))  # a frozen stream
    indices = order[number * size : (number + 1) * size]
    return {name: values[indices] for name, values in sample.batch.items()}


@cache
def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    rate = make_schedule(
        recipe.learning_rate, recipe.num_steps, schedule=recipe.schedule, num_warmup_steps=recipe.num_warmup_steps
    )
    return make_optimizer(
        rate,
        name=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        momentum=recipe.momentum,
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _update(objective, forward, optimizer, numbers, opt_state, fixed, batch, key):
    """(numbers, optimiser's state, loss before) of one step."""
    loss, gradient = jax.value_and_grad(lambda numbers: objective(forward, numbers, fixed, batch, key))(numbers)
    updates, opt_state = optimizer.update(unflatten(gradient), opt_state, unflatten(numbers))
    return optax.apply_updates(numbers, flatten(updates)), opt_state, loss
