"""DELLA: task vectors thinned at random, with better odds for larger changes."""

from jaxtune.merge.method import Method
from jaxtune.merge.sparse_sum import add_cut, add_elected
from jaxtune.merge.sparsify import Cut, check_sparse, cut_random, find_gains
from jaxtune.merge.view import Combine, View


def merge_della(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    density: tuple[float, ...] = 1.0,
    epsilon: tuple[float, ...] = 0.15,
    normalize: bool | str = True,
    rescale: bool | str = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Combine:
    """Thins each row by rank, elects signs among what is left, averages what agrees, as in `merge_ties`.

    Args:
        view: Of the leaf.
        weight: Of each task vector.
        density: Mean probability to be kept; 1 keeps all and 0 nothing, whatever epsilon.
        epsilon: The smallest of a row is kept with probability `density - epsilon`, the largest with
            `density + epsilon`, the others in equal steps of rank between.
        normalize: Divides by the weights that agree.
        rescale: As `sparsify.find_gains`: True restores the L1 norm of the leaf's task vector.
        lambda_: Of the merged task vector; `lambda` in recipes.
        int8_mask: Without effect: masks are never stored.

    Reference:
        Deep et al. 2024, arXiv:2406.11617. Differs from mergekit: equal magnitudes share the odds of their middle
        rank, where there any order may come; a row of one element has odds `density` (0/0 there); leaves of more than
        two axes are ranked along the input axis (along the second axis there).
    """
    cuts = [_cut_ranked(*numbers) for numbers in zip(density, epsilon, strict=True)]
    return add_elected(view, cuts, weight, find_gains(view, cuts, density, rescale), normalize=normalize, scale=lambda_)


def merge_della_linear(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    density: tuple[float, ...] = 1.0,
    epsilon: tuple[float, ...] = 0.15,
    normalize: bool = False,
    rescale: bool | str = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Combine:
    """`merge_della` without an election: the thinned task vectors are summed."""
    cuts = [_cut_ranked(*numbers) for numbers in zip(density, epsilon, strict=True)]
    return add_cut(cuts, weight, find_gains(view, cuts, density, rescale), normalize=normalize, scale=lambda_)


def _cut_ranked(density, epsilon):
    cut = cut_random(density)
    is_flat = isinstance(epsilon, (int, float)) and epsilon == 0
    return Cut("ranked", (density, epsilon)) if cut.rule == "random" and not is_flat else cut


DELLA = Method(
    merge_della,
    "task vectors thinned by rank within rows, averaged where they agree with the elected sign",
    "arXiv:2406.11617",
    unit="row",
    per_model=("weight", "density", "epsilon"),
    check=check_sparse,
)
DELLA_LINEAR = Method(
    merge_della_linear,
    "task vectors thinned by rank within rows, summed",
    "arXiv:2406.11617",
    unit="row",
    per_model=("weight", "density", "epsilon"),
    check=check_sparse,
)
