"""How well a model classifies a data source: accuracy, loss, calibration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError, DataError, NonFiniteError
from jaxtune.models import registry
from jaxtune.models.readout import read_out
from jaxtune.sample import Sample, inputs_of
from jaxtune.sampling import what_is_said
from jaxtune.types import Params

NUM_CALIBRATION_BINS = 15


class Source(Protocol):
    """What evaluation needs of a data source."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Any) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class Metrics:
    """Of one model on one source.

    Attributes:
        accuracy: Share of examples whose most probable class is the label.
        top_k_accuracy: Share of examples whose label is among the `top_k` most probable classes.
        top_k: As asked.
        balanced_accuracy: Mean over the classes that the source has of the accuracy on each: rare ones count as much.
        loss: Mean negative log-probability of the label, in nats.
        calibration_error: Expected difference between confidence and accuracy, over 15 equal bins of confidence.
        num_examples: Size of the source.
    """

    accuracy: float
    top_k_accuracy: float
    top_k: int
    balanced_accuracy: float
    loss: float
    calibration_error: float
    num_examples: int


def evaluate_classifier(
    config: Any,
    params: Params,
    source: Source,
    *,
    embeddings: jax.Array | np.ndarray | None = None,
    batch_size: int = 256,
    top_k: int = 5,
) -> Metrics:
    """Runs a model over a whole source, in order, on every local device that the batch size allows.

    The last batch is padded, so one shape compiles; the padding counts nowhere. Scores are kept per example and
    averaged at the end in float64, so the batch size changes nothing beyond the rounding of the forward pass.

    Args:
        config: Of a model family in `models.registry`.
        params: Its parameters; running statistics are used, not updated.
        source: Labelled images.
        embeddings: float32[C, D], the frozen read-out of a model with D outputs; None where the outputs are logits.
        batch_size: Examples at a time.
        top_k: Of `Metrics.top_k_accuracy`; with fewer classes, all of them.

    Raises:
        DataError: the source is empty, or holds a label that the model has no class for.
        ConfigError: `batch_size` or `top_k` is below 1.
        NonFiniteError: the model's outputs are NaN.

    Reference:
        Guo et al. 2017, arXiv:1706.04599, equation 3 (calibration error).
    """
    check_sizes(source, batch_size=batch_size, top_k=top_k)
    batch_size = min(batch_size, len(source))
    params, place = spread(params, batch_size)
    embeddings = None if embeddings is None else jnp.asarray(embeddings)
    scores = score_source(lambda batch: score_batch(config, params, place(batch), embeddings), source, batch_size)
    return metrics_of(scores, top_k=top_k)


def check_sizes(source: Source, *, batch_size: int, top_k: int) -> None:
    """Raises `ConfigError` where either is below 1, `DataError` where the source is empty."""
    if batch_size < 1 or top_k < 1:
        raise ConfigError(f"batch_size is {batch_size} and top_k is {top_k}; both must be at least 1.")
    if not len(source):
        raise DataError("the source to evaluate on is empty.")


def score_source(
    score: Callable[[dict[str, Any]], dict[str, jax.Array]], source: Source, batch_size: int
) -> dict[str, np.ndarray]:
    """Scores of a whole source, in order, padding left out.

    Shapes:
        score(batch)[name]: [..., batch_size]; of any number of models at once.
        result[name]: [..., len(source)].
    """
    num_examples, scores = len(source), []
    for start in range(0, num_examples, batch_size):
        indices = np.arange(start, min(start + batch_size, num_examples))
        batch = source.__getitems__(np.pad(indices, (0, batch_size - len(indices)), mode="edge"))
        scores.append(score(dict(batch)))
        jax.block_until_ready(scores[-2:-1])  # the device runs one batch ahead, no more
    return {name: np.concatenate([s[name] for s in scores], axis=-1)[..., :num_examples] for name in scores[0]}


def metrics_of(scores: Mapping[str, np.ndarray], *, top_k: int) -> Metrics:
    """Metrics of one model from its scores of every example, as `score_batch` gives them.

    Raises:
        DataError: a label that the model has no class for.
        NonFiniteError: the model's outputs are NaN.
    """
    check_scores(scores)
    is_correct = scores["rank"] == 0
    return Metrics(
        accuracy=float(np.mean(is_correct)),
        top_k_accuracy=float(np.mean(scores["rank"] < top_k)),
        top_k=top_k,
        balanced_accuracy=balanced_accuracy(is_correct, scores["label"]),
        loss=float(np.mean(scores["loss"], dtype=np.float64)),
        calibration_error=calibration_error(scores["confidence"], is_correct),
        num_examples=len(is_correct),
    )


def check_classes(sample: Sample) -> None:
    """Checks that every example of a sample has one label, by which right and wrong are counted.

    Raises:
        DataError: there are no labels, or several an example, as texts for a language model have.
    """
    if not len(sample):
        raise DataError(f"{sample.name}: there are no examples.")
    if not sample.is_labelled:
        raise DataError(f"{sample.name}: the examples have no labels, and by these right and wrong are counted.")
    if sample.batch["label"].ndim != 1:
        raise DataError(
            f"{sample.name}: expected one label an example, got labels {list(sample.batch['label'].shape)}. Tokens of "
            "texts are counted by evaluate.language.evaluate_texts."
        )


def check_scores(scores: Mapping[str, np.ndarray]) -> None:
    """Raises what `metrics_of` raises, where the scores are of a label without a class, or of outputs that are NaN."""
    if np.any(scores["rank"] < 0):
        raise DataError(
            f"example {int(np.argmax(scores['rank'] < 0))} has a label that the model has no class for. "
            "Is the read-out made from this source's class names?"
        )
    if np.any(np.isnan(scores["loss"])):
        raise NonFiniteError(
            f"the model's outputs are NaN, first for example {int(np.argmax(np.isnan(scores['loss'])))}. "
            "Its parameters hold NaN or Inf, or overflow: tree.check_finite says where."
        )


@partial(jax.jit, static_argnames="config")
def score_batch(
    config: Any, params: Params, batch: Mapping[str, jax.Array], embeddings: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Scores of each example of one batch; `vmap` over `params` evaluates many models at once.

    Shapes:
        result["loss"]: float32[N]. Negative log-probability of the label, in nats.
        result["rank"]: int32[N]. Number of classes placed before the label, equal logits by index; C where they
            are NaN, -1 where the label is not a class.
        result["confidence"]: float32[N]. Probability of the most probable class.
        result["label"]: int[N], as in the batch.
    """
    outputs = what_is_said(registry.apply(config, params, inputs_of(batch)))
    return score_logits(outputs if embeddings is None else read_out(outputs, embeddings), batch["label"])


def score_logits(logits: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
    """Scores of each example as `score_batch` gives them, of logits float[N, C] that are there already."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    classes = jnp.arange(logits.shape[-1])[None]
    labels = label.astype(classes.dtype)[:, None]
    is_label = classes == labels  # [N, C]
    on_label = jnp.sum(jnp.where(is_label, log_probabilities, 0.0), axis=-1, keepdims=True)
    is_before = ~(log_probabilities <= on_label) | ((log_probabilities == on_label) & (classes < labels))
    rank = jnp.sum(is_before, axis=-1)
    return {
        "loss": -on_label[:, 0],
        "rank": jnp.where(jnp.any(is_label, axis=-1), rank, -1),
        "confidence": jnp.exp(jnp.max(log_probabilities, axis=-1)),
        "label": label,
    }


def balanced_accuracy(is_correct: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their examples that are right.

    Shapes:
        is_correct: bool[N]; labels: int[N].
    """
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(places, weights=is_correct, minlength=len(counts)) / counts))


def calibration_error(confidence: np.ndarray, is_correct: np.ndarray) -> float:
    """Sum over bins of (share of examples in the bin) * |mean confidence - accuracy|.

    Shapes:
        confidence: float[N] in [0, 1]; bin i of 15 holds (i / 15, (i + 1) / 15], and bin 0 also 0.
        is_correct: bool[N].
    """
    confidence = confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence * NUM_CALIBRATION_BINS).astype(int) - 1, 0, NUM_CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=confidence - is_correct, minlength=NUM_CALIBRATION_BINS)
    return float(np.sum(np.abs(gap)) / len(confidence))


def spread(params: Params, batch_size: int) -> tuple[Params, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Parameters on every local device and a function that cuts a batch over them; one device if it does not divide."""
    devices = jax.local_devices()
    if batch_size % len(devices):
        devices = devices[:1]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    cut = jax.NamedSharding(mesh, jax.P("data"))
    return jax.device_put(params, jax.NamedSharding(mesh, jax.P())), lambda batch: jax.device_put(batch, cut)
