"""Arcee Fusion: the model's values where they matter by an outlier's rule, the base's elsewhere."""

from jaxtune.merge.affine import BASE, take
from jaxtune.merge.masks import choose
from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

EPSILON = 1e-8  # added to probabilities


def merge_arcee_fusion(view: View) -> Combine:
    """`θ_1` where the importance of its change is at least `median + 1.5 (q_3 - q_1)` of all of the leaf, else `θ_0`.

    The importance of an element is the size of its change times the Kullback-Leibler divergence between the softmaxes
    of its row (all inputs of one output) in the model and in the base. Quartiles are lower order statistics.

    Reference:
        arcee.ai; mergekit 0.1.5. Differs: quartiles are those of all elements; there, of a random million of them where
        there are more.
    """
    if view.size == 0:
        return take(BASE)
    ranks = [view.size - quarter * (view.size - 1) // 4 for quarter in (1, 2, 3)]
    low, middle, high = (view.rank_from_top(find_importance, rank).value for rank in ranks)
    return Combine(_choose, (middle + 1.5 * (high - low),))


def find_importance(elements: Elements) -> Leaf:
    """How much each change matters: never below zero."""
    xp, delta = elements.xp, elements.deltas[0]
    model, base = _softmax(xp, elements.models[0]), _softmax(xp, elements.base)
    divergence = xp.sum(model * xp.log(model / base), axis=-1, keepdims=True)
    return xp.abs(delta) * xp.maximum(divergence, 0.0)


def _softmax(xp, values):
    powers = xp.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True) + EPSILON


def _choose(elements: Elements, threshold: float) -> Leaf:
    return choose(elements.xp, find_importance(elements) >= threshold, elements.models[0], elements.base)


ARCEE_FUSION = Method(
    merge_arcee_fusion,
    "the model where its change matters by an outlier's rule, else the base",
    "https://arcee.ai",
    unit="row",
    num_models=(1, 1),
)
