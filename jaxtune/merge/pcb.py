"""Entries of task vectors balanced by how much they matter to their own task and how well they fit the others."""

from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between, check_choice
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

NOTHING = 1e-5  # a score of the last entry that counts is zero, but for its rounding
CLAMP = 1e-4  # share of the smallest and of the largest magnitudes that are moved to the next one


def merge_pcb(
    view: View, *, ratio: float = 0.1, lambda_: float = 1.2, interaction: str = "sum", scope: str = "model"
) -> Combine:
    """`θ_0 + λ Σ_t s_t ⊙ τ̂_t / Σ_t s_t`: scores s of each entry, zero but for the best `ratio` of each task.

    τ̂ is τ with magnitudes clamped between their 1e-4 and 1 - 1e-4 quantiles, n the magnitudes of τ̂ brought to 0 to 1,
    T the number of tasks. A score is `exp(T n_t²) ⊙ inter_t`, clamped from below at its 1 - `ratio` quantile and
    brought to 0 to 1. An entry without any score keeps the base's value.

    Args:
        view: Of the models.
        ratio: Share of a task's entries that have a score.
        lambda_: Scale; 1.2 in the paper's vision experiments.
        interaction: "sum" is `tanh(τ_t ⊙ Σ τ)`, as pcb-merging, the authors' release, has it; "pairwise" is
            `Σ_k tanh(τ_t ⊙ τ_k)`, as the paper writes it. merge-and-rebase has a third, with n for |τ| in the sum.
        scope: Whether quantiles and ends are those of the whole "model", as there, or of each "leaf".

    Reference:
        Du et al. 2024, arXiv:2410.02396. Differs: where fewer than `ratio` of the scores are
        positive, the quantile is taken as 0 (no negative score enters), and so is a quantile below the first entry (the
        release has the least value there, and divides 0 by 0 where all magnitudes are equal); scores up to 1e-5 are
        zero, where the release has 1e-12 and rounding decides whether the last entry moves.
    """
    size, constants = view.size, {"interaction": interaction}

    def find(function, places, *numbers, **more):  # values at places that are counted from the smallest
        return tuple(
            view.rank_from_top(function, size - place, *numbers, **more).value if place > 0 or size == 1 else 0.0
            for place in places
        )

    places = int(size * CLAMP), max(int(size * (1 - CLAMP) - 1), int(size * CLAMP))
    ends = tuple(find(_magnitude, places, task=task) for task in range(view.num_models))
    places = int(size * (1 - ratio)), size - 1
    spans = tuple(find(_score, places, ends, task=task, **constants) for task in range(view.num_models))
    return Combine(_add_balanced, (ends, spans, lambda_), tuple(constants.items()))


def _magnitude(elements, task):
    return elements.xp.abs(elements.deltas[task])


def _to_unit(xp, values, low, high):
    span = high - low
    return (xp.clip(values, low, high) - low) / xp.where(span > 0, span, 1.0)


def _score(elements, ends, task, interaction):
    """float[num_elements] >= 0: how strongly an entry is wanted, times how well it fits."""
    xp, deltas = elements.xp, elements.deltas
    delta = deltas[task]
    if interaction == "sum":
        total = deltas[0]
        for other in deltas[1:]:
            total = total + other
        inter = xp.tanh(delta * total)
    else:
        inter = xp.tanh(delta * deltas[0])
        for other in deltas[1:]:
            inter = inter + xp.tanh(delta * other)
    intra = _to_unit(xp, xp.abs(delta), *ends[task])
    return xp.maximum(xp.exp(len(deltas) * intra * intra) * inter, 0.0)


def _add_balanced(elements: Elements, ends: tuple, spans: tuple, scale: float, interaction: str) -> Leaf:
    xp = elements.xp
    above, below = xp.zeros_like(elements.base), xp.zeros_like(elements.base)
    for task, delta in enumerate(elements.deltas):
        score = _to_unit(xp, _score(elements, ends, task, interaction), *spans[task])
        score = xp.where(score > NOTHING, score, 0.0)
        above = above + xp.sign(delta) * xp.clip(xp.abs(delta), *ends[task]) * score
        below = below + score
    return elements.base + above / xp.maximum(below, 1e-12) * scale


def _check(options):
    check_between(options, "ratio", 0, 1)
    check_choice(options, "interaction", ("sum", "pairwise"))
    check_choice(options, "scope", ("leaf", "model"))


PCB = Method(
    merge_pcb,
    "entries balanced within and between tasks",
    "arXiv:2410.02396",
    scope_option="scope",
    check=_check,
)
