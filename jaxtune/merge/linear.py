"""Weighted averages of models."""

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
    return Combine(sum_weighted, (tuple(weight), total))


def sum_weighted(elements: Elements, weight: tuple, total: float) -> Leaf:
    """`Σ w_i θ_i / total`, with the division last: equal models average to themselves."""
    merged = elements.models[0] * weight[0]
    for model, factor in zip(elements.models[1:], weight[1:], strict=True):
        merged = merged + model * factor
    return merged / total


LINEAR = Method(
    merge_linear,
    "weighted average",
    "arXiv:2203.05482",
    base="may",
    num_models=(1, None),
    per_model=("weight",),
)
