"""RAM: what several models changed is averaged, what one alone changed is kept whole."""

import numpy as np

from jaxtune.merge.masks import keep
from jaxtune.merge.method import Method
from jaxtune.merge.sums import sum_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_ram(view: View, *, epsilon: float = 1e-5) -> Combine:
    """`θ_0 + Σ m_k τ_k / Σ m_k`, with `m_k` where model k changed an element by more than `epsilon`.

    Reference:
        arXiv:2601.13572; mergekit 0.1.5.
    """
    return Combine(_average_changes, (epsilon, (1.0,) * view.num_models), (("has_gains", False),))


def merge_ramplus_tl(view: View, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Combine:
    """As `merge_ram`, with what model k alone changed scaled by `1 + r · min(shared_k / unique_k, alpha)`.

    Args:
        view: Of the leaf.
        r: Gain for each unit of that ratio.
        alpha: The ratio's bound.
        epsilon: Changes up to this size are none.

    `shared_k` and `unique_k` count the elements of the leaf that model k changed with others, and alone.

    Reference:
        arXiv:2601.13572, the variant that counts tensor by tensor; mergekit 0.1.5.
    """
    counts = view.reduce(_count_changes, epsilon)
    ratio = view.xp.clip(counts[:, 0] / view.xp.maximum(counts[:, 1], epsilon), 0.0, alpha)
    gains = 1 + r * ratio
    return Combine(_average_changes, (epsilon, tuple(gains[k] for k in range(view.num_models))), (("has_gains", True),))


def _changes(elements, epsilon):
    xp, changed, count = elements.xp, [], None
    for delta in elements.deltas:
        changed.append(xp.abs(delta) > epsilon)
        one = changed[-1].astype(np.int8 if len(elements.models) < 128 else np.int32)
        count = one if count is None else count + one
    return changed, count


def _count_changes(elements, epsilon):
    changed, count = _changes(elements, epsilon)
    is_unique, rows = count == 1, []
    for one in changed:
        total, unique = (sum_wide(elements, mask.astype(elements.dtype)) for mask in (one, one & is_unique))
        rows.append(elements.xp.stack([total - unique, unique]))
    return elements.xp.stack(rows)


def _average_changes(elements: Elements, epsilon: float, gains: tuple, *, has_gains: bool) -> Leaf:
    xp = elements.xp
    changed, count = _changes(elements, epsilon)
    is_unique, merged = count == 1, None
    for delta, one, gain in zip(elements.deltas, changed, gains, strict=True):
        part = keep(xp, one, delta)
        if has_gains:
            part = part + keep(xp, is_unique, part) * (gain - 1.0)
        merged = part if merged is None else merged + part
    return elements.base + merged / xp.maximum(count, 1).astype(merged.dtype)


RAM = Method(
    merge_ram,
    "average of what several models changed, the whole of what one changed",
    "arXiv:2601.13572",
)
RAMPLUS_TL = Method(
    merge_ramplus_tl,
    "as ram, with more of what one model changed alone the more it shares",
    "arXiv:2601.13572",
)
