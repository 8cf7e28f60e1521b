"""One model as it is, or scaled: the layers of frankenmerges."""

from jaxtune.merge.affine import combine_linearly
from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, View


def merge_passthrough(view: View, *, scale: tuple[float | None, ...] | None = None) -> Combine:
    """`scale · θ`; without a scale, the bits of the model."""
    return combine_linearly((1.0 if scale[0] is None else scale[0],))


PASSTHROUGH = Method(
    merge_passthrough, "one model, as it is or scaled", "mergekit", base="may", num_models=(1, 1), per_model=("scale",)
)
