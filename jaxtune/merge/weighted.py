"""The sum that many methods end in."""

from jaxtune.merge.view import Elements
from jaxtune.types import Leaf


def add_weighted(elements: Elements, weight: tuple) -> Leaf:
    """`θ_0 + Σ w_t τ_t`."""
    total = elements.deltas[0] * weight[0]
    for delta, factor in zip(elements.deltas[1:], weight[1:], strict=True):
        total = total + delta * factor
    return elements.base + total
