"""How well a language model foretells texts."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import DataError, NonFiniteError
from jaxtune.evaluate.candidates import Candidates
from jaxtune.evaluate.classifier import Metrics
from jaxtune.evaluate.many import evaluate_many, score_many
from jaxtune.sample import Batch, Sample
from jaxtune.types import Params


@dataclass(frozen=True)
class TextMetrics:
    """Of one language model on a sample of texts.

    Attributes:
        loss: Mean negative log-probability of a token, in nats; every token counts the same, whichever text it is of.
        perplexity: Its exponential; infinite where that is beyond float64.
        accuracy: Share of tokens that were the most probable.
        num_tokens: Tokens that were foretold: padding and the first of every text are not.
    """

    loss: float
    perplexity: float
    accuracy: float
    num_tokens: int


@dataclass(frozen=True)
class TokenScores:
    """Sums over the valid predictions of each example.

    Attributes:
        forward: (params, batch) -> logits float[N, P, C]; hashable.

    Shapes:
        result["loss"]: float32[N], in nats; result["right"], result["count"]: int32[N].
    """

    forward: Callable[[Params, Batch], jax.Array]

    def __call__(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        logits = self.forward(params, batch).astype(jnp.float32)  # [N, P, C]
        label = batch["label"].astype(jnp.int32)
        valid = batch.get("valid", jnp.ones(label.shape, bool)).astype(bool)
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        losses = -jnp.take_along_axis(log_probabilities, label[..., None], axis=-1)[..., 0]
        is_right = jnp.argmax(logits, axis=-1) == label
        return {
            "loss": jnp.sum(jnp.where(valid, losses, 0.0), axis=-1),
            "right": jnp.sum(is_right & valid, axis=-1, dtype=jnp.int32),
            "count": jnp.sum(valid, axis=-1, dtype=jnp.int32),
        }


def evaluate_texts(
    candidates: Candidates,
    sample: Sample,
    *,
    batch_size: int | None = None,
    at_a_time: int | None = None,
    memory: int | None = None,
) -> list[TextMetrics]:
    """Perplexity of each candidate on a sample of texts.

    Tokens are summed over all texts and divided once, so that neither the batch size nor the length of a text weighs.

    Args:
        candidates: Language models.
        sample: As `sampling.make_text_sample` gives it.
        batch_size, at_a_time, memory: As in `many.score_many`.

    Raises:
        DataError: the sample is empty, does not say which tokens to foretell, or has none that counts.
        NonFiniteError: a model's outputs are NaN.
    """
    if "label" not in sample.batch or sample.batch["label"].ndim != 2:
        raise DataError(f"{sample.name}: no tokens to foretell; make_text_sample gives such a sample.")
    how = {"batch_size": batch_size, "at_a_time": at_a_time, "memory": memory}
    scores = score_many(candidates, TokenScores(sample.forward), sample, **how)
    losses, right, counts = (scores[name].astype(np.float64) for name in ("loss", "right", "count"))
    if not counts[0].sum():
        raise DataError(f"{sample.name}: every token is padding.")
    if np.isnan(losses).any():
        model, text = np.argwhere(np.isnan(losses))[0]
        raise NonFiniteError(f"{sample.name}: the outputs of model {model} are NaN, first for text {text}.")
    found = []
    for loss, hits, count in zip(losses.sum(axis=1), right.sum(axis=1), counts.sum(axis=1), strict=True):
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(loss / count))
        found.append(TextMetrics(float(loss / count), perplexity, float(hits / count), int(count)))
    return found


def evaluate_sample(candidates: Candidates, sample: Sample) -> list[Metrics] | list[TextMetrics]:
    """`evaluate_texts` of a sample whose examples have several labels, one a token, `evaluate_many` of any other.

    Raises:
        DataError, NonFiniteError: as those.
    """
    if sample.is_labelled and sample.batch["label"].ndim == 2:
        return evaluate_texts(candidates, sample)
    return evaluate_many(candidates, sample.forward, sample)
