"""Sums and inner products of runs of elements, accurate and fast on the host."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.merge.view import Elements
from jaxtune.types import Leaf

INNER = 4096  # elements whose products are added up in float32
ONES = np.ones(INNER, np.float32)


def sum_wide(elements: Elements, values: Leaf) -> Leaf:
    """Sum of one array, in float64 but for the innermost 4096 of it."""
    return dot_wide(elements, values, None)


def dot_wide(elements: Elements, first: Leaf, second: Leaf | None) -> Leaf:
    """Inner product of two arrays of a run (None: of ones), in float64 but for the innermost 4096 of it.

    Of float32 numbers NumPy has inner products of rows several times as fast as a product, or a sum, in float64; what
    4096 of them lose, added up in dozens of lanes, is about 1e-7 of the product of their lengths, 5e-7 where all are
    equal.
    """
    xp = elements.xp
    if xp is not np:
        return xp.sum(first if second is None else first * second)
    if first.dtype != np.float32:
        return np.sum(first if second is None else first * second, dtype=np.float64)
    first = first.reshape(-1)
    second = None if second is None else second.reshape(-1)
    whole = first.size // INNER * INNER
    rows = np.vecdot(first[:whole].reshape(-1, INNER), ONES if second is None else second[:whole].reshape(-1, INNER))
    total = np.add.reduce(rows, dtype=np.float64)
    if whole < first.size:
        total += np.vecdot(first[whole:], ONES[: first.size - whole] if second is None else second[whole:])
    return total


def gram(elements: Elements, of: str = "models") -> Leaf:
    """Inner products of the models ("models"), of the task vectors ("deltas") or of base and models ("all").

    Shapes:
        result: float64[k, k], symmetric; "all" has the base first.
    """
    arrays: Sequence[Leaf] = {"models": lambda: elements.models, "deltas": lambda: elements.deltas}.get(
        of, lambda: (elements.base, *elements.models)
    )()
    xp, n = elements.xp, len(arrays)
    entries = {(i, j): dot_wide(elements, arrays[i], arrays[j]) for i in range(n) for j in range(i, n)}
    return stack_numbers(xp, [[entries[min(i, j), max(i, j)] for j in range(n)] for i in range(n)])


def stack_numbers(xp: Any, rows: Sequence[Sequence[Any]]) -> Leaf:
    """A matrix of single numbers; NumPy's `stack` takes ten times as long for a few as it takes to make an array."""
    return np.array(rows) if xp is np else xp.stack([xp.stack(list(row)) for row in rows])
