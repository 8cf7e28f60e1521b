"""Bases whose vocabularies differ: rows of embeddings and heads are matched by token, never by chance."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxtune.lazy import LazyLeaf, is_lazy, read
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Leaf, Params

Tokens = Mapping[str, int] | None


@dataclass(frozen=True)
class RowMap:
    """Where each row of one vocabulary stands in another.

    Attributes:
        rows: int64[rows of the target]; the row of the source that stands for the same token, -1 where there is none.
        statement: What was matched and by what, in words.
        num_lost: Rows of the source that no row of the target takes.
    """

    rows: np.ndarray
    statement: str
    num_lost: int

    @property
    def is_identity(self) -> bool:
        """Whether every row stays where it is and none is missing."""
        return self.num_lost == 0 and np.array_equal(self.rows, np.arange(len(self.rows)))


def map_rows(source: Tokens, source_rows: int, target: Tokens, target_rows: int) -> RowMap:
    """Matches the rows of two vocabularies: by token where both tokenizers are known, else by their number.

    Args:
        source, target: Token -> row; None where no tokenizer lies beside the weights.
        source_rows, target_rows: Rows of the embeddings, which may be more than there are tokens (padding).

    Returns:
        Rows without a token (padding) match by number only where both have none there.
    """
    if source is None or target is None:
        shared = min(source_rows, target_rows)
        rows = np.where(np.arange(target_rows) < shared, np.arange(target_rows), -1)
        lost = source_rows - shared
        whose = "neither checkpoint has" if source is None and target is None else "one checkpoint lacks"
        statement = f"rows by number, {whose} a tokenizer file: {shared} of {target_rows} rows of the target"
        return RowMap(rows, statement, lost)
    rows = np.full(target_rows, -1, np.int64)
    for token, row in target.items():
        there = source.get(token, -1)
        if row < target_rows and 0 <= there < source_rows:
            rows[row] = there
    num_tokens = int((rows >= 0).sum())
    unnamed = np.setdiff1d(np.arange(min(source_rows, target_rows)), [*source.values(), *target.values()])
    rows[unnamed] = unnamed
    lost = source_rows - len(np.unique(rows[rows >= 0]))
    statement = f"rows by token: {num_tokens} of the {len(target)} tokens of the target are known to the source"
    return RowMap(rows, statement, lost)


def take_rows(params: Params, axes: Mapping[str, int], rows: np.ndarray) -> dict:
    """The tree with its vocabulary in another order; rows that are missing (-1) are zero.

    Args:
        params: Tree of any vocabulary.
        axes: Path -> axis that the vocabulary runs along.
        rows: int64[n]; the leaves come back with n rows.
    """

    def take(leaf: Leaf, axis: int) -> Leaf:
        taken = np.take(np.asarray(leaf), np.maximum(rows, 0), axis=axis)
        taken[(slice(None),) * axis + (rows < 0,)] = 0
        return taken

    def move(path: str, leaf: Leaf) -> Leaf:
        if path not in axes:
            return leaf
        axis = axes[path]
        if not is_lazy(leaf):
            return take(leaf, axis)
        shape = (*leaf.shape[:axis], len(rows), *leaf.shape[axis + 1 :])
        return LazyLeaf(shape, leaf.dtype, lambda: take(read(leaf), axis))

    return unflatten({path: move(path, leaf) for path, leaf in flatten(params).items()})
