"""What a composition is to be good at, as a function of one network's outputs on one batch.

An objective is hashable and pure, so that it can be a static argument of `jit`: (forward, params, batch) -> float32[].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.sample import Sample, example_divergences, example_entropies, example_losses, mean_of_valid, weighted_mean
from jaxtune.types import Params

Batch = Mapping[str, Any]
Objective = Callable[[Callable[..., jax.Array], Params, Batch], jax.Array]

TAUGHT = ("teacher", "trusted")  # beside the examples: what an expert says of them, which labels are to be believed


def cross_entropy(forward: Callable[..., jax.Array], params: Params, batch: Batch) -> jax.Array:
    """Against the labels, in nats."""
    return weighted_mean(example_losses(_logits(forward, params, batch), batch), batch)


def entropy(forward: Callable[..., jax.Array], params: Params, batch: Batch) -> jax.Array:
    """Of the predictions, in nats: low where the network is sure, right or wrong."""
    return weighted_mean(example_entropies(_logits(forward, params, batch), batch), batch)


def expert(forward: Callable[..., jax.Array], params: Params, batch: Batch) -> jax.Array:
    """KL from the expert's prediction, `batch["teacher"]`: its cross-entropy less a constant, so 0 where both agree."""
    return weighted_mean(example_divergences(_logits(forward, params, batch), batch["teacher"], batch), batch)


@dataclass(frozen=True)
class PseudoLabels:
    """Cross-entropy to labels that the network itself gives, where it is sure, and to trusted ones everywhere.

    Attributes:
        threshold: Least probability of a label that is believed.
        augment: (inputs) -> another view of them, which is to get the label of the first; None: the same view.
    """

    threshold: float = 0.99
    augment: Callable[[Batch], Batch] | None = None

    def __call__(self, forward: Callable[..., jax.Array], params: Params, batch: Batch) -> jax.Array:
        weak = jax.lax.stop_gradient(_logits(forward, params, batch).astype(jnp.float32))
        probability = jnp.max(jax.nn.softmax(weak, axis=-1), axis=-1)
        is_trusted = batch["trusted"] >= 0
        label = jnp.where(is_trusted, batch["trusted"], jnp.argmax(weak, axis=-1)).astype(jnp.int32)
        believed = (is_trusted | (probability >= self.threshold)).astype(jnp.float32)
        batch = batch if self.augment is None else {**batch, **self.augment(batch)}
        losses = example_losses(_logits(forward, params, batch), {"label": label})
        weight = batch.get("weight", jnp.ones_like(losses))
        return jnp.sum(losses * believed * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def _logits(forward, params, batch):
    return forward(params, {name: values for name, values in batch.items() if name not in TAUGHT})


def teach(sample: Sample, params: Params, *, confidence: float = 0.0, batch_size: int = 128) -> Sample:
    """The sample with the logits of an expert as "teacher"; where the expert is not sure, an example weighs nothing.

    Args:
        params: Of the expert.
        confidence: Least probability of the expert's first class; of P predictions, mean of those that count.
        batch_size: Examples at a time.

    Raises:
        ConfigError: the expert is sure of no example.
    """
    import dataclasses

    from jaxtune.compose.scoring import logits_of

    logits = logits_of(sample, params, batch_size=batch_size)
    added = {"teacher": logits}
    if confidence > 0:
        sure = np.asarray(mean_of_valid(jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1), sample.batch))
        added["weight"] = (sure >= confidence).astype(np.float32)
        if not added["weight"].any():
            raise ConfigError(
                f"{sample.name}: its expert is sure of no example at confidence {confidence}; the most is "
                f"{float(sure.max()):.3f}. Lower it."
            )
    return dataclasses.replace(sample, batch={**sample.batch, **added})


def trust(sample: Sample, params: Params, *, num_per_class: int | None = None, batch_size: int = 128) -> Sample:
    """The sample with "trusted": of every class the examples that a network is surest of keep its label for good.

    Args:
        params: Of the network, before anything is learned.
        num_per_class: None: N / (10 C), at least 1 and at most 100.

    Shapes:
        batch["trusted"]: int32[N], the label, or -1 where it is not believed.

    Reference:
        Fleuret et al. as used by Zhang et al. 2024, arXiv:2407.02880. Differs: the flags stand for the examples that
        were chosen, and not for all.
    """
    import dataclasses

    from jaxtune.compose.scoring import logits_of

    probability = np.asarray(jax.nn.softmax(logits_of(sample, params, batch_size=batch_size), axis=-1))
    if probability.ndim != 2:
        raise ConfigError(f"{sample.name}: pseudo-labels are of one prediction an example.")
    count, num_classes = probability.shape
    if num_per_class is None:
        num_per_class = min(max(count // (10 * num_classes), 1), 100)
    labels, sure = probability.argmax(axis=-1), probability.max(axis=-1)
    trusted = np.full(count, -1, np.int32)
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-sure[rows], kind="stable")][:num_per_class]
        trusted[rows] = label
    return dataclasses.replace(sample, batch={**sample.batch, "trusted": trusted})
