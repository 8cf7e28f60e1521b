"""Singular vectors of the tasks, kept apart by making them orthonormal together."""

import numpy as np

from jaxtune.merge.factors import add_matrix, check_others, each_matrix, is_matrix, merge_others, top_factors
from jaxtune.merge.long import join_long
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.polar import multiply, polar
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_tsv_m(
    view: View, *, rank_share: float | None = None, lambda_: float = 1.0, others: str = "average"
) -> Combine:
    """`θ_0 + λ U⊥ diag(σ) V⊥ᵀ`: the strongest directions of every task, orthonormal together.

    `σ` and the columns of `U`, `V` are those of the first `⌊r s⌋` singular triplets of each task, r = min(m, n) and s
    the `rank_share`; `U⊥` and `V⊥` their polar factors.

    Args:
        view: Of the models.
        rank_share: Part of the rank that each task keeps; None: one over the number of tasks.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Gargiulo et al. 2025, arXiv:2412.00081, Algorithm 1 (TSV-Merge); exactly the release where the concatenated
        vectors are independent. Differs: a task keeps at least one direction; the release keeps none of a leaf with
        fewer than T rows or columns and so drops its update.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    rank = min(view.shape)
    kept = rank // view.num_models if rank_share is None else int(rank * rank_share + 1e-9)
    kept = max(1, min(kept, rank))
    if view.unit == "row" and view.xp is np:
        return join_long(view, lambda_, kept)
    constants = (("input_axis", -1 if view.unit == "row" else view.input_axis), ("kept", kept))
    return Combine(_merge, (lambda_,), constants)


def _merge(elements: Elements, scale: float, input_axis: int, kept: int) -> Leaf:
    xp = elements.xp
    lefts, values, rights = zip(
        *(top_factors(xp, matrix, kept) for matrix in each_matrix(elements, input_axis)), strict=True
    )
    left, right = (polar(xp, xp.concatenate(parts, axis=1)) for parts in (lefts, rights))
    return add_matrix(elements, multiply(xp, left * xp.concatenate(values)[None, :], right.T), scale, input_axis)


def _check(options):
    check_others(options)
    if options["rank_share"] is not None:
        check_between(options, "rank_share", 0, 1)


TSV_M = Method(
    merge_tsv_m,
    "the strongest singular vectors of every task, orthonormal together",
    "arXiv:2412.00081",
    unit="leaf",
    by_rows=True,
    check=_check,
)
