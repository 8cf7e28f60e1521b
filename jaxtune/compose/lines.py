"""Loss and accuracy of models on a sample, and along the line between two of them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import DataError
from jaxtune.evaluate.classifier import calibration_error
from jaxtune.interpolate.barrier import NUM_POINTS, Barrier, measure_barrier
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.sample import Sample, example_losses
from jaxtune.types import Params


@dataclass(frozen=True)
class Line:
    """A line between two models, measured.

    Attributes:
        barrier: Of the loss.
        accuracies: At the barrier's weights.
    """

    barrier: Barrier
    accuracies: tuple[float, ...]


def measure_line(
    first: Params, second: Params, sample: Sample, *, num_points: int = NUM_POINTS, batch_size: int = 256
) -> Line:
    """Measures the loss at evenly spaced points of the line; one compiled program for all of them.

    Args:
        first, second: The ends.
        sample: Labelled examples.
        num_points: Both ends counted.
        batch_size: Examples at a time.

    Raises:
        DataError: no labelled examples.
        TreeMismatchError: the trees differ in a path or a shape.
    """
    _check(sample)
    weights = np.linspace(0, 1, num_points)
    losses, hits = np.zeros(num_points), np.zeros(num_points)
    for chunk in sample.chunks(min(batch_size, len(sample))):
        loss, hit = _on_line(sample.forward, first, second, weights.astype(np.float32), chunk)
        losses += np.asarray(loss, np.float64)
        hits += np.asarray(hit, np.float64)
    return Line(measure_barrier(weights, losses / len(sample)), tuple((hits / len(sample)).tolist()))


def measure(params: Params, sample: Sample, *, batch_size: int = 256) -> dict[str, float]:
    """One model: "loss" and "accuracy", and of single predictions mean "confidence" and "calibration_error".

    Confidence is the probability of the most probable class.

    Raises:
        DataError: no labelled examples.
    """
    _check(sample)
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


def _check(sample):
    if not len(sample) or not sample.is_labelled:
        raise DataError(f"{sample.name}: a loss needs labelled examples, and here are none.")


@partial(jax.jit, static_argnums=0)
def _on_line(forward, first, second, weights, batch):
    def at(weight):
        scores = _score(forward, interpolate_linear(first, second, weight), batch)
        return jnp.sum(scores["loss"] * batch["weight"]), jnp.sum(scores["accuracy"] * batch["weight"])

    return jax.lax.map(at, weights)


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
