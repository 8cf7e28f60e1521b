"""Sums of cut task vectors, weighted; and with signs elected first, so that only those that agree are summed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.merge.affine import is_known, only_whole, sum_exactly, take
from jaxtune.merge.aligned import empty_aligned
from jaxtune.merge.masks import sign_of, signs_of, turn, turn_and_clip
from jaxtune.merge.sparsify import Cut, sparse_delta
from jaxtune.merge.sums import sum_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

ZERO_SUM = 1e-8  # weights that sum to less are not divided by, as mergekit has it


def add_cut(
    cuts: Sequence[Cut], weight: Sequence[Any], gains: Sequence[Any], *, normalize: bool, scale: Any
) -> Combine:
    """`θ_0 + scale Σ w_k g_k cut(τ_k)`, the sum divided by `Σ w_k` with `normalize`, unless that is zero."""
    total = sum_of_weights(weight) if normalize else 1.0
    coefficients = tuple(w * g * scale / total for w, g in zip(weight, gains, strict=True))
    whole = only_whole(coefficients)
    if whole is not None and cuts[whole].rule == "all":
        return take(whole)
    constants = (("rules", tuple(cut.rule for cut in cuts)), ("order", _in_order(coefficients)))
    return Combine(_add_cut, (coefficients, tuple(cut.numbers for cut in cuts)), constants)


def sum_of_weights(weight: Sequence[Any]) -> Any:
    """`Σ w_k`, or 1 where that is zero and dividing by it would make no sense."""
    total = sum_exactly(weight)
    return 1.0 if isinstance(total, (int, float)) and abs(total) < ZERO_SUM else total


def _in_order(keys):
    """Models by their weight: sums in this order are the same however the models are listed."""
    numbers = all(isinstance(key, (int, float)) for key in keys)
    return tuple(sorted(range(len(keys)), key=keys.__getitem__) if numbers else range(len(keys)))


def _add_cut(elements, coefficients, numbers, *, rules, order):
    merged = None
    for model in order:
        if rules[model] != "none":
            part = sparse_delta(elements, model, rules[model], numbers[model], coefficients[model])
            if merged is None:
                merged = part
            else:
                merged += part
    if merged is None:
        return elements.base
    merged += elements.base
    return merged


def add_elected(
    view: View,
    cuts: Sequence[Cut],
    weight: Sequence[Any],
    gains: Sequence[Any],
    *,
    normalize: bool | str,
    scale: Any,
    vote: str = "sum",
    weigh_votes: bool = True,
    zero_vote: str = "plus",
) -> Combine:
    """`θ_0 + scale Σ w_k m_k g_k cut(τ_k) / d`, with `m_k` where an element has the sign that its models elect.

    Args:
        view: Of the leaf.
        cuts, weight, gains: One a model.
        normalize: What `d` is: True: `Σ w_k m_k`; "count": `Σ m_k`; False: 1. Where it is zero, 1.
        scale: Of the merged task vector.
        vote: Whether votes are the values ("sum") or their signs ("count").
        weigh_votes: Whether models vote, and agree, with the weighted value: a model of negative weight then votes for
            the opposite of its task vector.
        zero_vote: What a vote of zero elects: "plus"; the "majority" of the signs of all elements of the view; or
            "none", with which nobody agrees.
    """
    whole = only_whole([scale if normalize is True and not is_known(w, 0.0) else w * scale for w in weight])
    if whole is not None and cuts[whole].rule == "all":
        return take(whole)
    order = _in_order(weight)
    cuts, weight, gains = ([items[model] for model in order] for items in (cuts, weight, gains))
    if normalize is True and weigh_votes and all(is_known(w, weight[0]) and w > 0 for w in weight):
        weight, normalize = [1.0] * len(weight), "count"  # equal weights cancel
    factors = tuple(w * g for w, g in zip(weight, gains, strict=True)) if weigh_votes else tuple(gains)
    numbers = (factors, tuple(cut.numbers for cut in cuts))
    ballot = {
        "rules": tuple(cut.rule for cut in cuts),
        "order": order,
        "vote": vote,
    }
    at_zero = 0.0 if zero_vote == "none" else 1.0
    if zero_vote == "majority":
        at_zero = view.xp.where(view.reduce(_count_signs, *numbers, **ballot) > 0, 1.0, -1.0)
    constants = {
        **ballot,
        "normalize": normalize,
        "weigh_votes": weigh_votes,
        "zero_is_plus": zero_vote == "plus",
        "scales": not is_known(scale, 1.0),
    }
    return Combine(_add_elected, (*numbers, tuple(weight), scale, at_zero), tuple(constants.items()))


def _add_elected(
    elements, factors, numbers, weight, scale, at_zero, *, normalize, weigh_votes, zero_is_plus, scales, vote, **cut
):
    xp = elements.xp
    values = _values(elements, factors, numbers, **cut)
    votes = _votes(xp, values, vote)
    if zero_is_plus:
        signs = signs_of(xp, votes)
    else:
        signs = sign_of(votes >= 0, votes.dtype)
        signs += (votes == 0).astype(votes.dtype) * (at_zero - 1.0)  # a vote of zero counted as plus
    merged = share = None
    for value, factor in zip(values, weight, strict=True):
        # In the direction of the elected sign.
        agreeing = turn_and_clip(xp, signs, value) if zero_is_plus else xp.maximum(value * signs, 0.0)
        if normalize:
            agrees = (agreeing > 0).astype(np.int16 if normalize == "count" else votes.dtype)
            if normalize != "count":
                agrees *= factor
            share = agrees if share is None else share + agrees
        if not weigh_votes:
            agreeing *= factor
        if merged is None:
            merged = agreeing
        else:
            merged += agreeing
    if normalize:
        share = share if normalize == "count" else share + (share == 0).astype(share.dtype)
        merged /= xp.maximum(share, 1).astype(merged.dtype) if normalize == "count" else share
    merged = turn(xp, signs, merged) if zero_is_plus else merged * signs
    if scales:
        merged *= scale
    merged += elements.base
    return merged


def _values(elements: Elements, factors, numbers, *, rules, order) -> list[Leaf]:
    """Cut task vectors, rescaled and, where votes are, weighted."""
    cut = zip(order, rules, numbers, strict=True)
    return [
        sparse_delta(elements, model, rule, number, factor)
        for (model, rule, number), factor in zip(cut, factors, strict=True)
    ]


def _votes(xp, values, vote):
    parts = [value if vote == "sum" else xp.sign(value) for value in values]
    if len(parts) == 1:
        return parts[0]
    votes = np.add(*parts[:2], out=empty_aligned(parts[0].shape, parts[0].dtype)) if xp is np else parts[0] + parts[1]
    for part in parts[2:]:
        votes += part
    return votes


def _count_signs(elements, factors, numbers, *, vote, **cut):
    votes = _votes(elements.xp, _values(elements, factors, numbers, **cut), vote)
    return sum_wide(elements, elements.xp.sign(votes))
