"""Task vectors of one bit an entry."""

from jaxtune.merge.method import Method
from jaxtune.merge.sums import sum_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.merge.weighted import add_weighted
from jaxtune.types import Leaf


def merge_bitdelta(view: View, *, weight: tuple[float, ...] = 1.0) -> Combine:
    """`θ_0 + Σ w_t α_t sign(τ_t)` with `α_t` the mean of |τ_t| over the leaf; leaves with fewer than two axes keep τ_t.

    `α_t` is the scale at which the signs come closest to the task vector.

    Reference:
        Liu et al. 2024, arXiv:2402.10193, without the distillation that tunes the scales after.
        Differs: entries that did not move stay; the release, which has one bit, moves them up.
    """
    if len(view.shape) < 2:
        return Combine(add_weighted, (tuple(weight),))
    means = view.reduce(_sum_magnitudes) / max(view.size, 1)
    return Combine(_add_signs, (tuple(means[k] * weight[k] for k in range(view.num_models)),))


def _sum_magnitudes(elements):
    return elements.xp.stack([sum_wide(elements, elements.xp.abs(delta)) for delta in elements.deltas])


def _add_signs(elements: Elements, scales: tuple) -> Leaf:
    merged = elements.base
    for delta, scale in zip(elements.deltas, scales, strict=True):
        merged = merged + elements.xp.sign(delta) * scale
    return merged


BITDELTA = Method(
    merge_bitdelta, "signs of the task vectors times their mean magnitude", "arXiv:2402.10193", per_model=("weight",)
)
