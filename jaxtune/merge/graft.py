"""The part of a task vector that is largest in magnitude, grafted onto the base."""

import math

from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between, check_choice
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_graft(
    view: View, *, share: tuple[float, ...] = 0.1, weight: tuple[float, ...] = 1.0, scope: str = "model"
) -> Combine:
    """`θ_0 + Σ w_t γ_t ⊙ τ_t`: `γ_t` keeps the `⌊share_t n⌋` entries of τ_t that are largest in magnitude.

    Args:
        view: Of the models.
        share: How much is kept, 0 to 1.
        weight: Of each graft.
        scope: Whether the largest are those of the whole "model" or of each "leaf".

    Reference:
        Panigrahi et al. 2023, arXiv:2302.06600: the mask that their optimisation of the graft starts from,
        and all that the released script uses. Differs: exactly `⌊share n⌋` entries, of equal ones the first; the
        release keeps those strictly above the last, one fewer.
    """
    ranks = tuple(
        view.rank_from_top(_magnitude, math.floor(part * view.size + 1e-9), model=model)
        for model, part in enumerate(share)
    )
    return Combine(_add_grafts, (ranks, tuple(weight)))


def _magnitude(elements: Elements, model: int) -> Leaf:
    return elements.xp.abs(elements.deltas[model])


def _add_grafts(elements: Elements, ranks: tuple, weight: tuple) -> Leaf:
    xp, merged = elements.xp, elements.base
    for delta, rank, factor in zip(elements.deltas, ranks, weight, strict=True):
        merged = merged + xp.where(rank.keeps(xp.abs(delta), elements.index), delta, 0.0) * factor
    return merged


def _check(options):
    check_between(options, "share", 0, 1)
    check_choice(options, "scope", ("leaf", "model"))


GRAFT = Method(
    merge_graft,
    "the largest entries of each task vector",
    "arXiv:2302.06600",
    per_model=("share", "weight"),
    scope_option="scope",
    check=_check,
)
