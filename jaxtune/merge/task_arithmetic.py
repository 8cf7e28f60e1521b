"""Sums of task vectors, as they are: addition, negation and analogies."""

from jaxtune.merge.linear import divide
from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_task_arithmetic(
    view: View, *, weight: tuple[float, ...] = 1.0, normalize: bool = False, lambda_: float = 1.0
) -> Combine:
    """`θ_0 + λ Σ w_i (θ_i - θ_0)`, the sum divided by `Σ w_i` with `normalize`; negative weights negate.

    Reference:
        Ilharco et al. 2023, arXiv:2212.04089.
    """
    total = sum(weight) if normalize else 1.0
    shares = tuple(divide(lambda_ * one, total) for one in weight)
    return Combine(add_task_vectors, (shares, 1.0 - sum(shares)))


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
    per_model=("weight",),
    presets={"fusionbench": {"lambda": 0.3}},
)
