"""Isotropic merging: all directions of the merged update equally strong."""

import numpy as np

from jaxtune.merge.factors import (
    add_matrix,
    check_others,
    each_matrix,
    is_matrix,
    merge_others,
    sum_matrices,
    top_factors,
)
from jaxtune.merge.long import flatten_long
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.polar import multiply, polar
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_iso_c(view: View, *, lambda_: float = 1.0, others: str = "average") -> Combine:
    """`θ_0 + λ σ̄ U Vᵀ` of `Σ τ_t = U Σ Vᵀ`, σ̄ the mean of its min(m, n) singular values.

    Without an SVD: with Q the polar factor, the sum of the singular values is the inner product of Q and Σ τ.

    Args:
        view: Of the models.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Marczak et al. 2025, arXiv:2502.04959. Differs: directions where the sum is zero stay zero;
        an SVD gives them arbitrary vectors at full strength.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    if view.unit == "row" and view.xp is np:
        return flatten_long(view, lambda_)
    return Combine(_flatten_spectrum, (lambda_,), (("input_axis", -1 if view.unit == "row" else view.input_axis),))


def merge_iso_cts(
    view: View, *, common_fraction: float = 0.8, lambda_: float = 1.0, others: str = "average"
) -> Combine:
    """Iso-C on the common directions and, in the rest, on each task's own.

    The strongest `common_fraction` of the directions of `Σ τ_t` are common. From each τ_t what lies in their left
    space is taken off, and its strongest directions share what is left of the rank. All vectors together are made
    orthonormal, left ones and right ones, and all singular values are set to their mean.

    Args:
        view: Of the models.
        common_fraction: 0 to 1. The rest is rounded to a multiple of the number of tasks.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Marczak et al. 2025, arXiv:2502.04959, Algorithm 2.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    common, own = split_rank(min(view.shape), view.num_models, common_fraction)
    constants = (("input_axis", view.input_axis), ("common", common), ("own", own))
    return Combine(_flatten_common_and_own, (lambda_,), constants)


def split_rank(rank: int, num_tasks: int, common_fraction: float) -> tuple[int, int]:
    """(common directions, directions of each task): together at most the rank."""
    own = round((rank - int(rank * common_fraction)) / num_tasks)
    own = min(own, rank // num_tasks)  # rounding up must not ask for more directions than there are
    return rank - own * num_tasks, own


def _flatten_spectrum(elements: Elements, scale: float, input_axis: int) -> Leaf:
    total = sum_matrices(elements, input_axis)
    factor = polar(elements.xp, total)
    mean = elements.xp.sum(factor * total) / max(min(total.shape), 1)
    return add_matrix(elements, factor, mean * scale, input_axis)


def _flatten_common_and_own(elements: Elements, scale: float, input_axis: int, common: int, own: int) -> Leaf:
    xp = elements.xp
    lefts, values, rights = ([part] for part in top_factors(xp, sum_matrices(elements, input_axis), common))
    shared = lefts[0]
    for matrix in each_matrix(elements, input_axis):
        left, value, right = top_factors(xp, matrix - multiply(xp, shared, multiply(xp, shared.T, matrix)), own)
        lefts.append(left)
        values.append(value)
        rights.append(right)
    left, right = (polar(xp, xp.concatenate(parts, axis=1)) for parts in (lefts, rights))
    mean = xp.mean(xp.concatenate(values))
    return add_matrix(elements, multiply(xp, left, right.T), mean * scale, input_axis)


def _check_iso_cts(options):
    check_others(options)
    check_between(options, "common_fraction", 0, 1)


ISO_C = Method(
    merge_iso_c,
    "summed task vectors with a flat spectrum",
    "arXiv:2502.04959",
    unit="leaf",
    by_rows=True,
    check=check_others,
)
ISO_CTS = Method(
    merge_iso_cts,
    "common and task-specific directions with a flat spectrum",
    "arXiv:2502.04959",
    unit="leaf",
    check=_check_iso_cts,
)
