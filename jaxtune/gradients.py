"""Gradients of single examples, folded into one sum as they come: never kept side by side for all examples.

A chunk of examples is one compiled program. Inside it there are as many gradients as the chunk has examples; outside
it there is the sum.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import DataError
from jaxtune.sample import Sample, example_divergences, example_losses
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Leaf, Params

Batch = Mapping[str, Any]
Leaves = dict[str, Any]

# (params, batch) -> float32[N], a loss of every example. Hashable and equal where it computes the same.
Loss = Callable[[Params, Batch], jax.Array]

# What is beside the inputs in a batch of ours.
BESIDE = ("label", "valid", "weight", "teacher", "index")


def ask(forward: Callable[[Params, Batch], jax.Array], params: Params, batch: Batch) -> jax.Array:
    """Logits of a batch, of which the network sees the inputs alone."""
    return forward(params, {name: values for name, values in batch.items() if name not in BESIDE})


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy against `batch["label"]`, in nats."""

    forward: Callable[[Params, Batch], jax.Array]

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        return example_losses(ask(self.forward, params, batch), batch)


@dataclass(frozen=True)
class TeacherLoss:
    """`KL(teacher ‖ network)`, in nats; `batch["teacher"]` holds the teacher's logits."""

    forward: Callable[[Params, Batch], jax.Array]
    temperature: float = 1.0

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        logits = ask(self.forward, params, batch)
        return example_divergences(logits, batch["teacher"], batch, temperature=self.temperature)


def sum_signs(gradients: Leaves, weight: jax.Array, aux: Any) -> Leaves:
    """Over the examples, `sign(-gradient)`: votes for the direction of descent, as exact int32."""
    del aux
    counts = (weight > 0).astype(jnp.int32)
    return {path: jnp.tensordot(counts, jnp.sign(-leaf).astype(jnp.int32), axes=1) for path, leaf in gradients.items()}


@dataclass(frozen=True)
class ExampleGradients:
    """A kernel for `fold_chunks`: the gradient of every example's loss, handed to `fold`.

    Attributes:
        loss: Of every example.
        fold: ({path: [n, ...]}, weight [n], aux) -> {path: what is added to the sum}; hashable.
    """

    loss: Loss
    fold: Callable[[Leaves, jax.Array, Any], Leaves]

    def __call__(self, moving: Leaves, still: Leaves, aux: Any, batch: Batch) -> Leaves:
        def loss_of(moving, example):
            one = {name: values[None] for name, values in example.items()}
            return self.loss(unflatten({**moving, **still}), one)[0]

        examples = {name: values for name, values in batch.items() if name != "weight"}
        gradients = jax.vmap(jax.grad(loss_of), in_axes=(None, 0))(moving, examples)
        return self.fold(gradients, batch["weight"], aux)


@dataclass(frozen=True)
class SummedGradient:
    """A kernel for `fold_chunks`: the gradient of the sum of all losses, for which no example needs one of its own."""

    loss: Loss

    def __call__(self, moving: Leaves, still: Leaves, aux: Any, batch: Batch) -> Leaves:
        del aux

        def total_of(moving):
            return jnp.sum(self.loss(unflatten({**moving, **still}), batch) * batch["weight"])

        return jax.grad(total_of)(moving)


def fold_chunks(
    kernel: Callable[[Leaves, Leaves, Any, Batch], Leaves],
    params: Params,
    sample: Sample,
    *,
    chunk_size: int = 8,
    paths: Collection[str] | None = None,
    aux: Any = None,
) -> dict[str, jax.Array]:
    """Sum of what a kernel makes of every chunk of a sample.

    Memory: the parameters, the sum, and what the kernel needs for one chunk; nothing grows with the sample.

    Args:
        kernel: (leaves to differentiate, the others, aux, chunk) -> {path: array}; hashable.
        params: Floats are widened to float32.
        sample: Examples.
        chunk_size: Examples at a time.
        paths: Leaves to differentiate; None: all floats.
        aux: Arrays for the kernel.

    Raises:
        DataError: there are no examples.
        ConfigError: `chunk_size` below 1.
    """
    if not len(sample):
        raise DataError(f"{sample.name}: there are no examples.")
    flat = flatten(params)
    moving = {path: leaf for path, leaf in flat.items() if is_float(leaf) and (paths is None or path in paths)}
    still = {path: leaf for path, leaf in flat.items() if path not in moving}
    moving, still = ({path: widen(leaf) for path, leaf in part.items()} for part in (moving, still))
    total = None
    for chunk in sample.chunks(min(chunk_size, len(sample)) if chunk_size > 0 else chunk_size):
        if total is None:
            shapes = jax.eval_shape(partial(kernel), moving, still, aux, chunk)
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total = add_chunk(kernel, moving, still, aux, total, chunk)
    return total


@partial(jax.jit, static_argnames="kernel", donate_argnames="total")
def add_chunk(kernel, moving, still, aux, total, batch):
    """`total` and what a kernel makes of one chunk."""
    return jax.tree.map(jnp.add, total, kernel(moving, still, aux, batch))


def check_sample(sample: Sample, params: Params, *, is_labelled: bool) -> None:
    """Checks that a sample can be learned from.

    Args:
        sample: Examples.
        params: Of a network that is to see them.
        is_labelled: Whether labels are needed.

    Raises:
        DataError: there are no examples, an input holds NaN, there are no labels where they are needed, or one is no
            class of the network's; names the sample.
    """
    if not len(sample):
        raise DataError(f"{sample.name}: there are no examples.")
    check_finite_inputs(sample)
    if not is_labelled:
        return
    if not sample.is_labelled:
        raise DataError(
            f"{sample.name}: the examples have no labels, and this learns from labels. Give labels with them, or take "
            "a method that needs none."
        )
    one = {name: values[:1] for name, values in sample.batch.items()}
    num_classes = jax.eval_shape(partial(ask, sample.forward), jax.tree.map(_shape_of, params), one).shape[-1]
    labels = sample.batch["label"]
    if "valid" in sample.batch:
        labels = labels[sample.batch["valid"]]
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise DataError(
            f"{sample.name}: labels {labels.min()} to {labels.max()}, the network has {num_classes} classes (labels 0 "
            f"to {num_classes - 1}). Leave the others out, or number them as the network does."
        )


def check_finite_inputs(sample: Sample) -> None:
    """Raises `DataError` that names the first examples whose inputs hold NaN or Inf."""
    for name, values in sample.batch.items():
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        found = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise DataError(
            f"{sample.name}: {name!r} holds NaN or Inf in examples {shown} ({len(found)} of {len(values)}). Leave "
            "those out, or put numbers in their place."
        )


def with_teacher(sample: Sample, teacher: Params, *, chunk_size: int = 64) -> Sample:
    """The sample with `batch["teacher"]`: the logits of a network that is to be followed, in float32."""
    return replace(sample, batch={**sample.batch, "teacher": predict(sample, teacher, chunk_size=chunk_size)})


def with_index(sample: Sample) -> Sample:
    """The sample with `batch["index"]`: the place of every example, for random bits that chunks cannot change."""
    return replace(sample, batch={**sample.batch, "index": np.arange(len(sample), dtype=np.int32)})


def predict(sample: Sample, params: Params, *, chunk_size: int = 64) -> np.ndarray:
    """Logits of every example: float32[N, C], or float32[N, P, C].

    Raises:
        DataError: there are no examples, or the outputs hold NaN.
    """
    if not len(sample):
        raise DataError(f"{sample.name}: there are no examples.")
    params = jax.tree.map(widen, params)
    parts = [
        np.asarray(_logits(sample.forward, params, chunk)) for chunk in sample.chunks(min(chunk_size, len(sample)))
    ]
    logits = np.concatenate(parts)[: len(sample)]
    if not np.isfinite(logits).all():
        raise DataError(f"{sample.name}: the network's outputs hold NaN or Inf.")
    return logits


@partial(jax.jit, static_argnames="forward")
def _logits(forward, params, batch):
    return ask(forward, params, batch).astype(jnp.float32)


def _shape_of(leaf):
    return jax.eval_shape(widen, jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)))


def widen(leaf: Leaf) -> jax.Array:
    """A float leaf in float32 at least, others as they are."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float32) if is_float(leaf) and leaf.dtype.itemsize < 4 else leaf
