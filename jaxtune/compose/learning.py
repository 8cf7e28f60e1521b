"""Learns the few numbers that a composition depends on, by gradients through the networks that they make.

One step: the numbers make a network, every task gives the gradient of its loss at that network's weights, their sum
is pulled back to the numbers. The backward pass through a network is one compiled program for a task and an objective,
whatever is learned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.compose.objectives import Objective
from jaxtune.errors import ConfigError, NonFiniteError
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import check_settings, own_states
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params

SAVE_EVERY = 100  # steps between two states that are kept

# (fixed arrays, learned numbers) -> float32 params; hashable.
Build = Callable[[Any, Any], Params]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["numbers", "own", "opt_state", "step", "losses", "scores", "best", "best_own", "best_score"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LearnState:
    """Everything that a step changes; what `StateSeries` keeps.

    Shapes:
        losses: float32[num_steps, T]. NaN where a step is still to come.
        scores: float32[1 + num_rounds]. Likewise; the first is that of the start.
        step, best_score: int32[], float32[].
    """

    numbers: Any
    own: Any
    opt_state: Any
    step: Any
    losses: Any
    scores: Any
    best: Any
    best_own: Any
    best_score: Any


@dataclass(frozen=True)
class Learned:
    """What `learn` found.

    Attributes:
        numbers: The best by `score`, the last where there is none.
        own: Likewise, leaves of each task's own: path -> [T, ...].
        history: "loss": of every step done, one a task; "score": of the start and of every round.
        step: At which `numbers` stood.
    """

    numbers: Any
    own: dict[str, jax.Array]
    history: dict[str, Any]
    step: int


@own_states()
def learn(
    build: Build,
    fixed: Any,
    start: Any,
    samples: Sequence[Sample],
    *,
    objective: Objective,
    num_steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    schedule: str = "constant",
    batch_size: int = 16,
    task_weights: Sequence[float] | None = None,
    own: Mapping[str, jax.Array] | None = None,
    penalty: Callable[[Any], jax.Array] | None = None,
    score: Callable[[Params, list[Params] | None], float | None] | None = None,
    score_every: int | None = None,
    transform: Callable[[Any, jax.Array], Any] | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Learned:
    """Minimises `Σ_t w_t objective_t(build(fixed, numbers)) + penalty(numbers)` with AdamW.

    Args:
        build, fixed: What the numbers mean.
        start: Their first values, any pytree of float32.
        samples: One a task.
        objective: Of every task.
        num_steps: Updates.
        learning_rate, weight_decay, clip_norm: Of AdamW, as optax has it; weight decay touches every number.
        schedule: "constant", or "cosine" down to 0.
        batch_size: Examples of each task a step; each epoch of a task has an order of its own.
        task_weights: w, 1 without it.
        own: Leaves that every task has for itself, and learns too: path -> [T, ...].
        penalty: Hashable.
        score: (params, one model a task where `own` is given) -> the higher the better, None ends the search there;
            asked for of the start, every `score_every` steps and at the end. The best numbers are kept, the first of
            equals, so that the result is never behind the start.
        transform: (numbers, key) -> the numbers that a step goes by (dropout), hashable.
        seed: Of the order of the examples and of `transform`.
        series: Where states are kept; a run that finds one goes on from it, and gives the bits of one that was never
            interrupted.

    Raises:
        ConfigError: a number out of range, or the series belongs to a run with other numbers.
        NonFiniteError: the loss is NaN or infinite.
    """
    if score_every is not None and score_every < 1:
        raise ConfigError(f"score_every is {score_every}; it must be at least 1.")
    if num_steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise ConfigError(
            f"num_steps is {num_steps}, batch_size {batch_size}, learning_rate {learning_rate}; all must be positive."
        )
    optimizer = _optimizer(learning_rate, weight_decay, clip_norm, schedule, num_steps)
    weights = [1.0] * len(samples) if task_weights is None else list(task_weights)
    fixed = jax.tree.map(jnp.asarray, fixed)
    numbers, own = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (start, dict(own or {})))
    score_every = min(score_every or num_steps, num_steps)
    num_rounds = -(-num_steps // score_every) if score is not None else 0
    state = LearnState(
        numbers=numbers, own=own, opt_state=optimizer.init((numbers, own)), step=jnp.asarray(0, jnp.int32),
        losses=np.full((num_steps, len(samples)), np.nan, np.float32),
        scores=np.full(1 + num_rounds, np.nan, np.float32),
        best=numbers, best_own=own, best_score=np.asarray(-np.inf, np.float32),
    )  # fmt: skip
    state = jax.tree.map(jnp.asarray, state)
    settings = {
        "num_steps": num_steps, "learning_rate": float(learning_rate), "weight_decay": float(weight_decay),
        "clip_norm": clip_norm, "schedule": schedule, "batch_size": batch_size, "score_every": score_every,
        "task_weights": [float(w) for w in weights], "seed": seed, "num_examples": [len(sample) for sample in samples],
    }  # fmt: skip
    if series is not None and series.latest_step is not None:
        state, saved = series.restore(state)
        check_settings(settings, saved)
    losses, scores = np.array(state.losses), np.array(state.scores)
    numbers, own, opt_state = state.numbers, state.own, state.opt_state
    best, best_own, best_score = state.best, state.best_own, float(state.best_score)
    if score is not None and int(state.step) == 0:
        shared = _build(build, fixed, numbers)
        value = score(shared, models_of(shared, own))
        best_score = scores[0] = -np.inf if value is None else float(np.float32(value))
    orders = [_Order(sample, batch_size, seed, n) for n, sample in enumerate(samples)]
    key, step, is_over = named_key(jax.random.key(seed), "learn"), int(state.step), False
    while step < num_steps and not is_over:
        used = numbers if transform is None else _transform(transform, numbers, named_key(key, step))
        shared = _build(build, fixed, used)
        total, own_gradients, found = None, [], []
        for n, (sample, order) in enumerate(zip(samples, orders, strict=True)):
            batch = order.batch(step)
            loss, gradient = _gradient(sample.forward, objective, shared, own, n, batch)
            found.append(loss)
            total, mine = _accumulate(total, gradient, own, weights[n])
            own_gradients.append(mine)
        gradient = _pull_back(build, transform, penalty, fixed, numbers, named_key(key, step), total)
        own_gradient = {path: jnp.stack([mine[path] for mine in own_gradients]) for path in own}
        numbers, own, opt_state = _update(optimizer, (numbers, own), (gradient, own_gradient), opt_state)
        losses[step] = [float(loss) for loss in found]
        if not np.isfinite(losses[step]).all():
            raise NonFiniteError(
                f"step {step}: losses {losses[step].tolist()}. Lower the learning rate, {learning_rate} now."
            )
        step += 1
        if num_rounds and (step % score_every == 0 or step == num_steps):
            shared = _build(build, fixed, numbers)
            value = score(shared, models_of(shared, own))
            is_over = value is None
            if not is_over:
                value = float(np.float32(value))  # as states keep it
                scores[-(-step // score_every)] = value
                if value > best_score:
                    best, best_own, best_score = numbers, own, value
        if series is not None and (step % SAVE_EVERY == 0 or step == num_steps or is_over):
            state = LearnState(
                numbers, own, opt_state, np.int32(num_steps if is_over else step), losses, scores, best, best_own,
                np.float32(best_score),
            )  # fmt: skip
            series.save(jax.tree.map(jnp.asarray, state), settings)
    done = int(np.isfinite(losses[:, 0]).sum())
    chosen = done
    if score is not None:
        numbers, own = best, best_own
        chosen = min(int(np.nanargmax(scores)) * score_every, num_steps)
    history = {"loss": losses[:done].tolist(), "score": [float(x) for x in scores if np.isfinite(x)]}
    return Learned(numbers, own, history, chosen)


def models_of(shared: Params, own: Mapping[str, jax.Array]) -> list[Params] | None:
    """One model a task; None where all have the same."""
    if not own:
        return None
    count = len(next(iter(own.values())))
    return [_place(shared, own, n) for n in range(count)]


def realise(build: Build, fixed: Any, numbers: Any) -> dict[str, Any]:
    """The network of some numbers, in float32."""
    return _build(build, jax.tree.map(jnp.asarray, fixed), numbers)


class _Order:
    """Which examples a task gives at a step: a function of the seed and the step alone."""

    def __init__(self, sample: Sample, batch_size: int, seed: int, task: int):
        self._sample, self._size = sample, min(batch_size, len(sample))
        self._seed, self._task = seed, task
        self._permutation = cache(self._permute)

    def _permute(self, epoch):
        seeds = np.array([self._seed & 0xFFFFFFFF, self._task, epoch], np.uint32)
        return np.random.RandomState(seeds).permutation(len(self._sample))

    def batch(self, step):
        count = len(self._sample)
        places = step * self._size + np.arange(self._size)
        rows = np.array([self._permutation(int(place // count))[place % count] for place in places])
        return {name: values[rows] for name, values in self._sample.batch.items()}


@partial(jax.jit, static_argnames="build")
def _build(build, fixed, numbers):
    return build(fixed, numbers)


@partial(jax.jit, static_argnames="transform")
def _transform(transform, numbers, key):
    return transform(numbers, key)


@partial(jax.jit, static_argnames=("forward", "objective"))
def _gradient(forward, objective, shared, own, task, batch):
    """(loss, {path: gradient}) of the float leaves."""
    flat = flatten(_place(shared, own, task))
    floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}

    def loss_of(floats):
        return objective(forward, unflatten({**flat, **floats}), batch)

    return jax.value_and_grad(loss_of)(floats)


def _place(shared, own, task):
    """The shared network with one task's own leaves."""
    flat = flatten(shared)
    return unflatten({path: own[path][task] if path in own else leaf for path, leaf in flat.items()})


def _accumulate(total, gradient, own, weight):
    """(sum of gradients of what is shared, that of the task's own leaves)."""
    mine = {path: weight * gradient[path] for path in own}
    shared = {path: jnp.zeros_like(leaf) if path in own else leaf for path, leaf in gradient.items()}
    return _add(total, shared, weight), mine


def _add(total, more, weight):
    return _first(more, weight) if total is None else _next(total, more, weight)


@jax.jit
def _first(more, weight):
    return jax.tree.map(lambda x: weight * x, more)


@jax.jit
def _next(total, more, weight):
    return jax.tree.map(lambda x, y: x + weight * y, total, more)


@partial(jax.jit, static_argnames=("build", "transform", "penalty"))
def _pull_back(build, transform, penalty, fixed, numbers, key, gradient):
    def make(numbers):
        made = flatten(build(fixed, numbers if transform is None else transform(numbers, key)))
        return {path: made[path] for path in gradient}

    _, pull = jax.vjp(make, numbers)
    (found,) = pull(gradient)
    if penalty is not None:
        found = jax.tree.map(jnp.add, found, jax.grad(penalty)(numbers))
    return found


@cache
def _optimizer(learning_rate, weight_decay, clip_norm, schedule, num_steps):
    if schedule not in ("constant", "cosine"):
        raise ConfigError(f"schedule is {schedule!r}; it must be 'constant' or 'cosine'.")
    rate = learning_rate if schedule == "constant" else optax.cosine_decay_schedule(learning_rate, num_steps)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.adamw(rate, weight_decay=weight_decay))


@partial(jax.jit, static_argnames="optimizer")
def _update(optimizer, numbers, gradient, state):
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an int32 step count
        updates, state = optimizer.update(gradient, state, numbers)
        numbers, own = optax.apply_updates(numbers, updates)
    return numbers, own, state
