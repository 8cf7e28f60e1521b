"""Loss, accuracy and confidence of one model on a sample."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import DataError
from jaxtune.evaluate.classifier import calibration_error
from jaxtune.sample import Sample, example_losses
from jaxtune.types import Params


def measure(params: Params, sample: Sample, *, batch_size: int = 256) -> dict[str, float]:
    """One model: "loss" and "accuracy", and of single predictions mean "confidence" and "calibration_error".

    Confidence is the probability of the most probable class.

    Raises:
        DataError: no labelled examples.
    """
    if not len(sample) or not sample.is_labelled:
        raise DataError(f"{sample.name}: a loss needs labelled examples, and here are none.")
    found: dict[str, list[np.ndarray]] = {}
    for chunk in sample.chunks(min(batch_size, len(sample))):
        scores = _score(sample.forward, params, chunk)
        for name, values in scores.items():
            found.setdefault(name, []).append(np.asarray(values)[chunk["weight"] > 0])
    scores = {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}
    result = {name: float(np.mean(values)) for name, values in scores.items()}
    if "confidence" in scores:
        result["calibration_error"] = calibration_error(scores["confidence"], scores["accuracy"] > 0)
    return result


@partial(jax.jit, static_argnums=0)
def _score(forward: Any, params: Params, batch: Any) -> dict[str, jax.Array]:
    """float32[N] each; of P predictions an example their mean, of the valid ones."""
    logits = forward(params, batch).astype(jnp.float32)
    is_hit = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
    scores = {"loss": example_losses(logits, batch)}
    if is_hit.ndim == 1:
        confidence = jnp.exp(jnp.max(jax.nn.log_softmax(logits, axis=-1), axis=-1))
        return {**scores, "accuracy": is_hit, "confidence": confidence}
    valid = batch.get("valid", jnp.ones(is_hit.shape, bool)).astype(jnp.float32)
    return {**scores, "accuracy": jnp.sum(is_hit * valid, axis=-1) / jnp.maximum(jnp.sum(valid, axis=-1), 1.0)}
