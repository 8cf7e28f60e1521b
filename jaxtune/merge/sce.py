"""SCE: select the elements that vary most, calculate weights from what is left, erase minority signs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.merge.affine import take
from jaxtune.merge.masks import keep, pack, signs_of, turn, turn_and_clip, weigh
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.sparsify import within
from jaxtune.merge.sums import dot_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

SMALL = 1e-6  # sums of weights below it count as this much, as mergekit has it


def merge_sce(view: View, *, select_topk: float = 1.0, int8_mask: bool = False, min_energy: float = 1e-6) -> Combine:
    """`θ_0 + Σ w_k m_k s τ_k / Σ w_k m_k`, the weights the mean squares of the selected task vectors.

    Selected (`s`) are the elements whose variance over the models is largest, of those where it is not zero; `m_k` is
    where a selected element has the sign of their sum.

    Args:
        view: Of the leaf.
        select_topk: Share that is selected.
        int8_mask: Without effect: masks are never stored.
        min_energy: Where the mean squares of all task vectors sum to less, weights are equal. The default is
            mergekit's, and larger than most fine-tunes move; the preset `paper` has none.

    Reference:
        Wan et al. 2024, arXiv:2408.07990. Differs from mergekit: the variance is that of differences between models, so
        that it is zero where models are equal.
    """
    if view.num_models == 1 and isinstance(select_topk, (int, float)) and select_topk >= 1:
        return take(0)
    xp, cut, is_cut = view.xp, (), not (isinstance(select_topk, (int, float)) and select_topk >= 1)
    if is_cut:
        varying = view.reduce(_count_varying)
        # As mergekit has it, and as jit has it: a float32 product, rounded down.
        count = xp.floor(xp.asarray(varying, np.float32) * xp.asarray(select_topk, np.float32)).astype(np.int32)
        rank = view.rank_from_top(_variance, int(count) if xp is np else count)
        cut = (rank.value, rank.last)
    energies = view.reduce(_sum_squares, cut) / max(view.size, 1)
    total = energies.sum()
    is_small = total < min_energy
    share = xp.where(is_small, 1.0 / view.num_models, energies / xp.where(is_small | (total == 0), 1.0, total))
    return Combine(_erase, (tuple(share[k] for k in range(view.num_models)), cut))


def _variance(elements: Elements) -> Leaf:
    first, count = elements.models[0], len(elements.models)
    if count == 2:
        half = elements.own_model(1)
        half -= first
        half *= 0.5
        half *= half
        return half
    apart = [model - first for model in elements.models[1:]]
    mean = sum(apart[1:], apart[0]) / count if apart else elements.xp.zeros_like(first)
    return sum([(one - mean) ** 2 for one in apart], mean**2) / count


def _count_varying(elements):
    xp, first = elements.xp, elements.models[0]
    varies = xp.zeros(first.shape, bool)
    for model in elements.models[1:]:
        varies = varies | (model != first)
    return xp.count_nonzero(varies)


def _select(elements, cut):
    if not cut:
        return [elements.own_delta(model) for model in range(len(elements.models))]
    selected = within(elements, _variance(elements), *cut, is_exact=False)
    deltas = [elements.own_delta(model) for model in range(len(elements.models))]
    if elements.xp is not np:
        return [keep(elements.xp, selected, delta) for delta in deltas]
    weights = weigh(np, pack(selected), elements.base)
    for delta in deltas:
        delta *= weights
    return deltas


def _sum_squares(elements, cut):
    return elements.xp.stack([dot_wide(elements, delta, delta) for delta in _select(elements, cut)])


def _erase(elements, share, cut):
    xp, deltas = elements.xp, _select(elements, cut)
    signs = signs_of(xp, sum(deltas[1:], deltas[0]))
    merged = weights = None
    for delta, factor in zip(deltas, share, strict=True):
        agreeing = turn_and_clip(xp, signs, delta)
        agrees = (agreeing > 0).astype(elements.dtype)
        agrees *= factor
        agreeing *= factor
        if merged is None:
            merged, weights = agreeing, agrees
        else:
            merged += agreeing
            weights += agrees
    merged = turn(xp, signs, merged)
    merged /= xp.maximum(weights, SMALL)
    merged += elements.base
    return merged


def _check(options: Mapping[str, Any]) -> None:
    check_between(options, "select_topk", 0.0, 1.0)


SCE = Method(
    merge_sce,
    "elements that vary most, weighted by energy, without minority signs",
    "arXiv:2408.07990",
    presets={"mergekit": {}, "paper": {"min_energy": 0.0}},
    check=_check,
)
