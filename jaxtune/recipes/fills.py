"""Rows that a source does not have, made of rows of others once weights may be read."""

from collections.abc import Callable

import numpy as np

from jaxtune.recipes.jobs import Source

# (model, name of a tensor, rows) -> those rows, in the stored dtype.
ReadRows = Callable[[int, str, np.ndarray], np.ndarray]
CHUNK = 4096  # rows at a time


def fill_rows(source: Source, read_rows: ReadRows) -> np.ndarray:
    """Values of the rows that are -1 in `source.rows`, in their order: what `Source.filler` holds.

    Args:
        source: With `rows` and `fills`.
        read_rows: Gives rows of a stored tensor, each call at most a few thousand.

    Shapes:
        result: float32[num missing rows, ...], float64 where a tensor is.
    """
    missing = np.flatnonzero(source.rows < 0)
    place = np.full(len(source.rows), -1, np.int64)
    place[missing] = np.arange(len(missing))
    one = read_rows(source.model, source.name, np.zeros(1, np.int64))
    filler = np.zeros((len(missing), *one.shape[1:]), _wide(one.dtype))
    for fill in source.fills:
        at = place[fill.rows]
        if fill.kind == "mean":
            for start in range(0, len(at), CHUNK):
                part = slice(start, start + CHUNK)
                filler[at[part]] = _mean(fill.donors, part, filler[at[part]], read_rows)
        elif fill.kind == "own_mean":
            filler[at] = _own_mean(source, fill, filler, place, read_rows)
    return filler


def _mean(donors, part, like, read_rows):
    """Mean of what the donors give, row by row."""
    total, count = np.zeros_like(like, np.float64), np.zeros(len(like), np.int64)
    for donor in donors:
        rows = donor.rows[part]
        has = rows >= 0
        if has.any():
            total[has] += read_rows(donor.model, donor.name, rows[has]).astype(np.float64)
            count += has
    return total / np.maximum(count, 1).reshape(-1, *[1] * (like.ndim - 1))


def _own_mean(source, fill, filler, place, read_rows):
    """Mean of all rows but those that this fill is for."""
    rest = np.setdiff1d(np.arange(len(source.rows)), fill.rows)
    total = np.zeros(filler.shape[1:], np.float64)
    for start in range(0, len(rest), CHUNK):
        rows = rest[start : start + CHUNK]
        own = source.rows[rows]
        if (own >= 0).any():
            total += read_rows(source.model, source.name, own[own >= 0]).astype(np.float64).sum(0)
        total += filler[place[rows[own < 0]]].astype(np.float64).sum(0)
    return total / max(len(rest), 1)


def _wide(dtype):
    return np.float64 if dtype == np.float64 else np.float32
