"""Model Stock: from the base towards the average of the models, as far as their angles say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.merge.affine import combine_linearly
from jaxtune.merge.angles import root
from jaxtune.merge.method import Method, Unit
from jaxtune.merge.sums import gram
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

SMALL = 1e-6  # products of two lengths, and denominators, below it: as mergekit has it


def merge_model_stock(view: View, *, filter_wise: bool = False) -> Combine:
    """`t · mean(θ_i) + (1 - t) θ_0` with `t = N c / (1 + (N - 1) c)`, c the mean cosine between task vectors.

    Args:
        view: Of the leaf.
        filter_wise: Every row of a matrix, all inputs of one output, has its own t; otherwise the leaf has one.

    Where the denominator vanishes, the base stays. A product of two lengths below 1e-6 counts as 1e-6, so that very
    short task vectors count as less parallel than they are.

    Reference:
        Jang et al. 2024, arXiv:2403.19522; mergekit 0.1.5, whose mean over pairs extends the paper to any number.
    """
    if filter_wise:
        return Combine(_join_rows)
    products, count = view.reduce(gram, of="deltas"), view.num_models
    pairs = [(products[i, i], products[j, j], products[i, j]) for i in range(count) for j in range(i + 1, count)]
    ratio = find_ratio(view.xp, pairs, count)
    return combine_linearly([ratio / count] * count, 1 - ratio)


def find_ratio(xp: Any, pairs: Sequence[tuple[Any, Any, Any]], count: int) -> Any:
    """t, from both squares and the product of every pair of task vectors; numbers or arrays of them."""
    cosine = 0.0
    for one, other, product in pairs:
        cosine = cosine + xp.clip(product / xp.maximum(root(xp, one) * root(xp, other), SMALL), -1.0, 1.0)
    cosine = cosine / len(pairs)
    denominator = 1 + (count - 1) * cosine
    is_singular = xp.abs(denominator) < SMALL
    return xp.where(is_singular, 0.0, count * cosine / xp.where(is_singular, 1.0, denominator))


def _join_rows(elements: Elements) -> Leaf:
    xp, deltas, count = elements.xp, elements.deltas, len(elements.models)
    wide = np.float64 if xp is np else None
    product = {
        (i, j): xp.sum(deltas[i] * deltas[j], axis=1, keepdims=True, dtype=wide)
        for i in range(count)
        for j in range(i, count)
    }
    pairs = [(product[i, i], product[j, j], product[i, j]) for i in range(count) for j in range(i + 1, count)]
    ratio = find_ratio(xp, pairs, count).astype(deltas[0].dtype)
    merged = deltas[0]
    for delta in deltas[1:]:
        merged = merged + delta
    return elements.base + merged * (ratio / count)


def _unit(options: Mapping[str, Any]) -> Unit:
    return "row" if options["filter_wise"] else "element"


MODEL_STOCK = Method(
    merge_model_stock,
    "from the base towards the average, as far as the angles between task vectors say",
    "arXiv:2403.19522",
    unit=_unit,
    num_models=(2, None),
)
