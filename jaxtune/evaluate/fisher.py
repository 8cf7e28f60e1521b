"""The diagonal of the Fisher information: how much a network's predictions depend on every one of its parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import checkpoint
from jaxtune.checkpoint import Checkpoint
from jaxtune.errors import ConfigError, DataError, NonFiniteError, unknown_name
from jaxtune.gradients import ask, fold_chunks, with_index
from jaxtune.rng import named_key
from jaxtune.sample import Sample
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Params

LABELS = ("exact", "sampled", "empirical")


def estimate_fisher(
    params: Params,
    sample: Sample,
    *,
    labels: str = "exact",
    num_draws: int = 1,
    seed: int = 0,
    chunk_size: int = 8,
    num_parts: int = 1,
) -> dict[str, Any]:
    """`F = mean over x of E_y[(d log p(y | x) / d params)²]`, entry by entry, in evaluation mode.

    Where an example has P predictions (a language model's), `log p(y | x)` is the sum of those that are valid.

    Args:
        params: The network that the Fisher is of.
        sample: Inputs; labels are read by "empirical" alone.
        labels: Where y comes from. "exact": the expectation over the network's own distribution, one backward pass per
            class (and prediction). "sampled": `num_draws` labels an example, drawn from that distribution: unbiased,
            for many classes. "empirical": the examples' own labels, which is not the Fisher information but a biased
            stand-in: near a minimum it tends to 0 where the Fisher does not.
        num_draws: Of "sampled".
        seed: Of "sampled"; the draws of an example depend on the seed and its place in the sample alone.
        chunk_size: Examples at a time. Memory: `2 + chunk_size` trees like the parameters.
        num_parts: The leaves are taken in so many parts, one after the other: the gradients and the sum take as much
            less memory, the passes over the data as much more time. The result comes back on the host.

    Shapes:
        result: The tree of `params`; float32, at least 0; zeros for leaves that are no floats.

    Raises:
        UnknownNameError: no such `labels`.
        ConfigError: a count below 1.
        DataError: no examples, or no labels where they are asked for.
        NonFiniteError: the Fisher is NaN or infinite.

    Reference:
        Matena and Raffel 2022, arXiv:2111.09832, equation 5; empirical Fisher: Kunstner et al. 2019, arXiv:1905.12558.
    """
    if labels not in LABELS:
        raise unknown_name("kind of labels", labels, LABELS)
    if min(num_draws, chunk_size, num_parts) < 1:
        raise ConfigError(
            f"num_draws is {num_draws}, chunk_size {chunk_size}, num_parts {num_parts}; all must be at least 1."
        )
    if labels == "empirical" and not sample.is_labelled:
        raise DataError(f"{sample.name}: the examples have no labels; take labels='exact' or 'sampled'.")
    flat = flatten(params)
    floats = [path for path, leaf in flat.items() if is_float(leaf)]
    kernel = FisherKernel(sample.forward, labels, num_draws)
    data, aux = sample if labels == "empirical" else sample.without_labels(), None
    if labels == "sampled":
        data, aux = with_index(data), named_key(jax.random.key(seed), "fisher")
    found = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flat.items() if path not in floats}
    for part in _cut(floats, flat, num_parts):
        total = fold_chunks(kernel, params, data, chunk_size=chunk_size, paths=part, aux=aux)
        found |= {path: np.asarray(leaf) / np.float32(len(sample)) for path, leaf in total.items()}
    odd = [path for path in floats if not np.isfinite(found[path]).all()]
    if odd:
        raise NonFiniteError(f"{sample.name}: the Fisher of {', '.join(odd[:5])} holds NaN or Inf.")
    return unflatten({path: found[path] for path in flat})


@dataclass(frozen=True)
class FisherKernel:
    """For `fold_chunks`: squared scores of a chunk of examples, summed."""

    forward: Any
    labels: str
    num_draws: int = 1

    def __call__(self, moving: Any, still: Any, aux: Any, batch: Any) -> Any:
        examples = {name: values for name, values in batch.items() if name != "weight"}
        squares = jax.vmap(lambda example: self._example(moving, still, aux, example))(examples)
        return jax.tree.map(lambda leaf: jnp.tensordot(batch["weight"], leaf, axes=1), squares)

    def _example(self, moving, still, key, example):
        """One example's share; memory for one gradient, however many classes there are."""

        def logits_of(moving):
            one = {name: values[None] for name, values in example.items()}
            logits = ask(self.forward, unflatten({**moving, **still}), one)[0].astype(jnp.float32)
            return logits.reshape(-1, logits.shape[-1])  # [predictions, classes]

        logits, pull_back = jax.vjp(logits_of, moving)
        probabilities = jax.nn.softmax(logits, axis=-1)
        valid = example["valid"].reshape(-1) if "valid" in example else jnp.ones(len(logits), bool)

        def add_square(total, cotangent):
            (gradient,) = pull_back(jnp.where(valid[:, None], cotangent, 0.0))
            return jax.tree.map(lambda sum_, leaf: sum_ + jnp.square(leaf), total, gradient), None

        # The gradient of log p(y) with regard to the logits is onehot(y) - p.
        num_predictions, num_classes = logits.shape
        zeros = jax.tree.map(jnp.zeros_like, moving)
        if self.labels == "exact":
            # Scores of different predictions have no correlation, so each is squared on its own.
            def add_class(total, place):
                row, label = place // num_classes, place % num_classes
                score = jax.nn.one_hot(label, num_classes) - probabilities[row]
                weighed = jnp.sqrt(probabilities[row, label]) * score
                return add_square(total, jnp.zeros_like(logits).at[row].set(weighed))

            return jax.lax.scan(add_class, zeros, jnp.arange(num_predictions * num_classes))[0]
        if self.labels == "empirical":
            labels = example["label"].reshape(-1)
            return add_square(zeros, jax.nn.one_hot(labels, num_classes) - probabilities)[0]

        def add_draw(total, draw):
            own = jax.random.fold_in(jax.random.fold_in(key, example["index"]), draw)
            labels = jax.random.categorical(own, logits, axis=-1)
            return add_square(total, jax.nn.one_hot(labels, num_classes) - probabilities)

        total = jax.lax.scan(add_draw, zeros, jnp.arange(self.num_draws))[0]
        return jax.tree.map(lambda leaf: leaf / self.num_draws, total)


def save_fisher(path: str | Path, fisher: Params, like: Checkpoint, *, overwrite: bool = False) -> Path:
    """Writes a Fisher as a recipe's `data:` reads it: safetensors under the names of the model's stored tensors.

    Args:
        path: The folder to create.
        fisher: Of the model, in our tree.
        like: The model as it was loaded: its names, and the order of the axes of its tensors.
        overwrite: Whether a former output at `path` may be replaced.

    Raises:
        TreeMismatchError: `fisher` has other leaves than the model.
        OutputError: as `checkpoint.save`.
    """
    tensors = unflatten(stored_names(fisher, like))
    return checkpoint.save(path, tensors, config={}, format="safetensors", overwrite=overwrite)


def stored_names(fisher: Params, like: Checkpoint) -> dict[str, np.ndarray]:
    """{name of a stored tensor: its Fisher}, for the tensors that are floats."""
    codec, leaves = like.layout.codec, flatten(fisher)
    if codec is None:
        return {path: np.asarray(leaf) for path, leaf in leaves.items() if is_float(leaf)}
    tensor_of = codec.table.encoder(fisher, {})
    stored: Mapping[str, Any] = like.layout.tensors
    return {
        name: np.ascontiguousarray(tensor_of(name))
        for name, info in stored.items()
        if is_float(info) and not codec.table.is_ignored(name)
    }


def _cut(paths, flat, num_parts):
    """Runs of leaves of about equal size, none empty."""
    total, parts, size = sum(flat[path].size for path in paths), [[]], 0
    for path in paths:
        if parts[-1] and size >= total * len(parts) / num_parts:
            parts.append([])
        parts[-1].append(path)
        size += flat[path].size
    return parts
