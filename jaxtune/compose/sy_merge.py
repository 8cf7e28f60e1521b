"""SyMerge: coefficients of task vectors and one layer of each task's own, taught by the experts together."""

import dataclasses
import fnmatch
from collections.abc import Sequence

import numpy as np

from jaxtune.compose import objectives
from jaxtune.compose.composition import Composition, check_models, check_samples
from jaxtune.compose.running import agree, learn_composition, split_samples
from jaxtune.compose.vectors import BuildGroups, groups_of, stack_vectors
from jaxtune.errors import ConfigError
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.tree import flatten
from jaxtune.types import Params


@own_states()
def sy_merge(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    layer: str = "head/*",
    start: float = 0.3,
    num_steps: int = 500,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    confidence: float = 0.0,
    validation: float = 0.25,
    is_best_kept: bool = False,
    score_every: int = 50,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """One trunk, `θ_0 + Σ_t c_tb τ_tb`, and for each task a layer of its own; both learn what the experts predict.

    The result is several models that share all but a layer, and not one model: compare it with others of that kind.

    Args:
        base, finetuned, samples: As `registry.compose`. Labels are used for reporting alone.
        layer: Shell-style pattern of the paths that every task has for itself, begun at its expert's; a trunk's last
            projection or head.
        start, num_steps, learning_rate, batch_size, confidence, validation, is_best_kept, score_every, seed, series: As
            `ada_merging`.

    Returns:
        `per_task`: one whole model a task. `params`: the trunk, with `θ_0 + Σ_t c_tb τ_tb` in the place of the layer.
        `coefficients`: {path: float32[T]}; `info` as `running.learn_composition`, and "own", the paths of the layer.

    Raises:
        ConfigError: no leaf matches `layer`, or all do.
        DataError, TreeMismatchError, NonFiniteError: models, samples or numbers make no sense.

    Reference:
        Jung et al. 2024, arXiv:2412.19098. Differs: the target is the expert's soft label; a share of the stream is
        kept apart and reported on.
    """
    check_models(base, finetuned)
    check_samples(finetuned, samples)
    fixed, count = stack_vectors(base, finetuned), len(finetuned)
    own = [path for path in fixed["vectors"] if fnmatch.fnmatchcase(path, layer)]
    if not own or len(own) == len(fixed["vectors"]):
        some = ", ".join(list(fixed["vectors"])[-4:])
        raise ConfigError(f"layer= {layer!r} matches {len(own)} of {len(fixed['vectors'])} leaves ({some}, ...).")
    learned_on, held = split_samples(
        samples, validation, seed, by_class=False, experts=finetuned, confidence=confidence
    )
    flats = [flatten(params) for params in finetuned]
    first = {path: np.full(count, start, np.float32) for path in fixed["vectors"]}
    found = learn_composition(
        base, BuildGroups(groups_of(fixed["vectors"], None)), fixed, first, learned_on, held,
        own={path: np.stack([np.asarray(flat[path], np.float32) for flat in flats]) for path in own},
        objective=objectives.expert, num_steps=num_steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed,
        series=series, score=agree(held) if is_best_kept else None, score_every=score_every,
    )  # fmt: skip
    return dataclasses.replace(found, info={**found.info, "own": own})
