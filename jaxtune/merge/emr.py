"""One unified task vector, and for each task a mask and a number that make it that task's again."""

from jaxtune.merge.method import Method
from jaxtune.merge.options import check_choice, check_task
from jaxtune.merge.sums import sum_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_emr(view: View, *, task: int | None = None, scope: str = "model", lambda_: float = 1.0) -> Combine:
    """Elect, mask and rescale.

    The sign of `Σ τ` is elected, a sum of zero counting as negative; the unified vector has that sign and the largest
    magnitude among the task vectors that agree with it. `task` None gives `θ_0 + λ τ_uni`; a task gives its model
    again, `θ_0 + λ r_t m_t ⊙ τ_uni`, with `m_t = τ_t τ_uni > 0` and `r_t = Σ|τ_t| / Σ|m_t ⊙ τ_uni|`.

    Args:
        view: Of the models.
        task: Which task's model, counted from 0; None: the unified one.
        scope: Whether `r_t` is that of a "leaf" or of the whole "model".
        lambda_: Scale.

    Reference:
        Huang et al. 2024, arXiv:2405.17461, Algorithm 1. Differs: with scope "model" the release sums the *means* of
        the leaves in both parts of `r_t`, so that a bias counts as much as a matrix; here every element counts once.
    """
    if task is None:
        return Combine(_add_unified, (lambda_,))
    check_task({"task": task}, "task", view.num_models)
    sums = view.reduce(_sum_magnitudes, task=task)
    rescaler = sums[0] / view.xp.where(sums[1] > 0, sums[1], 1.0)
    return Combine(_add_masked, (rescaler * lambda_,), (("task", task),))


def unify(elements: Elements) -> Leaf:
    """The unified task vector."""
    xp, total = elements.xp, elements.deltas[0]
    for delta in elements.deltas[1:]:
        total = total + delta
    sign = xp.where(total > 0, 1.0, -1.0).astype(total.dtype)
    largest = xp.zeros_like(total)
    for delta in elements.deltas:
        largest = xp.maximum(largest, delta * sign)
    return largest * sign


def _masked(elements, task):
    unified = unify(elements)
    return elements.xp.where(elements.deltas[task] * unified > 0, unified, 0.0)


def _sum_magnitudes(elements, task):
    xp = elements.xp
    arrays = elements.deltas[task], _masked(elements, task)
    return xp.stack([sum_wide(elements, xp.abs(array)) for array in arrays])


def _add_unified(elements: Elements, scale: float) -> Leaf:
    return elements.base + unify(elements) * scale


def _add_masked(elements: Elements, scale: float, task: int) -> Leaf:
    return elements.base + _masked(elements, task) * scale


EMR = Method(
    merge_emr,
    "elected signs with largest magnitudes; one task's model again with its mask",
    "arXiv:2405.17461",
    scope_option="scope",
    check=lambda options: check_choice(options, "scope", ("leaf", "model")),
)
