"""Weighted averages of models."""

import numpy as np

from jaxtune.merge.affine import combine_linearly, is_known, sum_exactly
from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_linear(view: View, *, weight: tuple[float, ...] = 1.0, normalize: bool = True) -> Combine:
    """`Σ w_i θ_i`, divided by `Σ w_i` with `normalize`.

    Weights that sum to zero divide by zero, as plain arithmetic has it: infinity, or NaN where the sum is zero too;
    without `normalize` they make a difference.

    Reference:
        Wortsman et al. 2022, arXiv:2203.05482 (uniform weights); Utans 1996.
    """
    total = sum_exactly(weight) if normalize else 1.0
    return Combine(_divide_by_zero, (weight,)) if is_known(total, 0.0) else combine_linearly(weight, total=total)


def _divide_by_zero(elements: Elements, weight: tuple) -> Leaf:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sum(m * w for m, w in zip(elements.models, weight, strict=True)) / elements.xp.zeros((), elements.dtype)


LINEAR = Method(
    merge_linear,
    "weighted average",
    "arXiv:2203.05482",
    base="may",
    num_models=(1, None),
    per_model=("weight",),
)
