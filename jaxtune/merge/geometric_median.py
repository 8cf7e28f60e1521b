"""The geometric median: the point whose distances to all models sum to the least; one odd model hardly moves it."""

from typing import Any

import numpy as np

from jaxtune.merge.affine import combine_linearly, sum_exactly, take
from jaxtune.merge.angles import root
from jaxtune.merge.karcher import repeat
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.sums import dot_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_geometric_median(
    view: View, *, weight: tuple[float, ...] = 1.0, max_iter: int = 100, eps: float = 1e-6
) -> Combine:
    """`argmin_m Σ w_k ‖θ_k - m‖` over the whole leaf, by Weiszfeld's steps from the weighted mean.

    Every step is a mean of the models, each weighted by one over its distance, so that inner products of their
    differences are all that is needed: the search runs on coefficients.

    Args:
        view: Of the leaf.
        weight: Of each model.
        max_iter: Steps.
        eps: Shorter distances count as this long.

    Reference:
        Weiszfeld 1937; sd-mecha `geometric_median`, which has no weights and stops early where the sum of distances
        falls no more.
    """
    if view.num_models == 1:
        return take(0)
    products = view.reduce(_products_from_first)
    xp = view.xp
    weights = xp.stack([xp.asarray(one, products.dtype) for one in weight]) / sum_exactly(weight)
    own = xp.diagonal(products)

    def step(_, mean):
        reached = products @ mean
        distances = root(xp, own - 2 * reached + mean @ reached)
        pull = weights / xp.maximum(distances, eps)
        return pull / pull.sum()

    found = repeat(xp, max_iter, step, weights)
    return combine_linearly(tuple(found[k] for k in range(view.num_models)))


def _products_from_first(elements: Elements) -> Leaf:
    """Inner products of the models counted from the first one: what they have in common costs no digits."""
    xp, n = elements.xp, len(elements.models)
    away = [model - elements.models[0] for model in elements.models]
    entries = {(i, j): dot_wide(elements, away[i], away[j]) for i in range(n) for j in range(i, n)}
    return xp.stack([xp.stack([entries[min(i, j), max(i, j)] for j in range(n)]) for i in range(n)])


def _check(options: Any) -> None:
    check_between(options, "weight", 0, np.inf)
    check_between(options, "eps", 1e-30, np.inf)
    check_between(options, "max_iter", 1, np.inf)


GEOMETRIC_MEDIAN = Method(
    merge_geometric_median,
    "the point nearest to all models, distances summed and not squared",
    "Weiszfeld 1937",
    base="none",
    per_model=("weight",),
    check=_check,
)
