"""On-policy distillation of language models: the student writes, the teacher says what it would have written."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError, DataError, unknown_name
from jaxtune.gradients import ask, check_sample, predict, widen
from jaxtune.rng import named_key
from jaxtune.sample import Batch, Sample, example_divergences
from jaxtune.teach.descent import Aim, Series, descend, round_to
from jaxtune.teach.distill import Distilled, KeepLoss, told
from jaxtune.teach.weights import whole_weights
from jaxtune.train.same_run import check_settings, own_states
from jaxtune.tree import check_finite
from jaxtune.types import Params

DIRECTIONS = ("reverse", "forward")


@partial(jax.tree_util.register_dataclass, data_fields=["params", "divergences", "step"], meta_fields=[])
@dataclass(frozen=True)
class RoundState:
    """Everything that a round changes; what a series keeps.

    Shapes:
        divergences: float32[rounds], 0 where a round is still to come.
        step: int32[], rounds done.
    """

    params: Any
    divergences: Any
    step: Any


@dataclass(frozen=True)
class ReverseLoss:
    """`KL(network ‖ teacher)`: what the student says where the teacher would not costs most."""

    forward: Any

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        return example_divergences(batch["teacher"], ask(self.forward, params, batch), batch)


@dataclass(frozen=True)
class ForwardLoss:
    """`KL(teacher ‖ network)`: what the teacher says and the student would not costs most."""

    forward: Any

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        return example_divergences(ask(self.forward, params, batch), batch["teacher"], batch)


@own_states()
def distill_on_policy(
    prompts: Sample,
    teacher: Params,
    start: Params,
    *,
    key: jax.Array | None = None,
    prompt_length: int,
    num_rounds: int = 10,
    steps_per_round: int = 5,
    batch_size: int = 16,
    learning_rate: float | None = None,
    direction: str = "reverse",
    temperature: float = 1.0,
    support: Sample | None = None,
    protect: float = 1.0,
    series: Series | None = None,
) -> Distilled:
    """Trains a student on short texts that it writes itself.

    Each round continues some of the prompts with the student as it is then, asks the teacher about every token that was
    written, and takes a few steps on that. Texts are as long as the prompts' texts are; what stood behind
    `prompt_length` is not read.

    Args:
        prompts: Texts for a language model, see `sampling.make_text_sample`; one token more than `prompt_length` at
            least.
        teacher: Of the same vocabulary.
        start: The student.
        key: Of the prompts' order and of the tokens; None: key 0.
        prompt_length: Tokens of each text that are given, at least 1.
        num_rounds: How often the student writes.
        steps_per_round: Updates on what it wrote.
        batch_size: Texts a round, at most all.
        learning_rate: Of every round; None: the middle one of `teach.weights`' rates. Adam starts afresh each round,
            with a warm-up.
        direction: "reverse": `KL(student ‖ teacher)`; "forward": `KL(teacher ‖ student)`.
        temperature: Of the student's writing; 0 writes the first token always.
        support, protect: As in `distill`.
        series: Where states are kept, one a round; a run that was killed goes on from the last and gives the same bits.

    Returns:
        `info["divergences"]`: of each round, the mean KL (in the direction asked for) on what was written, before its
        steps.

    Raises:
        UnknownNameError: no such direction.
        ConfigError: a number out of range, or the series belongs to a run with other numbers.
        DataError: the prompts are no texts for a language model, or shorter than `prompt_length`.
        NonFiniteError: a network holds NaN, or what was learned does.

    Reference:
        Agarwal et al. 2024, arXiv:2306.13649 (on-policy data; no gradient through the writing).
    """
    if direction not in DIRECTIONS:
        raise unknown_name("direction", direction, DIRECTIONS)
    if min(prompt_length, num_rounds, steps_per_round, batch_size) < 1 or not temperature >= 0:
        raise ConfigError(
            f"prompt_length {prompt_length}, num_rounds {num_rounds}, steps_per_round {steps_per_round}, batch_size "
            f"{batch_size} must be at least 1, and temperature {temperature} at least 0."
        )
    if "text" not in prompts.batch or "valid" not in prompts.batch:
        raise DataError(f"{prompts.name}: prompts are texts for a language model, see sampling.make_text_sample.")
    length = prompts.batch["text"].shape[1]
    if prompt_length >= length:
        raise DataError(f"{prompts.name}: texts of {length} tokens leave nothing to write behind {prompt_length}.")
    if not prompts.batch["mask"][:, :prompt_length].all():
        raise DataError(f"{prompts.name}: a text is shorter than prompt_length {prompt_length}.")
    check_sample(prompts, start, is_labelled=False)
    for name, params in (("the teacher", teacher), ("start", start)):
        check_finite(name, params)
    key = jax.random.key(0) if key is None else key
    keep = kept = None
    if support is not None:
        check_sample(support, start, is_labelled=support.is_labelled)
        keep, kept = KeepLoss(support.forward, support.is_labelled), told(support, start)
    loss = (ReverseLoss if direction == "reverse" else ForwardLoss)(prompts.forward)
    rate = whole_weights(start).rates[1] if learning_rate is None else learning_rate
    settings = {
        "prompt_length": prompt_length, "num_rounds": num_rounds, "steps_per_round": steps_per_round,
        "batch_size": batch_size, "learning_rate": float(rate), "direction": direction,
        "temperature": float(temperature), "num_examples": len(prompts),
    }  # fmt: skip
    params, divergences, first = jax.tree.map(widen, start), np.zeros(num_rounds, np.float32), 0
    if series is not None and series.latest_step is not None:
        like = RoundState(params, divergences, np.int32(0))
        state, saved = series.restore(jax.tree.map(jnp.asarray, like))
        check_settings(settings, saved)
        params, divergences, first = state.params, np.array(state.divergences), int(state.step)
    for n in range(first, num_rounds):
        drawn = _prompts(prompts, batch_size, named_key(key, "prompts"), n)
        written = continue_texts(
            named_key(key, "tokens", n), drawn, params, prompt_length=prompt_length, temperature=temperature
        )
        taught = replace(written, batch={**written.batch, "teacher": predict(written, teacher)})
        divergences[n] = jnp.mean(_losses(loss, params, taught.batch))
        params, _ = descend(
            whole_weights(params), Aim(loss, keep, protect), taught, key=named_key(key, "steps", n),
            num_steps=steps_per_round, batch_size=batch_size, learning_rates=[rate], round_size=steps_per_round,
            support=kept,
        )  # fmt: skip
        if series is not None:
            series.save(jax.tree.map(jnp.asarray, RoundState(params, divergences, np.int32(n + 1))), settings)
    info = {"divergences": divergences.tolist(), "learning_rate": rate, "num_examples": len(prompts)}
    return Distilled(round_to(params, start), info)


def continue_texts(
    key: jax.Array, prompts: Sample, params: Params, *, prompt_length: int, temperature: float = 1.0
) -> Sample:
    """The sample with everything behind `prompt_length` tokens written by a network; those tokens alone are valid.

    The whole text is run once for every token: for short continuations, with any family.

    Args:
        key: Of the tokens.
        prompts: Texts of one length.
        params: Of the network that writes.
        prompt_length: Tokens that are given.
        temperature: 0 takes the first token always.
    """
    text = _write(
        prompts.forward, prompt_length, temperature == 0, jax.tree.map(widen, params),
        jnp.asarray(prompts.batch["text"], jnp.int32), key, jnp.float32(temperature or 1.0),
    )  # fmt: skip
    text = np.asarray(text)
    valid = np.broadcast_to(np.arange(text.shape[1] - 1) >= prompt_length - 1, (len(text), text.shape[1] - 1))
    batch = {"text": text, "mask": np.ones(text.shape, bool), "label": text[:, 1:], "valid": valid.copy()}
    return replace(prompts, batch=batch)


@partial(jax.jit, static_argnames=("forward", "prompt_length", "is_greedy"))
def _write(forward, prompt_length, is_greedy, params, text, key, temperature):
    def add_token(text, place):
        # Later tokens are not seen: position `place - 1` reads those before it alone.
        logits = ask(forward, params, {"text": text, "mask": jnp.ones(text.shape, bool)})
        here = jnp.take(logits, place - 1, axis=1).astype(jnp.float32)
        drawn = jax.random.categorical(jax.random.fold_in(key, place), here / temperature, axis=-1)
        token = jnp.argmax(here, axis=-1) if is_greedy else drawn
        return text.at[:, place].set(token.astype(text.dtype)), None

    return jax.lax.scan(add_token, text, jnp.arange(prompt_length, text.shape[1]))[0]


@partial(jax.jit, static_argnames="loss")
def _losses(loss, params, batch):
    return loss(params, batch)


def _prompts(sample, size, key, turn):
    """`size` prompts of a round; every epoch has an order of its own."""
    size = min(size, len(sample))
    per_epoch = len(sample) // size
    order = np.asarray(jax.random.permutation(named_key(key, turn // per_epoch), len(sample)))
    at = turn % per_epoch
    return sample.take(order[at * size : (at + 1) * size])
