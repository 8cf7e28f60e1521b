"""Which coordinates of a tree count most, and how much two choices of them have in common."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxtune.errors import ConfigError


def matching(paths: Iterable[str], pattern: str | None, option: str) -> list[str]:
    """Paths that a regular expression fits as a whole; none where there is no expression.

    Args:
        option: What errors call the expression.

    Raises:
        ConfigError: it is no regular expression.
    """
    if pattern is None:
        return []
    try:
        fits = re.compile(pattern).fullmatch
    except re.error as error:
        raise ConfigError(f"{option}={pattern!r} is no regular expression: {error}.") from error
    return [path for path in paths if fits(path)]


def largest(values: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The `count` greatest entries of all leaves together; of equal ones the first, in the order of the mapping.

    Args:
        values: {path: float}, none NaN.
        count: From 0 to the number of entries.

    Shapes:
        result[path]: bool, as `values[path]`; `count` are True in all.
    """
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in values.values()]) if values else np.zeros(0)
    is_kept = np.zeros(flat.size, bool)
    if count:
        threshold = np.partition(flat, flat.size - count)[flat.size - count]
        is_kept = flat > threshold
        is_kept[np.flatnonzero(flat == threshold)[: count - int(is_kept.sum())]] = True
    result, start = {}, 0
    for path, leaf in values.items():
        result[path] = is_kept[start : start + leaf.size].reshape(leaf.shape)
        start += leaf.size
    return result


def count_true(mask: Mapping[str, np.ndarray]) -> int:
    """Entries that are True, of all leaves."""
    return sum(int(np.count_nonzero(leaf)) for leaf in mask.values())


def overlaps(masks: Sequence[Mapping[str, np.ndarray]]) -> list[list[float]]:
    """`|a ∩ b| / min(|a|, |b|)` of every two masks over the same leaves; 0 where one is empty."""

    def overlap(a, b):
        shared = sum(int(np.count_nonzero(leaf & b[path])) for path, leaf in a.items())
        smaller = min(count_true(a), count_true(b))
        return shared / smaller if smaller else 0.0

    return [[overlap(a, b) for b in masks] for a in masks]
