"""Which entries of the summed task vectors matter to which task: TALL masks, and the consensus of them."""

from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between, check_task
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_consensus(
    view: View, *, threshold: tuple[float, ...] = 0.4, min_tasks: int = 2, lambda_: float = 1.0
) -> Combine:
    """`θ_0 + λ m ⊙ Σ τ_t`: m keeps the entries that are active in at least `min_tasks` of the TALL masks.

    `m_t = |τ_t| > threshold_t |Σ τ - τ_t|`, strictly: an entry that no task moved is active nowhere. With `min_tasks` 0
    this is task arithmetic; with 1 only what no task uses is dropped.

    Reference:
        Wang et al. 2024, arXiv:2405.07813. Their thresholds are searched per task in 0.2 to 0.6.
    """
    return Combine(_add_consensus, (tuple(threshold), min_tasks, lambda_))


def merge_tall(view: View, *, task: int, threshold: tuple[float, ...] = 0.4, lambda_: float = 1.0) -> Combine:
    """One task's model again, from the sum of all: `θ_0 + λ m_t ⊙ Σ τ`, with the mask of `task`.

    Reference:
        Wang et al. 2024, arXiv:2405.07813, λ = 1.
    """
    return Combine(_reconstruct, (tuple(threshold), lambda_), (("task", task),))


def _masks(elements, total, threshold):
    xp = elements.xp
    return [
        xp.abs(delta) > xp.abs(total - delta) * factor for delta, factor in zip(elements.deltas, threshold, strict=True)
    ]


def _sum(elements):
    total = elements.deltas[0]
    for delta in elements.deltas[1:]:
        total = total + delta
    return total


def _add_consensus(elements: Elements, threshold: tuple, min_tasks: int, scale: float) -> Leaf:
    xp, total = elements.xp, _sum(elements)
    votes = sum(mask.astype(xp.int32) for mask in _masks(elements, total, threshold))
    return elements.base + xp.where(votes >= min_tasks, total, 0.0) * scale


def _reconstruct(elements: Elements, threshold: tuple, scale: float, task: int) -> Leaf:
    total = _sum(elements)
    return elements.base + elements.xp.where(_masks(elements, total, threshold)[task], total, 0.0) * scale


def _check_consensus(options):
    check_between(options, "threshold", 0, float("inf"))
    check_between(options, "min_tasks", 0, len(options["threshold"]))


def _check_tall(options):
    check_between(options, "threshold", 0, float("inf"))
    check_task(options, "task", len(options["threshold"]))


CONSENSUS = Method(
    merge_consensus,
    "sum of task vectors where several tasks agree that it matters",
    "arXiv:2405.07813",
    per_model=("threshold",),
    check=_check_consensus,
)
TALL = Method(
    merge_tall,
    "one task's model, from the sum of all and its mask",
    "arXiv:2405.07813",
    per_model=("threshold",),
    check=_check_tall,
)
