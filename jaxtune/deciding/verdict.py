"""Whether examples tell what they decided from what is merged without them."""

from collections.abc import Sequence

import numpy as np

from jaxtune.compose.scoring import logits_of
from jaxtune.sample import Sample
from jaxtune.types import Params

SURE = 1.645  # standard errors; one side of 95 %


def compare(
    before: Params, after: Params, samples: Sequence[Sample], weights: Sequence[float]
) -> tuple[float, float, bool]:
    """(gain, its standard error, whether both say the same of every example).

    The gain is the weighed sum over tasks of how many more examples are right: by their labels, or where there are none
    as the task's own model says. Both models are asked about the same examples, so only those count on which they
    differ; half an example is added to either side, without which a few that all fell one way would have no error.

    Args:
        before, after: Networks of the samples' forward.
        samples: One a task, with labels or with what an expert says.
        weights: Of the tasks.

    Reference:
        Paired proportions with half a count added: Agresti and Min 2005, doi:10.1002/sim.1781.
    """
    gain = variance = 0.0
    is_same = True
    for sample, weight in zip(samples, weights, strict=True):
        change = _right(after, sample) - _right(before, sample)
        is_same &= not change.any()
        count = len(change) + 2
        mean = change.sum() / count
        gain += weight * change.mean()
        variance += weight**2 * (((change**2).sum() + 1) / count - mean**2) / count
    return float(gain), float(variance**0.5), bool(is_same)


def _right(params, sample):
    """float64[N]: 1 for every example that is right; of texts the share of their tokens."""
    logits, batch = logits_of(sample, params), sample.batch
    wanted = batch["label"] if "label" in batch else np.asarray(batch["teacher"]).argmax(axis=-1)
    right = (logits.argmax(axis=-1) == wanted).astype(np.float64)
    if right.ndim == 1:
        return right
    valid = np.asarray(batch.get("valid", np.ones(right.shape, bool)))
    return (right * valid).sum(-1) / np.maximum(valid.sum(-1), 1)
