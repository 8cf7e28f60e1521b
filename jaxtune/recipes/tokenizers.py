"""The vocabulary of the output: rows of tables and heads follow their tokens, as index arrays and never as matrices.

A model that lacks a token of the output gets a row for it, so that all models have one to merge: what the recipe says
of the token, else the row of the only model that knows it, else the base's, else the mean of all that know it, else
zero. Rows to pad with are the mean of all others. As mergekit does, but for the order of tokens that a union adds:
by model, and in each by its rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.checkpoint.vocabulary import read_tokens
from jaxtune.recipes.jobs import Donor, Fill, Source
from jaxtune.recipes.opening import Opened
from jaxtune.recipes.references import ModelReference
from jaxtune.recipes.schema import Tokenizer, TokenRows
from jaxtune.recipes.tokenizer_files import added_entries, plain_entry
from jaxtune.recipes.vocabularies import find_table


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of the output and where their rows come from.

    Attributes:
        tokens: Token -> row of the output.
        num_rows: With those to pad with.
        base: Model whose rows go first where several know a token.
        rows: Of every model: its row for each token of the output, -1 for none; int64[num_rows].
        sizes: Of every model: how many rows it has.
        chosen: Row of the output -> (model, its row) or None for zero: what the recipe says of single tokens.
        forced: Rows of the output that all models take from `chosen`.
        padding: Rows of the output that have no token and are padded.
        files_of: Model whose tokenizer files the output has.
        added: Entries to add to those files; `dropped`: tokens to take out of them.
        notes: What a reader should know.
    """

    tokens: Mapping[str, int]
    num_rows: int
    base: int
    rows: Mapping[int, np.ndarray]
    sizes: Sequence[int]
    chosen: Mapping[int, tuple[int, int] | None]
    forced: np.ndarray
    padding: np.ndarray
    files_of: int
    added: tuple[Mapping[str, Any], ...]
    dropped: frozenset[str]
    notes: tuple[str, ...]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def find_sources(self, models: Sequence[int], names: Sequence[str]) -> list[Source]:
        """Sources of one tensor with a row a token.

        Args:
            models: Those that go into it.
            names: Of the tensor in each.
        """
        key = tuple(models)
        if key not in self._made:
            self._made[key] = self._plan(key)
        donors, missing = self._made[key]
        name_of = dict(zip(models, names, strict=True))
        sources = []
        for model in models:
            own = np.where(missing[model], -1, self.rows[model])
            lacking = np.flatnonzero(missing[model])
            is_padding = np.isin(lacking, self.padding)
            lacking, padded = lacking[~is_padding], lacking[is_padding]
            given = np.zeros(len(lacking), bool)
            parts = {}
            for donor in models:
                rows = donors[donor][lacking]
                given |= rows >= 0
                parts[donor] = rows
            fills = []
            if given.any():
                mean = tuple(
                    Donor(donor, name_of[donor], rows[given])
                    for donor, rows in parts.items()
                    if (rows[given] >= 0).any()
                )
                fills.append(Fill(lacking[given], "mean", mean))
            if not given.all():
                fills.append(Fill(lacking[~given], "zero"))
            if len(padded):
                fills.append(Fill(padded, "own_mean"))
            is_same = len(own) == self.sizes[model] and not fills and np.array_equal(own, np.arange(len(own)))
            sources.append(Source(model, name_of[model], None if is_same else own, fills=tuple(fills)))
        return sources

    def _plan(self, models):
        """(model -> rows it gives, model -> which rows it lacks) for the models of one tensor."""
        knows = {model: self.rows[model] >= 0 for model in models}
        base_knows = knows.get(self.base, np.zeros(self.num_rows, bool))
        donors = {
            model: np.where(base_knows & (model != self.base), -1, self.rows[model]).astype(np.int64)
            for model in models
        }
        for row, chosen in self.chosen.items():
            for model in models:
                donors[model][row] = chosen[1] if chosen is not None and chosen[0] == model else -1
        missing = {model: ~knows[model] | self.forced for model in models}
        return donors, missing

    def lacking_models(self, models: Sequence[int]) -> list[int]:
        """Models whose rows the recipe asks for and that do not go into a tensor."""
        asked = {chosen[0] for chosen in self.chosen.values() if chosen is not None}
        return sorted(asked - set(models))


def plan_vocabulary(
    block: Tokenizer,
    models: Sequence[Opened],
    index_of: Mapping[ModelReference, int],
    base: int,
    involved: Sequence[int],
    problems: list[str],
) -> Vocabulary | None:
    """The vocabulary that a recipe asks for; None where it cannot be made, which `problems` then says.

    Args:
        block: Of the recipe.
        models: All of the recipe.
        index_of: Model -> its index.
        base: Index of the base, or of the first model.
        involved: Models that go into the result: a union holds their tokens, and not those of a model's former base.
    """
    notes: list[str] = []
    known: list[dict[str, int] | None] = [read_tokens(model.side_files) for model in models]
    sizes = [_num_rows(model) for model in models]
    source = base if isinstance(block.source, str) else index_of[block.source]
    for needed in {base, source}:
        if known[needed] is None:
            problems.append(
                f"{models[needed].label}: no tokenizer.json, vocab.json or vocab.txt, so that its tokens are not "
                "known. Save its tokenizer in the fast format first."
            )
            return None
    used = [
        {token: row for token, row in (tokens if tokens is not None else known[base]).items() if row < size}
        for tokens, size in zip(known, sizes, strict=True)
    ]
    for at in involved:
        if known[at] is None:
            notes.append(f"{models[at].label} has no tokenizer; its rows are taken for those of {models[base].label}")
    # A model that is named for its tokenizer keeps tokens beyond its rows, as mergekit has it; a base's are dropped.
    vocabulary = dict(used[base] if isinstance(block.source, str) else known[source])
    dropped = frozenset(known[source].keys() - vocabulary.keys())
    added: list[Mapping[str, Any]] = []
    if block.source == "union":
        order = [base, *(at for at in involved if at != base)]
        entries = {at: added_entries(models[at].side_files) for at in order}
        for is_added in (False, True):
            for at in order:
                for token in sorted(used[at], key=used[at].__getitem__):
                    if token not in vocabulary and (token in entries[at]) == is_added:
                        _append(vocabulary, added, entries[at].get(token) or plain_entry(token))
    for token in block.tokens:
        if token not in vocabulary:
            _append(vocabulary, added, plain_entry(token))
    num_tokens = max(vocabulary.values()) + 1
    multiple = block.pad_to_multiple_of or 1
    num_rows = -(-num_tokens // multiple) * multiple
    rows = {}
    for at, tokens in enumerate(used):
        rows[at] = np.full(num_rows, -1, np.int64)
        for token, row in vocabulary.items():
            rows[at][row] = tokens.get(token, -1)
    chosen: dict[int, tuple[int, int] | None] = {}
    forced = np.zeros(num_rows, bool)
    for token, said in block.tokens.items():
        if said.kind == "default":
            continue
        row = vocabulary[token]
        forced[row] = said.force
        try:
            chosen[row] = _choose(token, said, models, index_of, used, sizes)
        except ValueError as error:
            problems.append(said.node.error(str(error)).args[0])
    for at in involved:
        lost = sizes[at] - len(np.unique(rows[at][rows[at] >= 0]))
        if lost:
            notes.append(
                f"{models[at].label}: {lost} of {sizes[at]} rows stand for no token of the result and are left out"
            )
    return Vocabulary(
        tokens=vocabulary,
        num_rows=num_rows,
        base=base,
        rows=rows,
        sizes=sizes,
        chosen=chosen,
        forced=forced,
        padding=np.arange(num_tokens, num_rows),
        files_of=source,
        added=tuple(added),
        dropped=dropped,
        notes=tuple(notes),
    )


def _append(vocabulary, added, entry):
    """A token behind all others."""
    row = max(vocabulary.values(), default=-1) + 1
    vocabulary[entry["content"]] = row
    added.append({**entry, "id": row})


def _choose(token: str, said: TokenRows, models, index_of, used, sizes) -> tuple[int, int] | None:
    """(model, row) that a recipe names for a token."""
    if said.kind == "zero":
        return None
    at = index_of.get(said.model)
    if at is None:
        raise ValueError(f"{str(said.model)!r} is none of the recipe's models.")
    wanted = said.token if said.kind == "model_token" and said.token is not None else token
    row = said.token_id if said.token_id is not None else used[at].get(wanted)
    if row is None:
        raise ValueError(f"{models[at].label} has no token {wanted!r}.")
    if not 0 <= row < sizes[at]:
        raise ValueError(f"token_id {row}, and {models[at].label} has {sizes[at]} rows.")
    return at, row


def _num_rows(model) -> int:
    table = find_table(model.tensors)
    return model.tensors[table].shape[0] if table is not None else 0
