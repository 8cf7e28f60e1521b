"""WiSE-FT: the line between a base and its fine-tuned model."""

from jaxtune.merge.affine import combine_linearly
from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, View


def merge_wise_ft(view: View, *, alpha: float = 0.5) -> Combine:
    """`(1 - α) θ_0 + α θ_1`: the base at 0 and the model at 1, both bit for bit; beyond, the line goes on.

    Reference:
        Wortsman et al. 2022, arXiv:2109.01903.
    """
    return combine_linearly((alpha,), 1 - alpha)


WISE_FT = Method(merge_wise_ft, "on the line from base to model", "arXiv:2109.01903", num_models=(1, 1))
