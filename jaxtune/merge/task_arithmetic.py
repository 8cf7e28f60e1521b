"""Sums of task vectors, as they are: addition, negation and analogies."""

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
    return Combine(add_task_vectors, (tuple(weight), lambda_, total))


def add_task_vectors(elements: Elements, weight: tuple, scale: float, total: float) -> Leaf:
    """`θ_0 + scale Σ w_i τ_i / total`."""
    merged = elements.deltas[0] * weight[0]
    for delta, factor in zip(elements.deltas[1:], weight[1:], strict=True):
        merged = merged + delta * factor
    return elements.base + merged * (scale / total)


TASK_ARITHMETIC = Method(
    merge_task_arithmetic,
    "base plus weighted task vectors",
    "arXiv:2212.04089",
    per_model=("weight",),
    presets={"fusionbench": {"lambda": 0.3}},
)
