"""One task vector at many scales: every model of the sweep in one compiled program."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.evaluate.classifier import Metrics, Source, check_sizes, metrics_of, score_batch, score_source, spread
from jaxtune.symmetry.spec import Spec
from jaxtune.transport.prepared import Prepared, apply_transport
from jaxtune.types import Params

MAX_BYTES = 2**30  # of the models that exist at one time on an accelerator


def evaluate_scales(
    config: Any,
    prepared: Prepared,
    target: Params,
    source: Source,
    scales: Sequence[float],
    *,
    embeddings: jax.Array | np.ndarray | None = None,
    batch_size: int = 256,
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
        embeddings, batch_size, top_k: As in `evaluate_classifier`.
        at_a_time: Models side by side (`vmap`); the program takes them in turns. None: on a CPU one, where more are
            slower, elsewhere as many as fit into a gigabyte.

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
    if at_a_time is not None and at_a_time < 1:
        raise ConfigError(f"at_a_time is {at_a_time}; it must be at least 1.")
    check_sizes(source, batch_size=batch_size, top_k=top_k)
    batch_size = min(batch_size, len(source))
    (target, vector), place = spread((target, prepared.task_vector), batch_size)
    embeddings = None if embeddings is None else jnp.asarray(embeddings)
    at_a_time = min(at_a_time or _fitting(target), len(scales))

    def score(batch):
        return _score_scales(
            config, prepared.spec.nonnegative, at_a_time, target, vector, scales, place(batch), embeddings
        )

    scores = score_source(score, source, batch_size)
    return [metrics_of({name: values[n] for name, values in scores.items()}, top_k=top_k) for n in range(len(scales))]


def _fitting(target):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(target))
    return 1 if jax.default_backend() == "cpu" else max(1, MAX_BYTES // max(size, 1))


@partial(jax.jit, static_argnames=("config", "nonnegative", "at_a_time"))
def _score_scales(config, nonnegative, at_a_time, target, vector, scales, batch, embeddings):
    """`score_batch` of the model at each scale: [scales, examples] each."""
    prepared = Prepared(vector, Spec({}, {}, nonnegative=nonnegative))  # of the spec, applying needs that alone

    def score(scale):
        return score_batch(config, apply_transport(prepared, target, scale), batch, embeddings)

    return jax.lax.map(score, scales, batch_size=at_a_time)
