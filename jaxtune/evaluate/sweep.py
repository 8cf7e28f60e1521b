"""One task vector at many scales: every model of the sweep in one compiled program."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.evaluate.candidates import combine_candidates
from jaxtune.evaluate.classifier import Metrics, Source, check_sizes
from jaxtune.evaluate.many import evaluate_many
from jaxtune.sampling import Forward, Frozen
from jaxtune.transport.prepared import Prepared
from jaxtune.types import Params


def evaluate_scales(
    config: Any,
    prepared: Prepared,
    target: Params,
    source: Source,
    scales: Sequence[float],
    *,
    embeddings: jax.Array | np.ndarray | None = None,
    batch_size: int | None = None,
    top_k: int = 5,
    at_a_time: int | None = None,
) -> list[Metrics]:
    """Evaluates `target + scale * task vector` at every scale, as `evaluate_classifier` would one by one.

    The scales are one axis of one program: the models are made and run inside it, and none of them is ever a tree
    of its own. Alignment, the expensive part, is in `prepared` and done.

    Args:
        config: Of a model family in `models.registry`.
        prepared: As `transport` prepares it.
        target: The new base.
        source: Labelled images.
        scales: In any order, with repetitions or without.
        embeddings, top_k: As in `evaluate_classifier`.
        batch_size, at_a_time: As in `many.score_many`.

    Returns:
        One `Metrics` per scale, in the order of `scales`.

    Raises:
        TreeMismatchError: `target` and the task vector differ in a path or a shape.
        ConfigError: `scales` is empty or not finite, `at_a_time`, `batch_size` or `top_k` is below 1.
        DataError, NonFiniteError: as `evaluate_classifier`.
    """
    scales = np.asarray(scales, np.float32)
    if scales.ndim != 1 or not len(scales) or not np.isfinite(scales).all():
        raise ConfigError(f"scales must be a list of at least one finite number, got {scales.tolist()}.")
    check_sizes(source, batch_size=1 if batch_size is None else batch_size, top_k=top_k)
    candidates = combine_candidates(
        target, [prepared.task_vector], scales[:, None], nonnegative=prepared.spec.nonnegative
    )
    forward = Forward(config, None if embeddings is None else Frozen(np.asarray(embeddings)))
    return evaluate_many(candidates, forward, source, top_k=top_k, batch_size=batch_size, at_a_time=at_a_time)
