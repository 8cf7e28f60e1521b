"""Subspaces that all tasks share, in which any method that works on entries or rows runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.merge.factors import add_matrix, check_others, each_matrix, is_matrix, merge_others, top_factors
from jaxtune.merge.inside import check_inner, freeze_inner, merge_inside
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.polar import multiply
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_knots(
    view: View,
    *,
    inside: str = "ties",
    inside_options: Mapping[str, Any] | None = None,
    scaled: bool = True,
    tolerance: float = 1e-5,
    lambda_: float = 1.0,
    others: str = "average",
) -> Combine:
    """`θ_0 + λ U merge(Σ V_1ᵀ, …, Σ V_Tᵀ)` of `[τ_1 … τ_T] = U Σ [V_1ᵀ … V_Tᵀ]`: one basis of outputs for all tasks.

    Args:
        view: Of the models.
        inside: The method that merges the blocks.
        inside_options: Its options.
        scaled: Whether it sees `Σ V_tᵀ`, as the release's configs have it, or `V_tᵀ`, multiplied by Σ after.
        tolerance: Directions whose singular value is less than this part of the largest are left out; where JAX traces
            they are zero instead, and count as entries.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Stoica et al. 2025, arXiv:2410.19735 Differs: the tolerance is relative; there it is 1e-5 whatever
        the length of the task vectors.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    inner = freeze_inner(inside, inside_options, view)
    constants = (("input_axis", view.input_axis), ("inner", inner), ("scaled", scaled), ("tolerance", tolerance))
    return Combine(_merge_knots, (lambda_,), constants)


def merge_core_space(
    view: View,
    *,
    inside: str = "ties",
    inside_options: Mapping[str, Any] | None = None,
    rank: int | None = None,
    lambda_: float = 1.0,
    others: str = "average",
) -> Combine:
    """`θ_0 + λ U merge(Uᵀ τ_1 V, …, Uᵀ τ_T V) Vᵀ`: one basis of outputs and one of inputs for all tasks.

    Args:
        view: Of the models.
        inside: The method that merges the cores.
        inside_options: Its options.
        rank: Of each task vector, as of low-rank adapters: U and V then have T times as many columns, spanning what the
            truncated task vectors span; None: all of it.
        lambda_: Scale.
        others: Of leaves that are no matrices; see `merge_others`.

    Reference:
        Panariello et al. 2025, arXiv:2509.17786 Differs: from merged weights the factors of an adapter are
        known up to a matrix between them; here each side gets the square root of the singular values.
    """
    if not is_matrix(view):
        return merge_others(view, others, lambda_)
    inner = freeze_inner(inside, inside_options, view)
    constants = (("input_axis", view.input_axis), ("inner", inner), ("rank", rank))
    return Combine(_merge_core, (lambda_,), constants)


def _merge_knots(elements: Elements, scale: float, input_axis: int, inner: Any, scaled: bool, tolerance: float) -> Leaf:
    xp = elements.xp
    matrices = list(each_matrix(elements, input_axis))
    left, values, right = top_factors(xp, xp.concatenate(matrices, axis=1), exact_tail=False)
    del right
    is_kept = values > tolerance * values[:1]
    if xp is np:
        left, values = left[:, is_kept], values[is_kept]
        if not len(values):
            return elements.base
    else:
        left = xp.where(is_kept[None, :], left, xp.zeros((), left.dtype))
    blocks = [multiply(xp, left.T, matrix) for matrix in matrices]
    if not scaled:
        inverse = xp.where(is_kept, 1 / xp.where(is_kept, values, 1.0), 0.0) if xp is not np else 1 / values
        blocks = [block * inverse[:, None] for block in blocks]
    merged = merge_inside(elements, blocks, None, inner)
    if not scaled:
        merged = merged * values[:, None]
    return add_matrix(elements, multiply(xp, left, merged), scale, input_axis)


def _merge_core(elements: Elements, scale: float, input_axis: int, inner: Any, rank: int | None) -> Leaf:
    xp = elements.xp
    matrices = list(each_matrix(elements, input_axis))
    wide, tall = [], []
    for matrix in matrices:
        if rank is None:
            wide.append(matrix)
            tall.append(matrix)
        else:
            left, values, right = top_factors(xp, matrix, rank)
            wide.append(left * xp.sqrt(values)[None, :])
            tall.append((right * xp.sqrt(values)[None, :]).T)
    left = top_factors(xp, xp.concatenate(wide, axis=1))[0]
    right = top_factors(xp, xp.concatenate(tall, axis=0))[2]
    cores = [multiply(xp, left.T, matrix, right) for matrix in matrices]
    merged = multiply(xp, left, merge_inside(elements, cores, None, inner), right.T)
    return add_matrix(elements, merged, scale, input_axis)


def _check_knots(options):
    check_others(options)
    check_between(options, "tolerance", 0, 1)
    check_inner(options, elementwise=True)


def _check_core(options):
    check_others(options)
    if options["rank"] is not None:
        check_between(options, "rank", 1, float("inf"))
    check_inner(options, elementwise=True)


KNOTS = Method(
    merge_knots,
    "any method, in the output directions that the task vectors share",
    "arXiv:2410.19735",
    unit="leaf",
    check=_check_knots,
)
CORE_SPACE = Method(
    merge_core_space,
    "any method, in the directions of outputs and inputs that the task vectors share",
    "arXiv:2509.17786",
    unit="leaf",
    check=_check_core,
)
