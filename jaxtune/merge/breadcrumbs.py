"""Model Breadcrumbs: task vectors without their smallest changes and without their largest."""

import math

from jaxtune.merge.method import Method
from jaxtune.merge.sparse_sum import add_cut, add_elected
from jaxtune.merge.sparsify import Cut, check_sparse, cut_top, find_gains, magnitude
from jaxtune.merge.view import Combine, View


def merge_breadcrumbs(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    density: tuple[float, ...] = 1.0,
    gamma: tuple[float, ...] = 0.01,
    normalize: bool = False,
    rescale: bool | str = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Combine:
    """`θ_0 + λ Σ w_k band(τ_k)`: of n elements by magnitude the ⌊γn⌋ largest go, and of the rest ⌊density·n⌋ stay.

    Args:
        view: Of the leaf.
        weight: Of each task vector.
        density: Share that is kept. Fewer of the largest go where otherwise too few were left; at 1 all is kept.
        gamma: Share of the largest that go.
        normalize: Divides by `Σ w_k`.
        rescale: As `sparsify.find_gains`.
        lambda_: Of the merged task vector; `lambda` in recipes.
        int8_mask: Without effect: masks are never stored.

    Reference:
        Davari and Belilovsky 2023, arXiv:2312.06795. As mergekit has it, ranks are those of the whole leaf; the
        authors' code ranks within rows of a matrix.
    """
    cuts = _cut_bands(view, density, gamma)
    return add_cut(cuts, weight, find_gains(view, cuts, density, rescale), normalize=normalize, scale=lambda_)


def merge_breadcrumbs_ties(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    density: tuple[float, ...] = 1.0,
    gamma: tuple[float, ...] = 0.01,
    normalize: bool | str = False,
    rescale: bool | str = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Combine:
    """`merge_breadcrumbs` with signs elected among what was kept, as in `merge_ties`."""
    cuts = _cut_bands(view, density, gamma)
    return add_elected(view, cuts, weight, find_gains(view, cuts, density, rescale), normalize=normalize, scale=lambda_)


def _cut_bands(view, density, gamma):
    return [_cut_band(view, k, *numbers) for k, numbers in enumerate(zip(density, gamma, strict=True))]


def _cut_band(view, model, density, gamma):
    if density >= 1:
        return Cut("all")
    kept = math.floor(density * view.size)
    gone = min(math.floor(gamma * view.size), view.size - kept)
    if gone == 0 or kept == 0:
        return cut_top(view, model, kept)
    lower, upper = view.rank_from_top(magnitude, (gone + kept, gone), model=model)
    return Cut("band", (lower.value, lower.last, upper.value, upper.last))


BREADCRUMBS = Method(
    merge_breadcrumbs,
    "task vectors without their smallest and largest changes, summed",
    "arXiv:2312.06795",
    per_model=("weight", "density", "gamma"),
    check=check_sparse,
)
BREADCRUMBS_TIES = Method(
    merge_breadcrumbs_ties,
    "task vectors without their smallest and largest changes, summed where they agree with the elected sign",
    "arXiv:2312.06795",
    per_model=("weight", "density", "gamma"),
    check=check_sparse,
)
