"""DARE: task vectors of which a random share is kept and scaled up."""

from jaxtune.merge.method import Method
from jaxtune.merge.sparse_sum import add_cut, add_elected
from jaxtune.merge.sparsify import check_sparse, cut_random, find_gains
from jaxtune.merge.view import Combine, View

PRESETS = {
    "mergekit": {},
    "peft": {"rescale": "keep"},
    "fusionbench": {"rescale": "keep"},
    "paper": {"rescale": "keep"},
}


def merge_dare_linear(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    density: tuple[float, ...] = 1.0,
    normalize: bool = False,
    rescale: bool | str = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Combine:
    """`θ_0 + λ Σ w_k drop(τ_k)`: every element is kept with probability `density`, by seed, model, leaf and element.

    Args:
        view: Of the leaf.
        weight: Of each task vector.
        density: Probability to be kept.
        normalize: Divides by `Σ w_k`.
        rescale: As `sparsify.find_gains`: True restores the L1 norm of the leaf's task vector (mergekit), "keep"
            divides by the density (the paper, PEFT, FusionBench).
        lambda_: Of the merged task vector; `lambda` in recipes.
        int8_mask: Without effect: masks are never stored.

    Reference:
        Yu et al. 2024, arXiv:2311.03099.
    """
    cuts = [cut_random(share) for share in density]
    return add_cut(cuts, weight, find_gains(view, cuts, density, rescale), normalize=normalize, scale=lambda_)


def merge_dare_ties(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    density: tuple[float, ...] = 1.0,
    normalize: bool | str = False,
    rescale: bool | str = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    weigh_votes: bool = True,
) -> Combine:
    """`merge_dare_linear` with signs elected among what was kept, as in `merge_ties`.

    Reference:
        Yu et al. 2024, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708. The preset `peft` elects before the
        weights and divides by the number that agree.
    """
    cuts = [cut_random(share) for share in density]
    gains = find_gains(view, cuts, density, rescale)
    return add_elected(view, cuts, weight, gains, normalize=normalize, scale=lambda_, weigh_votes=weigh_votes)


DARE_LINEAR = Method(
    merge_dare_linear,
    "randomly thinned task vectors, summed",
    "arXiv:2311.03099",
    per_model=("weight", "density"),
    presets=PRESETS,
    check=check_sparse,
)
DARE_TIES = Method(
    merge_dare_ties,
    "randomly thinned task vectors, summed where they agree with the elected sign",
    "arXiv:2311.03099",
    per_model=("weight", "density"),
    presets={**PRESETS, "peft": {"rescale": "keep", "weigh_votes": False, "normalize": "count"}},
    check=check_sparse,
)
