"""Task vectors cut to their strongest directions: STAR and CART."""

import math

import numpy as np

from jaxtune.merge.factors import add_matrix, check_others, each_matrix, is_matrix, merge_others, top_factors
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.polar import multiply
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_star(view: View, *, share: float = 0.4, lambda_: float = 1.0, others: str = "average") -> Combine:
    """`θ_0 + (λ / T) Σ U_r (‖σ‖₁ / ‖σ_{1..r}‖₁) diag(σ_{1..r}) V_rᵀ`: truncated, with its nuclear norm restored.

    Args:
        view: Of the models.
        share: r is the least for which `σ_1 + … + σ_r` is this part of the sum of all.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Lee et al. 2025, arXiv:2502.10339, η = 40 %.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    return Combine(_average_truncated, (lambda_,), (("input_axis", view.input_axis), ("share", share)))


def merge_cart(view: View, *, rank_share: float = 0.08, lambda_: float = 1.0, others: str = "average") -> Combine:
    """`θ̄ + λ Σ_t SVD_k(θ_t - θ̄)`: the average, and what sets each model apart from it, truncated to rank k.

    Args:
        view: Of the models; a base is not looked at.
        rank_share: k is this part of min(m, n), rounded up. At 1 the truncated parts sum to nothing.
        lambda_: Scale of the parts.
        others: Of leaves that are no matrices: "average" is θ̄; "sum" and "base" need a base.

    Reference:
        Choi et al. 2024, arXiv:2412.12153.
    """
    if not is_matrix(view):
        return merge_others(view, others, 1.0) if view.has_base else Combine(_average_models)
    kept = math.ceil(rank_share * min(view.shape) - 1e-9)
    return Combine(_add_centred, (lambda_,), (("input_axis", view.input_axis), ("kept", kept)))


def _average_truncated(elements: Elements, scale: float, input_axis: int, share: float) -> Leaf:
    xp, total = elements.xp, 0.0
    for matrix in each_matrix(elements, input_axis):
        left, values, right = top_factors(xp, matrix, exact_tail=False)
        sums = xp.cumsum(values)
        nuclear = sums[-1:]
        # The first place at which the sum reaches the share is kept, and all before it.
        is_kept = sums - values < share * nuclear
        kept = xp.where(is_kept, values, xp.zeros((), values.dtype))
        below = xp.sum(kept)
        kept = kept * (nuclear / xp.where(below > 0, below, 1.0))
        if xp is np:
            rank = int(np.count_nonzero(kept))
            left, kept, right = left[:, :rank], kept[:rank], right[:, :rank]
        total = total + multiply(xp, left * kept[None, :], right.T)
    return add_matrix(elements, total, scale / len(elements.models), input_axis)


def _average_models(elements: Elements) -> Leaf:
    return sum(elements.models[1:], elements.models[0]) / len(elements.models)


def _add_centred(elements: Elements, scale: float, input_axis: int, kept: int) -> Leaf:
    xp, count = elements.xp, len(elements.models)
    # Counted from the first model: what they have in common costs no digits.
    origin = Elements(xp, elements.models, elements.models[0], elements.start, elements.streams)
    mean = sum(each_matrix(origin, input_axis)) / count
    merged = mean
    for matrix in each_matrix(origin, input_axis):
        left, values, right = top_factors(xp, matrix - mean, kept)
        merged = merged + multiply(xp, left * values[None, :], right.T) * scale
    return add_matrix(origin, merged, 1.0, input_axis)


def _check_star(options):
    check_others(options)
    check_between(options, "share", 0, 1)


def _check_cart(options):
    check_others(options)
    check_between(options, "rank_share", 0, 1)


STAR = Method(
    merge_star,
    "average of task vectors cut to part of their nuclear norm, and rescaled",
    "arXiv:2502.10339",
    unit="leaf",
    check=_check_star,
)
CART = Method(
    merge_cart,
    "average plus what sets each model apart, cut in rank",
    "arXiv:2412.12153",
    unit="leaf",
    base="may",
    num_models=(1, None),
    check=_check_cart,
)
