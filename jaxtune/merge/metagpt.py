"""Task vectors weighted by their squared lengths."""

from jaxtune.merge.method import Method
from jaxtune.merge.options import check_choice
from jaxtune.merge.sums import dot_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.merge.weighted import add_weighted
from jaxtune.types import Leaf


def merge_metagpt(view: View, *, scope: str = "model", lambda_: float = 1.0) -> Combine:
    """`θ_0 + λ Σ λ_t τ_t` with `λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖²`, lengths of the whole "model" or of each "leaf".

    Reference:
        Zhou et al. 2024, arXiv:2406.11385: the closed form for task vectors that are orthogonal.
    """
    squares = view.reduce(_squares)
    total = squares.sum()
    weights = squares / view.xp.where(total > 0, total, 1.0)
    return Combine(add_weighted, (tuple(weights[k] * lambda_ for k in range(view.num_models)),))


def _squares(elements: Elements) -> Leaf:
    return elements.xp.stack([dot_wide(elements, delta, delta) for delta in elements.deltas])


METAGPT = Method(
    merge_metagpt,
    "task vectors weighted by their squared lengths",
    "arXiv:2406.11385",
    scope_option="scope",
    check=lambda options: check_choice(options, "scope", ("leaf", "model")),
)
