"""AdamW on a few examples: several learning rates one after the other, and what held-out examples say is best.

Steps run in compiled chunks. A run that is killed goes on from its last state and ends with the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.errors import ConfigError, NonFiniteError
from jaxtune.gradients import Loss
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.teach.judging import CHANGING, LEAVING, add_gains, each_loss, find_gain
from jaxtune.teach.order import Order
from jaxtune.teach.weights import Learnable
from jaxtune.train.same_run import check_settings, own_states
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params

ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
SAVE_EVERY = 5  # rounds


class Series(Protocol):
    """Where states are kept; `train.checkpoints.StateSeries` is one."""

    @property
    def latest_step(self) -> int | None:
        """Step of the newest state; None where there is none."""

    def save(self, state: Any, progress: Mapping[str, Any]) -> None:
        """Keeps a state."""

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, and what was beside it."""


@dataclass(frozen=True)
class Aim:
    """What is minimised: hashable, so that one program serves all samples and rates.

    Attributes:
        loss: Of every example of the task.
        keep: Of every example of the support set; None without one.
        protect: Factor of the mean of `keep`.
        anchor: Factor of `||params - base||² / 2`.
        weight_decay: Decoupled; of every number that is learned.
    """

    loss: Loss
    keep: Loss | None = None
    protect: float = 1.0
    anchor: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self):
        for name in ("protect", "anchor", "weight_decay"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; it must be finite and at least 0.")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "numbers",
        "opt_state",
        "step",
        "best",
        "best_score",
        "best_each",
        "best_kept",
        "best_step",
        "scores",
        "losses",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class DescentState:
    """Everything that steps change; what a `Series` keeps.

    Shapes:
        step, best_step: int32[]. Steps of all learning rates together.
        best_each, best_kept: float32[held], at least 1. The loss of every held-out example where the numbers were best,
            of the task and of the support set.
        scores: float32[R, 1 + rounds] of held-out examples, NaN where a round is still to come or none are held.
        losses: float32[R, rounds]. Mean of the loss over the steps of a round.
    """

    numbers: Any
    opt_state: Any
    step: Any
    best: Any
    best_score: Any
    best_each: Any
    best_kept: Any
    best_step: Any
    scores: Any
    losses: Any


@own_states()
def descend(
    learnable: Learnable,
    aim: Aim,
    sample: Sample,
    *,
    key: jax.Array,
    num_steps: int,
    batch_size: int,
    learning_rates: Sequence[float],
    round_size: int = 10,
    held: Sample | None = None,
    support: Sample | None = None,
    held_support: Sample | None = None,
    base: Params | None = None,
    margin: float = 0.0,
    errors: float = LEAVING,
    schedule_steps: int | None = None,
    series: Series | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Learns the numbers of `learnable`, once with each learning rate, and gives the network that was best.

    The rate rises over a tenth of the steps and falls as a cosine to a twentieth. Every `round_size` steps the held-out
    examples are asked; the best numbers of all rounds and rates are kept, the start among them, so that the result is
    never behind the start on them. What leaves the start, and what a higher rate makes, is further from where the
    network was, so it must be better by more than `errors` or `CHANGING` standard errors of the difference. Without
    held-out examples the end of the last rate is the result: give one rate.

    Args:
        learnable: What is learned.
        aim: What is minimised.
        sample: To learn on.
        key: Of the order of the examples.
        num_steps: Updates with each rate.
        batch_size: Examples a step; at most all of them.
        learning_rates: One or more, in ascending order.
        round_size: Steps between two looks at the held-out examples.
        held, held_support: What the choice is made by.
        support: What `aim.keep` is of.
        base: What `aim.anchor` holds on to.
        margin: What leaving the start must bring at least, as the mean of `exp(-loss)` of the held-out examples.
        errors: And by more than so many standard errors of that.
        schedule_steps: Steps of the schedule, where fewer of them are taken; None: `num_steps`.
        series: Where states are kept; one that has some is gone on from.

    Returns:
        (parameters in float32, {"learning_rate", "step", "score", "scores", "losses"}: of the choice, and all that was
        seen on the way).

    Raises:
        ConfigError: a number out of range, or the series belongs to a run with other numbers.
        NonFiniteError: nothing that was learned is finite.
    """
    rates = [float(rate) for rate in learning_rates]
    if not 0 <= margin < 1:
        raise ConfigError(f"margin is {margin}; it must be at least 0 and below 1.")
    if min(num_steps, batch_size, round_size) < 1 or not rates or not all(np.isfinite(r) and r > 0 for r in rates):
        raise ConfigError(
            f"num_steps {num_steps}, batch_size {batch_size}, round_size {round_size}, learning rates {rates}: "
            "all must be positive."
        )
    if schedule_steps is not None and schedule_steps < num_steps:
        raise ConfigError(f"a schedule of {schedule_steps} steps is shorter than the {num_steps} to take of it.")
    if held is None and len(rates) > 1:
        raise ConfigError(f"{sample.name}: to choose among {len(rates)} learning rates, examples must be held out.")
    orders = {
        "task": Order(sample, batch_size, named_key(key, "task")),
        "support": None if support is None else Order(support, batch_size, named_key(key, "support")),
    }
    base = None if base is None or not aim.anchor else _floats(base)
    leaving = (margin, errors)
    num_rounds = -(-num_steps // round_size)
    counts = (0 if one is None else len(one) for one in (held, held_support))
    state = _first_state(learnable, len(rates), num_rounds, *counts)
    settings = {
        "num_steps": num_steps, "batch_size": batch_size, "round_size": round_size, "learning_rates": rates,
        "num_examples": len(sample), "margin": margin, "errors": errors, "schedule_steps": schedule_steps,
    }  # fmt: skip
    if series is not None and series.latest_step is not None:
        state, saved = series.restore(state)
        check_settings(settings, saved)
    place = partial(_place, num_steps=num_steps, round_size=round_size)
    while int(state.step) < num_steps * len(rates):
        run, done = divmod(int(state.step), num_steps)
        if not done:
            state = replace(state, numbers=learnable.numbers, opt_state=ADAM.init(learnable.numbers))
            if not run:
                state = _judge(state, learnable, aim, held, held_support, place(0), num_steps, leaving)
        count = min(round_size, num_steps - done)
        batches = {name: order and order.batches(done, count) for name, order in orders.items()}
        numbers, opt_state, losses = _steps(
            aim, learnable.build, learnable.fixed, base, state.numbers, state.opt_state, batches,
            jnp.asarray(_schedule(rates[run], schedule_steps or num_steps)[done : done + count]),
        )  # fmt: skip
        at = (run, -(-(done + count) // round_size))
        state = replace(
            state, numbers=numbers, opt_state=opt_state, step=state.step + count,
            losses=state.losses.at[run, at[1] - 1].set(jnp.mean(losses)),
        )  # fmt: skip
        state = _judge(state, learnable, aim, held, held_support, at, num_steps, leaving)
        is_last = int(state.step) == num_steps * len(rates)
        if series is not None and (is_last or at[1] % SAVE_EVERY == 0):
            series.save(state, settings)
    return _result(state, learnable, aim, held, rates, num_steps)


def round_to(params: Params, like: Params) -> dict[str, Any]:
    """Float leaves rounded once to the dtypes of `like`, whose other leaves are kept; on the host."""
    found = flatten(params)
    return unflatten(
        {
            path: np.asarray(found[path]).astype(leaf.dtype) if is_float(leaf) else leaf
            for path, leaf in flatten(like).items()
        }
    )


def _first_state(learnable, num_rates, num_rounds, num_held, num_kept):
    def nans(*shape):
        return jnp.full(shape, jnp.nan, jnp.float32)

    return DescentState(
        numbers=learnable.numbers, opt_state=ADAM.init(learnable.numbers), step=jnp.zeros((), jnp.int32),
        best=learnable.numbers, best_score=jnp.asarray(jnp.inf, jnp.float32), best_step=jnp.zeros((), jnp.int32),
        best_each=jnp.full(max(num_held, 1), jnp.inf, jnp.float32),  # orbax keeps no empty array
        best_kept=jnp.full(max(num_kept, 1), jnp.inf, jnp.float32),
        scores=nans(num_rates, 1 + num_rounds), losses=nans(num_rates, num_rounds),
    )  # fmt: skip


def _place(step, *, num_steps, round_size):
    run, done = divmod(step, num_steps)
    return run, -(-done // round_size)


def _judge(state, learnable, aim, held, held_support, at, num_steps, leaving):
    """The state after a look at the held-out examples; nothing changes where there are none."""
    if held is None:
        return state
    ask = partial(each_loss, numbers=state.numbers, build=learnable.build, fixed=learnable.fixed)
    each, kept = ask(aim.loss, held), np.zeros(1)
    if held_support is not None and aim.keep is not None:
        kept = ask(aim.keep, held_support)
    score = float(np.mean(each)) + aim.protect * float(np.mean(kept))
    state = replace(state, scores=state.scores.at[at].set(score))
    best_step = int(state.best_step)
    is_of_this_rate = best_step and (best_step - 1) // num_steps == at[0]
    if np.isfinite(state.best_score) and not is_of_this_rate:
        margin, errors = (0.0, CHANGING) if best_step else leaving
        seen = [find_gain(state.best_each, each)]
        if not best_step and len(kept) > 1:  # what brings the task nothing may still give back what the base could do
            seen.append(add_gains(seen[0], find_gain(state.best_kept, kept), aim.protect))
        if not any(gain > max(margin, errors * error) for gain, error in seen):
            return state
    if not score < float(state.best_score):  # NaN is never better
        return state
    return replace(
        state, best=state.numbers, best_score=jnp.asarray(score, jnp.float32), best_step=jnp.asarray(state.step),
        best_each=jnp.asarray(each, jnp.float32), best_kept=jnp.asarray(kept, jnp.float32),
    )  # fmt: skip


@partial(jax.jit, static_argnames=("aim", "build"))
def _steps(aim, build, fixed, base, numbers, opt_state, batches, rates):
    def step(carry, given):
        numbers, opt_state = carry
        batch, kept, rate = given

        def objective(numbers):
            params = build(fixed, numbers)
            loss = total = jnp.mean(aim.loss(params, batch))
            if kept is not None:
                total += aim.protect * jnp.mean(aim.keep(params, kept))
            if base is not None:
                leaves = flatten(params)
                total += aim.anchor / 2 * sum(jnp.sum(jnp.square(leaves[path] - leaf)) for path, leaf in base.items())
            return total, loss

        gradient, loss = jax.grad(objective, has_aux=True)(numbers)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an int32 step count
            updates, opt_state = ADAM.update(gradient, opt_state, numbers)
        numbers = jax.tree.map(lambda x, u: x - rate * (u + aim.weight_decay * x), numbers, updates)
        return (numbers, opt_state), loss

    given = (batches["task"], batches["support"], rates)
    (numbers, opt_state), losses = jax.lax.scan(step, (numbers, opt_state), given)
    return numbers, opt_state, losses


def _schedule(rate, num_steps):
    """float32[num_steps]: a warm-up over a tenth, then a cosine to a twentieth."""
    steps, warm = np.arange(num_steps), max(1, num_steps // 10)
    fall = 0.05 + 0.95 * (1 + np.cos(np.pi * (steps - warm) / max(1, num_steps - warm))) / 2
    return (rate * np.where(steps < warm, (steps + 1) / warm, fall)).astype(np.float32)


def _result(state, learnable, aim, held, rates, num_steps):
    step = int(state.best_step) if held is not None else int(state.step)
    params = _build(learnable.build, learnable.fixed, state.best if held is not None else state.numbers)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise NonFiniteError(f"learning diverged with learning rates {rates}. Lower them.")
    run = max(0, step - 1) // num_steps
    info = {
        "learning_rate": rates[run],
        "step": step - run * num_steps,
        "score": float(state.best_score) if held is not None else None,
        "scores": [[float(x) for x in row if np.isfinite(x)] for row in np.asarray(state.scores)],
        "losses": [[float(x) for x in row] for row in np.asarray(state.losses)],
        "num_held": 0 if held is None else len(held),
    }
    return params, info


@partial(jax.jit, static_argnames="build")
def _build(build, fixed, numbers):
    return build(fixed, numbers)


def _floats(params):
    return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in flatten(params).items() if is_float(leaf)}
