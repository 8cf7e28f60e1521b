"""Recipes of merges as frozen records: mergekit's own schema, and what is added to it.

Added: `transport` of a model (fine-tuned from another base, carried over first) and its `data` (Fishers, Grams), `post`
(steps behind the method), `seed`, `preset` (conventions of a peer), `evaluate` (kept for the evaluation), `out_path`,
`data` (examples that decide on weights and options).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtune.recipes.examples import DataBlock
from jaxtune.recipes.nodes import Node, RecipeError
from jaxtune.recipes.parameters import Parameters
from jaxtune.recipes.references import ModelReference


@dataclass(frozen=True)
class Transport:
    """How a model that was fine-tuned from another base comes to the recipe's base.

    Attributes:
        base: What it was fine-tuned from.
        method: A key of `transport.registry.METHODS`.
        options: The method's own, and `scale`.
        node: Where it stands.
    """

    base: ModelReference
    method: str
    options: Mapping[str, Any]
    node: Node


@dataclass(frozen=True)
class Entry:
    """One model that goes in, or a run of its layers.

    Attributes:
        model: Which.
        parameters: Of this model alone.
        layer_range: First layer, and the one behind the last; None of whole models.
        transport: None where it was fine-tuned from the recipe's own base.
        data: File of what the method needs beside weights (Fishers, Grams), by the names of the model's tensors.
        node: Where it stands.
    """

    model: ModelReference
    parameters: Parameters
    layer_range: tuple[int, int] | None
    transport: Transport | None
    data: str | None
    node: Node


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, from as many layers of each of its sources."""

    sources: tuple[Entry, ...]
    base_model: ModelReference | None
    parameters: Parameters
    node: Node


@dataclass(frozen=True)
class Module:
    """One stack of layers of the output and what belongs to it: whole models, or slices; the other is None."""

    models: tuple[Entry, ...] | None
    slices: tuple[Slice, ...] | None
    parameters: Parameters
    node: Node


@dataclass(frozen=True)
class TokenRows:
    """Where the rows of one token come from.

    Attributes:
        kind: "model" (its own row of this token), "model_token" (the row of another token there), "zero", or "default"
            (as for tokens that are not listed).
        model: Of the first two.
        token, token_id: Of "model_token", one of the two.
        force: Whether models that know the token take these rows too.
        node: Where it stands.
    """

    kind: str
    model: ModelReference | None
    token: str | None
    token_id: int | None
    force: bool
    node: Node


@dataclass(frozen=True)
class Tokenizer:
    """Which tokenizer the output has: "base", "union" or that of a model; and rows of single tokens."""

    source: str | ModelReference
    tokens: Mapping[str, TokenRows]
    pad_to_multiple_of: int | None
    node: Node


@dataclass(frozen=True)
class Recipe:
    """One merge as it was asked for; exactly one of `models`, `slices` and `modules` is not None.

    Attributes:
        dtype: Of the arithmetic's inputs and, without `out_dtype`, of the output.
        post: Steps behind the method: (name, options), in order.
        evaluate: Kept as it is.
        plain: The whole recipe as plain values.
        folder: Of its file; relative paths are looked for there too.
        node: The top, for messages.
        data: Examples that decide on options, weights or what the method needs beside the models; None without.
    """

    merge_method: str
    models: tuple[Entry, ...] | None
    slices: tuple[Slice, ...] | None
    modules: Mapping[str, Module] | None
    base_model: ModelReference | None
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    name: str | None
    out_path: str | None
    preset: str | None
    seed: int
    post: tuple[tuple[str, Mapping[str, Any]], ...]
    evaluate: Any
    plain: Mapping[str, Any]
    node: Node = field(repr=False)
    folder: Path | None = None
    data: DataBlock | None = None

    def error_at(self, key: str, words: str) -> RecipeError:
        """What to raise about one of the top keys."""
        return self.node.value.get(key, self.node).error(words)
