"""TIES: trim small changes, elect a sign, average those that agree with it; with the conventions of four peers."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.merge.method import Method
from jaxtune.merge.options import check_choice
from jaxtune.merge.sparse_sum import add_elected
from jaxtune.merge.sparsify import Cut, check_sparse, cut_top, find_gains, magnitude
from jaxtune.merge.view import Combine, View

CHOICES = {
    "scope": ("leaf", "model"),
    "equals": ("first", "all"),
    "count": ("at_least_one", "floor", "one_more"),
    "vote": ("sum", "count"),
    "weigh_votes": (True, False),
    "zero_vote": ("plus", "majority", "none"),
    "normalize": (True, False, "count"),
}


def merge_ties(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    density: tuple[float, ...] = 1.0,
    normalize: bool | str = True,
    lambda_: float = 1.0,
    rescale: bool | str = False,
    int8_mask: bool = False,
    scope: str = "leaf",
    equals: str = "first",
    count: str = "at_least_one",
    vote: str = "sum",
    weigh_votes: bool = True,
    zero_vote: str = "plus",
) -> Combine:
    """`θ_0 + λ Σ w_k m_k τ_k / Σ w_k m_k` over trimmed task vectors, `m_k` where they agree with the elected sign.

    Args:
        view: Of one leaf, or of all (`scope`).
        weight: Of each task vector.
        density: Share of each task vector that is kept: the largest by magnitude.
        normalize: Divides by the weights that agree (True), by the number that agree ("count"), or not (False).
        lambda_: Of the merged task vector; `lambda` in recipes.
        rescale: As `sparsify.find_gains`; off in TIES.
        int8_mask: Without effect: masks are never stored.
        scope: Whether the largest are those of the "leaf" or of the whole "model".
        equals: Whether magnitudes equal to the last one kept are kept by place ("first": exactly that many), or "all".
        count: How many of n are kept: ⌊density·n⌋ but "at_least_one"; "floor"; or "one_more" (the threshold of the
            paper's code is the largest value that ought to go).
        vote, weigh_votes, zero_vote: As `sparse_sum.add_elected`.

    The defaults are mergekit's; `preset` has those of `peft`, of `fusionbench` (merge_func sum; threshold 20 is density
    0.2) and of the `paper` (ties-merging, `topk20_mass_dis-mean`).

    Reference:
        Yadav et al. 2023, arXiv:2306.01708. Differs from mergekit: equal magnitudes are kept by place, where there
        any of them may be; float64 is ranked in float64 and not in float32.
    """
    cuts = [_trim(view, k, density[k], count, equals) for k in range(view.num_models)]
    gains = find_gains(view, cuts, density, rescale)
    return add_elected(
        view,
        cuts,
        weight,
        gains,
        normalize=normalize,
        scale=lambda_,
        vote=vote,
        weigh_votes=weigh_votes,
        zero_vote=zero_vote,
    )


def _trim(view, model, density, count, equals):
    kept = math.floor(density * view.size)
    if count == "one_more":
        kept += 1
    elif count == "at_least_one" and density > 0:
        kept = max(kept, 1)
    if equals == "first" or not 0 < kept < view.size:
        return cut_top(view, model, kept)
    return Cut("at_least", (view.rank_from_top(magnitude, kept, model=model).value,))


def _check(options: Mapping[str, Any]) -> None:
    check_sparse(options)
    for option, choices in CHOICES.items():
        check_choice(options, option, choices)


_PAPER = {"scope": "model", "equals": "all", "count": "one_more", "weigh_votes": False, "zero_vote": "majority"}

TIES = Method(
    merge_ties,
    "trimmed task vectors, averaged where they agree with the elected sign",
    "arXiv:2306.01708",
    per_model=("weight", "density"),
    presets={
        "mergekit": {},
        "peft": {"count": "floor", "weigh_votes": False, "normalize": "count"},
        "fusionbench": {**_PAPER, "normalize": False, "density": 0.2, "lambda": 0.3},
        "paper": {**_PAPER, "normalize": "count", "density": 0.2},
    },
    scope_option="scope",
    check=_check,
)
