"""Steps on the spectrum of a merged update: raised where it has collapsed, lowered where tasks counted twice."""

from collections.abc import Mapping
from typing import Any

from jaxtune.merge.factors import (
    add_matrix,
    check_others,
    each_matrix,
    is_matrix,
    merge_others,
    top_factors,
)
from jaxtune.merge.inside import check_inner, freeze_inner, merge_inside
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.polar import multiply
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_calibrated(
    view: View,
    *,
    inside: str = "task_arithmetic",
    inside_options: Mapping[str, Any] | None = None,
    alpha: float = 1.0,
    lambda_: float = 1.0,
    others: str = "average",
) -> Combine:
    """Singular value calibration: directions that several tasks strengthen are brought back to one task's strength.

    With `τ_m = U Σ Vᵀ` of the merged model, `a_r = u_rᵀ τ_m` and `a_r^t = u_rᵀ τ_t`: `s_r^t = ⟨a_r, a_r^t⟩ / ‖a_r^t‖²`
    and `σ_r ← σ_r T / Σ_t max(α, s_r^t)`. With α = 1 no singular value grows.

    Args:
        view: Of the models.
        inside: The method that merges before.
        inside_options: Its options.
        alpha: Least strength that a task is taken to have.
        lambda_: Scale of the calibrated update.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Li et al. 2026, arXiv:2602.05536, on the left singular vectors of the merged update. FusionBench
        projects each task on singular vectors of its own instead.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    inner = freeze_inner(inside, inside_options, view)
    return Combine(_calibrate, (alpha, lambda_), (("input_axis", view.input_axis), ("inner", inner)))


def merge_boosted(
    view: View,
    *,
    inside: str = "task_arithmetic",
    inside_options: Mapping[str, Any] | None = None,
    beta: float = 0.01,
    lambda_: float = 1.0,
    others: str = "average",
) -> Combine:
    """Subspace boosting after another method: see `boost_merged`.

    Reference:
        Skorobogat et al. 2025, arXiv:2506.16506.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    inner = freeze_inner(inside, inside_options, view)
    return Combine(_merge_and_boost, (beta, lambda_), (("input_axis", view.input_axis), ("inner", inner)))


def boost_merged(view: View, *, beta: float = 0.01) -> Combine:
    """Subspace boosting, of one model that was merged: `σ_r ← max(σ_r, σ_c)` in the update from the base.

    c is the first place at which `σ_1 + … + σ_c` is `beta` of the sum of all; at 0 that is the first, and the spectrum
    is flat. Leaves that are no matrices stay.

    Reference:
        Skorobogat et al. 2025, arXiv:2506.16506. Differs: directions where the update is zero stay zero.
    """
    if not is_matrix(view):
        return Combine(_take_merged)
    return Combine(_boost, (beta,), (("input_axis", view.input_axis),))


def _take_merged(elements: Elements) -> Leaf:
    return elements.models[0]


def _boost(elements: Elements, beta: float, input_axis: int) -> Leaf:
    (matrix,) = each_matrix(elements, input_axis)
    return add_matrix(elements, boost(elements.xp, matrix, beta), 1.0, input_axis)


def boost(xp: Any, matrix: Leaf, beta: float) -> Leaf:
    """float[m, n]: with no singular value below the one at the place `beta`."""
    left, values, right = top_factors(xp, matrix)
    sums = xp.cumsum(values)
    least = xp.max(xp.where(sums >= beta * sums[-1:], values, xp.zeros((), values.dtype)))
    raised = xp.maximum(values, least)  # columns of U and V are zero where the update is
    return multiply(xp, left * raised[None, :], right.T)


def _merged_matrix(elements, inner, input_axis):
    """The inner method's update as a matrix, on the host in float64."""
    merged = merge_inside(elements, list(elements.models), elements.base, inner, input_axis)
    one = Elements(elements.xp, (merged,), elements.base, elements.start, elements.streams)
    (matrix,) = each_matrix(one, input_axis)
    return matrix


def _merge_and_boost(elements: Elements, beta: float, scale: float, input_axis: int, inner: Any) -> Leaf:
    matrix = _merged_matrix(elements, inner, input_axis)
    return add_matrix(elements, boost(elements.xp, matrix, beta), scale, input_axis)


def _calibrate(elements: Elements, alpha: float, scale: float, input_axis: int, inner: Any) -> Leaf:
    xp = elements.xp
    matrix = _merged_matrix(elements, inner, input_axis)
    left, values, right = top_factors(xp, matrix)
    strengths = 0.0
    for task in each_matrix(elements, input_axis):
        answers = multiply(xp, left.T, task)  # a_r^t, row by row
        squares = xp.sum(answers * answers, axis=1)
        along = values * xp.sum(answers * right.T, axis=1)
        strengths = strengths + xp.maximum(along / xp.where(squares > 0, squares, 1.0), alpha)
    factors = len(elements.models) / xp.where(strengths > 0, strengths, 1.0)
    # What is changed, and not the whole: directions that are left alone keep all their digits.
    matrix = matrix + multiply(xp, left * (values * (factors - 1))[None, :], right.T)
    return add_matrix(elements, matrix, scale, input_axis)


def _check_calibrated(options):
    check_others(options)
    check_between(options, "alpha", 0, float("inf"))
    check_inner(options, elementwise=False)


def _check_boosted(options):
    check_others(options)
    check_between(options, "beta", 0, 1)
    check_inner(options, elementwise=False)


CALIBRATION = Method(
    merge_calibrated,
    "another method, with singular values that tasks counted twice lowered",
    "arXiv:2602.05536",
    unit="leaf",
    check=_check_calibrated,
)
BOOSTED = Method(
    merge_boosted,
    "another method, with small singular values raised",
    "arXiv:2506.16506",
    unit="leaf",
    check=_check_boosted,
)
SUBSPACE_BOOSTING = Method(
    boost_merged,
    "small singular values raised",
    "arXiv:2506.16506",
    unit="leaf",
    num_models=(1, 1),
    check=lambda options: check_between(options, "beta", 0, 1),
)
