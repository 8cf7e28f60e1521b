"""Sums of task vectors, as they are: addition, negation and analogies."""

from jaxtune.merge.affine import combine_linearly, sum_exactly
from jaxtune.merge.method import Method
from jaxtune.merge.sparse_sum import sum_of_weights
from jaxtune.merge.view import Combine, View


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
    shares = [lambda_ * one for one in weight]
    # As (1 - Σ w_i) θ_0 + Σ w_i θ_i: no difference is made, so weights of 1 and 0 are exact.
    return combine_linearly(shares, total - sum_exactly(shares), total)


TASK_ARITHMETIC = Method(
    merge_task_arithmetic,
    "base plus weighted task vectors",
    "arXiv:2212.04089",
    per_model=("weight", "density"),
    presets={"fusionbench": {"lambda": 0.3}},
)
