"""How good one model is at several tasks, by their samples: with labels by accuracy, without by its expert's word."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.sample import Sample, example_losses
from jaxtune.types import Params

BATCH_SIZE = 128


def logits_of(sample: Sample, params: Params, *, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """Logits of every example: float32[N, C] or float32[N, P, C]."""
    params = jax.tree.map(jnp.asarray, params)
    parts = [
        np.asarray(_logits(sample.forward, params, _plain(chunk)))
        for chunk in sample.chunks(min(batch_size, len(sample)))
    ]
    return np.concatenate(parts)[: len(sample)]


def _plain(batch):
    return {
        name: values for name, values in batch.items() if name not in ("teacher", "trusted", "weight", "label", "valid")
    }


@partial(jax.jit, static_argnames="forward")
def _logits(forward, params, batch):
    return forward(params, batch).astype(jnp.float32)


def score(params: Params, sample: Sample, *, batch_size: int = BATCH_SIZE) -> dict[str, float]:
    """How good a model is at one task.

    Returns:
        With labels "accuracy" and "loss"; where the sample knows what an expert says (`objectives.teach`), "agreement",
        the share of predictions that are its, and "divergence", the KL from it. Always "entropy". Predictions that do
        not count are left out; examples that weigh nothing are not.
    """
    logits = logits_of(sample, params, batch_size=batch_size)
    return score_logits(logits, sample.batch)


def score_logits(logits: np.ndarray, batch: Mapping[str, Any]) -> dict[str, float]:
    """`score` of logits that are there already."""
    found = {}
    log_probabilities = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    first = logits.argmax(axis=-1)
    valid = np.asarray(batch.get("valid", np.ones(first.shape, bool)))
    found["entropy"] = float(-(np.exp(log_probabilities) * log_probabilities).sum(-1)[valid].mean())
    if "label" in batch:
        found["accuracy"] = float((first == batch["label"])[valid].mean())
        found["loss"] = float(np.asarray(example_losses(jnp.asarray(logits), batch), np.float64).mean())
    if "teacher" in batch:
        theirs = np.asarray(jax.nn.log_softmax(batch["teacher"], axis=-1), np.float64)
        found["agreement"] = float((first == batch["teacher"].argmax(axis=-1))[valid].mean())
        found["divergence"] = float((np.exp(theirs) * (theirs - log_probabilities)).sum(-1)[valid].mean())
    return found


def score_all(params: Params | Sequence[Params], samples: Sequence[Sample], **how: Any) -> list[dict[str, float]]:
    """`score` of one model on every task; of a list of models, each on its own."""
    models = params if isinstance(params, list | tuple) else [params] * len(samples)
    return [score(model, sample, **how) for model, sample in zip(models, samples, strict=True)]


def mean_score(scores: Sequence[Mapping[str, float]], experts: Sequence[Mapping[str, float]] | None = None) -> float:
    """One number to choose by, the higher the better: mean accuracy, divided by that of each task's expert where given.

    Tasks without labels count by their agreement with the expert, and those whose expert has no example right by their
    accuracy.
    """
    values = []
    for n, one in enumerate(scores):
        if "accuracy" in one:
            values.append(share_of(one["accuracy"], experts[n]["accuracy"] if experts is not None else 1.0))
        else:
            values.append(one["agreement"])
    return float(np.mean(values))


def share_of(accuracy: float, best: float) -> float:
    """An accuracy beside the expert's; as it is where the expert has no example right.

    Nothing is a share of 0, and a task with a small stand-in for it would outweigh all others.
    """
    return accuracy / best if best > 0 else accuracy
