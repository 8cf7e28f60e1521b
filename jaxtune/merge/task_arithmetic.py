"""Sums of task vectors, as they are: addition, negation and analogies."""

from jaxtune.merge.affine import only_whole, take
from jaxtune.merge.method import Method
from jaxtune.merge.sparse_sum import sum_of_weights
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_task_arithmetic(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
    density: tuple[float, ...] = 1.0,
    rescale: bool = False,
    int8_mask: bool = False,
) -> Combine:
    """`θ_0 + λ Σ w_i (θ_i - θ_0)`, the sum divided by `Σ w_i` with `normalize`; negative weights negate.

    `density`, `rescale` and `int8_mask` are without effect, as in mergekit, whose recipes may have them.

    Reference:
        Ilharco et al. 2023, arXiv:2212.04089.
    """
    total = sum_of_weights(weight) if normalize else 1.0
    shares = tuple(lambda_ * one / total for one in weight)
    whole = only_whole(shares)
    return take(whole) if whole is not None else Combine(add_task_vectors, (shares, 1.0 - sum(shares)))


def add_task_vectors(elements: Elements, weight: tuple, rest: float) -> Leaf:
    """`θ_0 + Σ w_i τ_i`, as `(1 - Σ w_i) θ_0 + Σ w_i θ_i`: no difference is made, so weights of 1 and 0 are exact."""
    merged = elements.base * rest
    for model, factor in zip(elements.models, weight, strict=True):
        merged += model * factor
    return merged


TASK_ARITHMETIC = Method(
    merge_task_arithmetic,
    "base plus weighted task vectors",
    "arXiv:2212.04089",
    per_model=("weight", "density"),
    presets={"fusionbench": {"lambda": 0.3}},
)
