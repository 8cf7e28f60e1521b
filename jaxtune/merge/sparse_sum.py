"""Sums of cut task vectors, weighted; and with signs elected first, so that only those that agree are summed."""

from collections.abc import Sequence
from typing import Any

from jaxtune.merge.affine import is_known, only_whole, take
from jaxtune.merge.masks import sign_of
from jaxtune.merge.sparsify import Cut, sparse_delta
from jaxtune.merge.view import Combine, Elements, View, sum_wide
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
    return Combine(_add_cut, (coefficients, tuple(c.numbers for c in cuts)), (("rules", tuple(c.rule for c in cuts)),))


def sum_of_weights(weight: Sequence[Any]) -> Any:
    """`Σ w_k`, or 1 where that is zero and dividing by it would make no sense."""
    total = sum(weight)
    return 1.0 if isinstance(total, (int, float)) and abs(total) < ZERO_SUM else total


def _add_cut(elements, coefficients, numbers, *, rules):
    merged = None
    for model, (factor, rule, cut) in enumerate(zip(coefficients, rules, numbers, strict=True)):
        if rule != "none":
            part = sparse_delta(elements, model, rule, cut) * factor
            merged = part if merged is None else merged + part
    return elements.base if merged is None else elements.base + merged


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
    factors = tuple(w * g for w, g in zip(weight, gains, strict=True)) if weigh_votes else tuple(gains)
    numbers = (factors, tuple(cut.numbers for cut in cuts))
    ballot = {"rules": tuple(cut.rule for cut in cuts), "vote": vote}
    at_zero = 0.0 if zero_vote == "none" else 1.0
    if zero_vote == "majority":
        at_zero = view.xp.where(view.reduce(_count_signs, *numbers, **ballot) > 0, 1.0, -1.0)
    constants = {**ballot, "normalize": normalize, "weigh_votes": weigh_votes, "plus": zero_vote == "plus"}
    return Combine(_add_elected, (*numbers, tuple(weight), scale, at_zero), tuple(constants.items()))


def _add_elected(elements, factors, numbers, weight, scale, at_zero, *, rules, vote, normalize, weigh_votes, plus):
    xp = elements.xp
    values = _values(elements, factors, numbers, rules)
    votes = _votes(xp, values, vote)
    sign = sign_of(votes >= 0, votes.dtype)
    if not plus:
        sign = sign + (votes == 0).astype(votes.dtype) * (at_zero - 1.0)  # a vote of zero counted as plus
    merged = share = None
    for value, factor in zip(values, weight, strict=True):
        agreeing = xp.maximum(value * sign, 0.0)  # in the direction of the elected sign
        part = agreeing if weigh_votes else agreeing * factor
        merged = part if merged is None else merged + part
        if normalize:
            agrees = (agreeing > 0).astype(votes.dtype)
            agrees = agrees if normalize == "count" else agrees * factor
            share = agrees if share is None else share + agrees
    if normalize:
        merged = merged / (share + (share == 0).astype(share.dtype))
    return elements.base + merged * sign * scale


def _values(elements: Elements, factors, numbers, rules) -> list[Leaf]:
    cut = enumerate(zip(factors, rules, numbers, strict=True))
    return [sparse_delta(elements, model, rule, number) * factor for model, (factor, rule, number) in cut]


def _votes(xp, values, vote):
    votes = None
    for value in values:
        part = value if vote == "sum" else xp.sign(value)
        votes = part if votes is None else votes + part
    return votes


def _count_signs(elements, factors, numbers, *, rules, vote):
    votes = _votes(elements.xp, _values(elements, factors, numbers, rules), vote)
    return sum_wide(elements, elements.xp.sign(votes))
