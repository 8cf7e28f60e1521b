"""From numbers that are to be learned to a `Composition`, with scores of what it started from beside its own."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtune.compose import objectives
from jaxtune.compose.composition import Composition
from jaxtune.compose.learning import Build, learn, models_of, realise
from jaxtune.compose.scoring import mean_score, score_all
from jaxtune.compose.vectors import narrow, widen
from jaxtune.sample import Sample
from jaxtune.types import Params

TIE = 1e-3  # accuracy that a nat is worth


def learn_composition(
    base: Params, build: Build, fixed: Any, first: Any, learned_on: Sequence[Sample], held: Sequence[Sample], **how: Any
) -> Composition:
    """Learns and reports.

    Args:
        base: Whose dtypes the result has.
        build, fixed, first: As `learning.learn`.
        learned_on, held: As `split_samples`.
        **how: `learning.learn`'s own.

    Returns:
        `coefficients`: the numbers. `info`: "loss" of every step and task, "score" of every round where one is asked
        for, "step" that was kept, "validation": scores of every task on `held` for the first numbers ("start") and for
        those that are kept ("learned").
    """
    found = learn(build, fixed, first, learned_on, **how)
    start, params = realise(build, fixed, first), realise(build, fixed, found.numbers)
    models = models_of(params, found.own)
    info = {
        **found.history,
        "step": found.step,
        "validation": {
            "start": score_all(models_of(start, how.get("own") or {}) or start, held),
            "learned": score_all(models or params, held),
        },
    }
    per_task = None if models is None else tuple(narrow(model, base) for model in models)
    return Composition(narrow(params, base), info, jax.tree.map(np.asarray, found.numbers), per_task)


def split_samples(
    samples: Sequence[Sample],
    validation: float,
    seed: int,
    *,
    by_class: bool = True,
    experts: Sequence[Params] | None = None,
    confidence: float = 0.0,
) -> tuple[list[Sample], list[Sample]]:
    """(what is learned on, what is chosen and reported on).

    Args:
        validation: Share of the second; 0: both are all.
        seed: Of the split.
        by_class: As `Sample.split`; False where labels are for reporting alone, so that they change nothing.
        experts: Each task's fine-tune, to say what it predicts (`objectives.teach`).
        confidence: As `objectives.teach`, of what is learned on.
    """
    parts = [one.split(validation, seed=seed, by_class=by_class) if validation else (one, one) for one in samples]
    learned_on, held = ([pair[n] for pair in parts] for n in range(2))
    if experts is not None:
        experts = [widen(params) for params in experts]
        learned_on = [
            objectives.teach(one, params, confidence=confidence)
            for one, params in zip(learned_on, experts, strict=True)
        ]
        held = [objectives.teach(one, params) for one, params in zip(held, experts, strict=True)]
    return learned_on, held


def agree(held: Sequence[Sample]):
    """A score for `learning.learn`: mean share of predictions that are the experts', which needs no labels.

    Among equals, of which few examples make many, the lower KL from the experts counts.
    """

    def score(params, models):
        found = score_all(models or params, held)
        return float(np.mean([one["agreement"] - TIE * one["divergence"] for one in found]))

    return score


def match_experts(held: Sequence[Sample], experts: Sequence[Params]):
    """A score for `learning.learn`: mean accuracy, each divided by that of the task's own fine-tune."""
    best = score_all([widen(params) for params in experts], held)

    def score(params, models):
        return mean_score(score_all(models or params, held), best)

    return score
