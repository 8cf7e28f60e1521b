"""aTLAS: a coefficient for every leaf of every task vector, learned to add tasks, to take one out, or for a new one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compose import objectives
from jaxtune.compose.composition import Composition, check_counts, check_models, check_samples
from jaxtune.compose.partition import BuildPartition, draw_parts
from jaxtune.compose.running import learn_composition, match_experts, split_samples
from jaxtune.compose.scoring import score_all
from jaxtune.compose.vectors import BuildGroups, Groups, groups_of, stack_vectors, widen
from jaxtune.errors import ConfigError, DataError, unknown_name
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.types import Params

MIN_BATCHES = 10  # of an epoch over few examples


@own_states()
def atlas(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    num_epochs: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 128,
    clip_norm: float = 1.0,
    penalty: int | None = None,
    start: float = 0.0,
    partition: int = 1,
    validation: float = 0.25,
    groups: Groups | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """Adds tasks: `θ_0 + Σ_t Σ_b c_tb τ_tb`, c learned by the sum of all tasks' cross-entropies.

    Args:
        base, finetuned, samples: As `registry.compose`; with labels.
        num_epochs: Over the largest sample.
        learning_rate, weight_decay, clip_norm: Of AdamW on the coefficients.
        batch_size: Examples a step, all tasks together.
        penalty: 1 or 2: adds half the mean of that norm of a block's coefficients; None: nothing.
        start: First value of every coefficient; 0 is the base.
        partition: K: every matrix has K coefficients a task, each for a random share of its entries.
        validation: Share of each sample that is kept for choosing and reporting; 0 learns and chooses on all.
        groups: Leaf -> name of the coefficients that it shares with others; None: each leaf its own.
        seed: Of the split, the order of the examples and the shares.
        series: As `learning.learn`.

    Returns:
        The coefficients, {path: float32[T]} (float32[T, K] with a partition), that had after some epoch the best mean
        accuracy on the validation share, each task's divided by that of its fine-tune; `info` as
        `running.learn_composition`.

    Raises:
        ConfigError, DataError, TreeMismatchError, NonFiniteError: models, samples or numbers make no sense.

    Reference:
        Zhang et al. 2024, arXiv:2407.02880. Differs: what is chosen by is not learned on (the release does both on one
        set); the start is chosen from too; with a partition, leaves that are no matrices keep one coefficient (the
        release loses them).
    """
    check_models(base, finetuned)
    check_samples(finetuned, samples, is_labelled=True)
    check_counts(num_epochs=num_epochs, batch_size=batch_size)
    learned_on, held = split_samples(samples, validation, seed)
    size = max(1, batch_size // len(samples))
    per_epoch = max(-(-len(sample) // size) for sample in learned_on)
    return learn_composition(
        base, *_blocks(base, finetuned, groups, partition, start, seed), learned_on, held,
        objective=objectives.cross_entropy, num_steps=num_epochs * per_epoch, learning_rate=learning_rate,
        weight_decay=weight_decay, clip_norm=clip_norm, batch_size=size, penalty=_penalty(penalty),
        score=match_experts(held, finetuned), score_every=per_epoch, seed=seed, series=series,
    )  # fmt: skip


@own_states()
def atlas_negation(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    control: float = 0.95,
    num_epochs: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 128,
    clip_norm: float = 1.0,
    start: float = 0.0,
    partition: int = 1,
    validation: float = 0.25,
    groups: Groups | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """Takes a task out: the loss is minus its cross-entropy, plus that of a control task.

    Args:
        base, finetuned: As `registry.compose`.
        samples: Of the task to lose, and of the control; with labels.
        control: Share of the base's accuracy on the control that must stay; the search ends where less does.
        num_epochs, learning_rate, weight_decay, batch_size, clip_norm, start, partition, validation, groups, seed,
            series: As `atlas`.

    Returns:
        The coefficients that had after some epoch the lowest accuracy on the first task with `control` kept.

    Raises:
        ConfigError: there are not two samples.
        DataError: the base knows nothing of the control.

    Reference:
        Zhang et al. 2024, arXiv:2407.02880.
    """
    check_models(base, finetuned)
    if len(samples) != 2:
        raise ConfigError(f"negation takes two samples, the task to lose and a control; got {len(samples)}.")
    check_samples(samples, samples, is_labelled=True)
    check_counts(num_epochs=num_epochs, batch_size=batch_size)
    learned_on, held = split_samples(samples, validation, seed)
    known = score_all(widen(base), held)[1]["accuracy"]
    if known == 0:
        raise DataError(f"{samples[1].name}: the base is right about none of these examples: no control.")
    size = max(1, batch_size // 2)
    per_epoch = max(-(-len(sample) // size) for sample in learned_on)

    def score(params, _):
        target, other = (one["accuracy"] for one in score_all(params, held))
        return -target if other >= control * known else None

    return learn_composition(
        base, *_blocks(base, finetuned, groups, partition, start, seed), learned_on, held,
        objective=objectives.cross_entropy, task_weights=(-1.0, 1.0), num_steps=num_epochs * per_epoch,
        learning_rate=learning_rate, weight_decay=weight_decay, clip_norm=clip_norm, batch_size=size, score=score,
        score_every=per_epoch, seed=seed, series=series,
    )  # fmt: skip


@own_states()
def atlas_few_shot(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    num_epochs: int = 10,
    learning_rate: float = 0.1,
    weight_decay: float = 0.1,
    batch_size: int = 128,
    clip_norm: float = 1.0,
    start: float = 0.0,
    partition: int = 1,
    validation: float = 0.0,
    groups: Groups | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """A new task from few labelled examples: what other fine-tunes learned, weighted for it.

    Args:
        base: As `registry.compose`.
        finetuned: Of other tasks.
        samples: One, of the new task; with labels.
        num_epochs: Of at least 10 steps each.
        learning_rate: At the start; falls along a cosine.
        validation: Share that is kept for choosing among epochs; 0 keeps the last, and reports on what was learned on.
        weight_decay, batch_size, clip_norm, start, partition, groups, seed, series: As `atlas`.

    Reference:
        Zhang et al. 2024, arXiv:2407.02880. Differs: where there are fewer examples than a batch, a step takes each
        once, instead of several times.
    """
    return _adapt(
        base, finetuned, _one(samples, is_labelled=True), objectives.cross_entropy, validation, batch_size, num_epochs,
        _blocks(base, finetuned, groups, partition, start, seed), learning_rate=learning_rate,
        weight_decay=weight_decay, clip_norm=clip_norm, seed=seed, series=series,
    )  # fmt: skip


@own_states()
def atlas_test_time(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    objective: str = "pseudo_labels",
    threshold: float = 0.99,
    num_trusted: int | None = None,
    augment: Callable[[Any], Any] | None = None,
    num_epochs: int = 10,
    learning_rate: float = 0.1,
    weight_decay: float = 0.1,
    batch_size: int = 128,
    clip_norm: float = 1.0,
    start: float = 0.0,
    partition: int = 1,
    validation: float = 0.25,
    groups: Groups | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """A new task from unlabelled inputs: by labels that the network itself is sure of, or by entropy.

    Args:
        base, finetuned: As `atlas_few_shot`.
        samples: One, of the new task; its labels are used for reporting alone.
        objective: "pseudo_labels" or "entropy".
        threshold: Probability from which a label is believed.
        num_trusted: Inputs of each class that the first network is surest of, whose labels stay; None: N / (10 C), at
            least 1 and at most 100.
        augment: (inputs) -> another view of them, hashable and jittable, which learns the label of the first.
        validation: Share that is reported on.
        num_epochs, learning_rate, weight_decay, batch_size, clip_norm, start, partition, groups, seed, series: As
            `atlas_few_shot`. The last coefficients are kept.

    Raises:
        UnknownNameError: no such objective.

    Reference:
        Zhang et al. 2024, arXiv:2407.02880, after FixMatch, arXiv:2001.07685. Differs: only chosen inputs are trusted
        (the release ends up trusting all), and nothing is sharpened (there it has no effect).
    """
    sample = _one(samples)
    known = {"pseudo_labels": objectives.PseudoLabels(threshold, augment), "entropy": objectives.entropy}
    if objective not in known:
        raise unknown_name("objective", objective, known)
    check_models(base, finetuned)
    blocks = _blocks(base, finetuned, groups, partition, start, seed)
    (learned_on,), held = split_samples([sample], validation, seed, by_class=False)
    learned_on = learned_on.without_labels()
    if objective == "pseudo_labels":
        build, fixed, first = blocks
        learned_on = objectives.trust(learned_on, build(fixed, first), num_per_class=num_trusted)
    return _run(
        base, learned_on, held, known[objective], batch_size, num_epochs, blocks, learning_rate=learning_rate,
        weight_decay=weight_decay, clip_norm=clip_norm, seed=seed, series=series,
    )  # fmt: skip


def _one(samples, *, is_labelled=False):
    if len(samples) != 1:
        raise ConfigError(f"this takes one sample, of the new task; got {len(samples)}.")
    check_samples(samples, samples, is_labelled=is_labelled)
    return samples[0]


def _adapt(base, finetuned, sample, objective, validation, batch_size, num_epochs, blocks, **how):
    check_models(base, finetuned)
    (learned_on,), held = split_samples([sample], validation, how["seed"])
    if validation:
        how["score"] = lambda params, _: score_all(params, held)[0]["accuracy"]
    return _run(base, learned_on, held, objective, batch_size, num_epochs, blocks, **how)


def _run(base, learned_on, held, objective, batch_size, num_epochs, blocks, **how):
    check_counts(num_epochs=num_epochs, batch_size=batch_size)
    per_epoch = max(MIN_BATCHES, -(-len(learned_on) // batch_size))
    return learn_composition(
        base, *blocks, [learned_on], held, objective=objective, num_steps=num_epochs * per_epoch, schedule="cosine",
        batch_size=batch_size, score_every=per_epoch, **how,
    )  # fmt: skip


def _blocks(base, finetuned, groups, partition, start, seed):
    """(build, fixed, first numbers) of a coefficient a leaf and task, or of several a matrix."""
    check_models(base, finetuned)
    fixed, count = stack_vectors(base, finetuned), len(finetuned)
    groups = groups_of(fixed["vectors"], groups)
    if partition == 1:
        return BuildGroups(groups), fixed, {name: np.full(count, start, np.float32) for name in set(groups.values())}
    if partition < 1 or any(path != group for path, group in groups.items()):
        raise ConfigError(f"partition is {partition}; it must be at least 1, and takes no groups= above.")
    parts = draw_parts(fixed["vectors"], partition, seed)
    first = {
        path: np.full((count, partition) if path in parts else (count,), start, np.float32) for path in fixed["vectors"]
    }
    return BuildPartition(), {**fixed, "parts": parts}, first


@dataclass(frozen=True)
class _Norm:
    order: int

    def __call__(self, numbers):
        blocks = [jnp.ravel(c) for c in jax.tree.leaves(numbers)]
        if self.order == 1:
            norms = [jnp.sum(jnp.abs(c)) for c in blocks]
        else:  # the root has no gradient at 0, where the search begins
            norms = [jnp.sqrt(jnp.maximum(jnp.sum(c**2), 1e-24)) for c in blocks]
        return 0.5 * jnp.mean(jnp.stack(norms))


def _penalty(order):
    if order is None:
        return None
    if order not in (1, 2):
        raise ConfigError(f"penalty is {order}; it must be 1 or 2, the norm, or None.")
    return _Norm(order)
