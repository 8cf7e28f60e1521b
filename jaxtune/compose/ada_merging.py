"""Coefficients of task vectors learned from unlabelled inputs: by entropy, or by what each expert says."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxtune.compose import objectives
from jaxtune.compose.composition import Composition, check_models, check_samples
from jaxtune.compose.running import agree, learn_composition, split_samples
from jaxtune.compose.vectors import BuildGroups, Groups, build_tasks, groups_of, stack_vectors
from jaxtune.errors import unknown_name
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.types import Params

OBJECTIVES = {"entropy": objectives.entropy, "expert": objectives.expert}
LEVELS = ("task", "layer")


@own_states()
def ada_merging(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    level: str = "layer",
    objective: str = "entropy",
    start: float = 0.3,
    num_steps: int = 500,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    confidence: float = 0.0,
    validation: float = 0.25,
    is_best_kept: bool = False,
    score_every: int = 50,
    groups: Groups | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """`θ_0 + Σ_t c_t τ_t`, with c learned on unlabelled inputs of every task.

    Args:
        base, finetuned, samples: As `registry.compose`. Labels are used for reporting alone.
        level: "task": one coefficient a task; "layer": one a task and leaf.
        objective: "entropy" of the predictions, or "expert": KL from the predictions of the task's own fine-tune, which
            cannot be had by being sure of one class.
        start: First value of every coefficient.
        num_steps, learning_rate, batch_size: Of Adam; inputs of each task a step.
        confidence: With "expert", only examples count for which the fine-tune gives its first class this probability.
        validation: Share of each sample that is not learned on, for reporting and, with `is_best_kept`, for choosing.
            0 learns and reports on all.
        is_best_kept: Whether the coefficients that agree best with the experts on that share are kept, instead of the
            last.
        score_every: Steps between two looks at it.
        groups: Leaf -> name of the coefficients that it shares with others; None: each leaf its own.
        seed: Of the split and of the order of the inputs.
        series: As `learning.learn`.

    Returns:
        `coefficients`: {path: float32[T]}, of "task" {"": float32[T]}; `info` as `running.learn_composition`.

    Raises:
        UnknownNameError: no such level or objective.
        ConfigError, DataError, TreeMismatchError, NonFiniteError: models, samples or numbers make no sense.

    Reference:
        Yang et al. 2024, arXiv:2310.02575 (level, entropy, Adam 1e-3, 0.3). Differs: a share of the stream is kept
        apart and reported on. "expert" follows Jung et al. 2024, arXiv:2412.19098, in the loss.
    """
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    check_models(base, finetuned)
    check_samples(finetuned, samples)
    learned_on, held = split_samples(
        samples, validation, seed, by_class=False, experts=finetuned, confidence=confidence
    )
    fixed, num_tasks = stack_vectors(base, finetuned), len(finetuned)
    if level == "task":
        build, first = build_tasks, np.full(num_tasks, start, np.float32)
    else:
        groups = groups_of(fixed["vectors"], groups)
        build = BuildGroups(groups)
        first = {name: np.full(num_tasks, start, np.float32) for name in dict.fromkeys(groups.values())}

    found = learn_composition(
        base, build, fixed, first, learned_on, held, objective=OBJECTIVES[objective], num_steps=num_steps,
        learning_rate=learning_rate, batch_size=batch_size, seed=seed, series=series,
        score=agree(held) if is_best_kept else None, score_every=score_every,
    )  # fmt: skip
    return dataclasses.replace(found, coefficients={"": found.coefficients}) if level == "task" else found
