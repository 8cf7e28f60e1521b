"""Texts as a model takes them in: token ids and which of them are real."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.errors import DataError
from jaxtune.rng import named_key


def text_of(
    batch: Mapping[str, Any],
    *,
    vocab_size: int,
    max_length: int | None = None,
    text_name: str = "text",
    mask_name: str = "mask",
) -> tuple[jax.Array, jax.Array]:
    """The texts of a batch and their mask.

    Args:
        batch: Holds int[N, L] under `text_name` and bool[N, L], True where a token is real, under `mask_name`; without
            the second all are.
        vocab_size: Ids lie below. Traced ones cannot be looked at; the table must read NaN for them.
        max_length: The greatest L, None for any.

    Shapes:
        result: int[N, L], bool[N, L].

    Raises:
        DataError: no text, another shape, floats, ids outside the vocabulary, a text too long, or a mask that is none.
    """
    if text_name not in batch:
        raise DataError(f'the batch has no "{text_name}"; it has: {", ".join(batch) or "nothing"}.')
    text = batch[text_name]
    if text.ndim != 2 or text.dtype.kind not in "iu" or not text.shape[1] or text.shape[1] > (max_length or np.inf):
        bound = "" if max_length is None else f" with L at most {max_length}"
        raise DataError(
            f'batch["{text_name}"] is {tree.describe_leaf(text)}, the model takes int[N, L]{bound}. '
            "Use the tokenizer and the context of this checkpoint."
        )
    if not isinstance(text, jax.core.Tracer) and text.size and not 0 <= text.min() <= text.max() < vocab_size:
        raise DataError(
            f'batch["{text_name}"] has ids {text.min()} to {text.max()}, the vocabulary 0 to {vocab_size - 1}. '
            "Use the tokenizer of this checkpoint, and ids inside it for padding too."
        )
    mask = batch.get(mask_name)
    if mask is None:
        return jnp.asarray(text), jnp.ones(text.shape, bool)
    if mask.shape != text.shape or mask.dtype.kind not in "biu":
        raise DataError(
            f'batch["{mask_name}"] is {tree.describe_leaf(mask)}, the model takes bool{list(text.shape)}: '
            "True where a token is real."
        )
    return jnp.asarray(text), jnp.asarray(mask).astype(bool)


def draw_text(key: jax.Array, size: int, length: int, vocab_size: int) -> dict[str, jax.Array]:
    """Random texts for comparing two networks; the first is whole, the others end anywhere in their second half.

    Shapes:
        result["text"]: int32[size, length]; result["mask"]: bool[size, length], False behind a text's end.
    """
    text = jax.random.randint(named_key(key, "text"), (size, length), 0, vocab_size, jnp.int32)
    lengths = jax.random.randint(named_key(key, "length"), (size,), (length + 1) // 2, length + 1, jnp.int32)
    lengths = jnp.where(jnp.arange(size) == 0, length, lengths)
    return {"text": text, "mask": jnp.arange(length, dtype=jnp.int32)[None] < lengths[:, None]}
