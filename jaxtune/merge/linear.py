"""Weighted averages of models."""

import math

from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_linear(view: View, *, weight: tuple[float, ...] = 1.0, normalize: bool = True) -> Combine:
    """`Σ w_i θ_i`, divided by `Σ w_i` with `normalize`.

    Weights that sum to zero divide by zero, as plain arithmetic has it; without `normalize` they make a difference.

    Reference:
        Wortsman et al. 2022, arXiv:2203.05482 (uniform weights); Utans 1996.
    """
    total = sum(weight) if normalize else 1.0
    return Combine(sum_weighted, (tuple(divide(one, total) for one in weight),))


def sum_weighted(elements: Elements, weight: tuple) -> Leaf:
    """`Σ w_i θ_i`."""
    merged = elements.models[0] * weight[0]
    for model, factor in zip(elements.models[1:], weight[1:], strict=True):
        merged += model * factor
    return merged


def divide(weight: float, total: float) -> float:
    """A share of a total; of zero what floating point has: infinity, or NaN."""
    return weight / total if total else math.inf * weight


LINEAR = Method(
    merge_linear,
    "weighted average",
    "arXiv:2203.05482",
    base="may",
    num_models=(1, None),
    per_model=("weight",),
)
