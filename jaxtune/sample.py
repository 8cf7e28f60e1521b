"""A few examples of a task, and how a network is asked about them.

Methods that look at data take one of these and meet neither a model's config nor a file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError, DataError
from jaxtune.types import Params

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """Examples in memory, with or without labels.

    Attributes:
        name: What reports call it.
        batch: The inputs ("image"; "text" and "mask"), "label" where it is known, and "valid" where only some of an
            example's predictions count.
        forward: (params, batch) -> logits. Pure, differentiable, and hashable: equal where it computes the same, so
            that it can be a static argument of `jit`.
        record: (params, batch) -> {path of a matrix: what goes in and comes out of it}, see `models.tap`; hashable too.
            None where nothing of the family can be recorded.

    Shapes:
        batch[...]: N first. batch["label"]: int32[N], or int32[N, P] of P predictions an example (language models);
            batch["valid"]: bool[N, P].
        forward: float32[N, C], or float32[N, P, C].
    """

    name: str
    batch: dict[str, np.ndarray]
    forward: Callable[[Params, Batch], jax.Array]
    record: Callable[[Params, Batch], dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.batch.values()))) if self.batch else 0

    @property
    def is_labelled(self) -> bool:
        """Whether the examples have labels."""
        return "label" in self.batch

    def without_labels(self) -> "Sample":
        """The same examples, their labels forgotten."""
        return replace(self, batch={name: values for name, values in self.batch.items() if name != "label"})

    def take(self, indices: Sequence[int] | np.ndarray) -> "Sample":
        """Some of the examples, in the order asked for."""
        indices = np.asarray(indices, np.int64)
        return replace(self, batch={name: values[indices] for name, values in self.batch.items()})

    def split(
        self, fraction: float, *, seed: int = 0, by_class: bool = True, turn: int = 0
    ) -> tuple["Sample", "Sample"]:
        """(the rest, a share of the examples drawn by chance): what a method chooses by, kept from what it learns on.

        Where labels are known every class gives its share; an only example is of the rest as long as others are left.

        Args:
            fraction: The share.
            seed: Of the draw.
            by_class: False: as if there were no labels, which both parts keep; for what must not go by them.
            turn: For cross-validation: turns 0, 1, ... draw other examples each, as long as there are any.

        Raises:
            ConfigError: the share is not between 0 and 1.
            DataError: one of the two would be empty.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"the share of examples that is kept apart is {fraction}; it must lie between 0 and 1.")
        order = np.random.RandomState(seed).permutation(len(self))  # a stream that NumPy never changes
        if by_class and self.is_labelled and self.batch["label"].ndim == 1:
            labels = self.batch["label"][order]
            # Position of each example within its class, as a share of the class: the last ones of every class are held.
            place = np.empty(len(order))
            for label in np.unique(labels):
                rows = np.flatnonzero(labels == label)
                place[rows] = (np.arange(len(rows)) + 0.5) / len(rows) if len(rows) > 1 else 0
            order = order[np.argsort(place, kind="stable")]
        num_held = round(fraction * len(order))
        if not 0 < num_held < len(order):
            raise DataError(
                f"{self.name}: a share of {fraction} of {len(self)} examples leaves none on one side. Give more."
            )
        order = np.roll(order, turn * num_held)
        return self.take(np.sort(order[:-num_held])), self.take(np.sort(order[-num_held:]))

    def chunks(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """All examples in their order, `size` at a time; the last chunk is padded with the last example.

        Shapes:
            chunk["weight"]: float32[size]. 1 for an example, 0 for padding.

        Raises:
            ConfigError: `size` below 1.
        """
        if size < 1:
            raise ConfigError(f"a chunk has {size} examples; it must have at least 1.")
        for start in range(0, len(self), size):
            indices = np.arange(start, min(start + size, len(self)))
            padded = np.pad(indices, (0, size - len(indices)), mode="edge")
            chunk = {name: values[padded] for name, values in self.batch.items()}
            yield {**chunk, "weight": (np.arange(size) < len(indices)).astype(np.float32)}


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What a network reads of a batch: all but the label, which predictions count, and what the examples weigh."""
    return {name: values for name, values in batch.items() if name not in ("label", "valid", "weight")}


def example_losses(logits: jax.Array, batch: Batch, *, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of every example against `batch["label"]`, in nats; of P predictions the mean of the valid ones.

    Args:
        label_smoothing: Share of each target that is spread evenly over the C classes.

    Shapes:
        logits: float[N, C] or float[N, P, C]; result: float32[N], 0 where no prediction is valid.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    on_label = jnp.take_along_axis(log_probabilities, batch["label"][..., None].astype(jnp.int32), axis=-1)[..., 0]
    if label_smoothing:
        on_label = (1 - label_smoothing) * on_label + label_smoothing * jnp.mean(log_probabilities, axis=-1)
    return mean_of_valid(-on_label, batch)


def example_divergences(logits: jax.Array, teacher: jax.Array, batch: Batch, *, temperature: float = 1.0) -> jax.Array:
    """`T² KL(teacher ‖ model)` of every example, in nats, both softened by the temperature T.

    Shapes:
        logits, teacher: float[N, C] or float[N, P, C]; result: float32[N].

    Reference:
        Hinton et al. 2015, arXiv:1503.02531.
    """
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis=-1) for x in (logits, teacher))
    return mean_of_valid(temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), batch)


def example_entropies(logits: jax.Array, batch: Batch) -> jax.Array:
    """Entropy of the prediction for every example, in nats.

    Shapes:
        logits: float[N, C] or float[N, P, C]; result: float32[N].
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return mean_of_valid(-jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1), batch)


def weighted_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """Mean over the examples of a batch, padding of `Sample.chunks` left out."""
    weight = batch.get("weight")
    if weight is None:
        return jnp.mean(values)
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def mean_of_valid(values: jax.Array, batch: Batch) -> jax.Array:
    """Of P predictions an example the mean of those that count, 0 where none does; of one prediction that itself.

    Shapes:
        values: float[N] or float[N, P]; result: float[N].
    """
    if values.ndim == 1:
        return values
    valid = batch.get("valid")
    if valid is None:
        return jnp.mean(values, axis=-1)
    count = jnp.sum(valid, axis=-1, dtype=values.dtype)
    return jnp.sum(jnp.where(valid, values, 0.0), axis=-1) / jnp.maximum(count, 1.0)
