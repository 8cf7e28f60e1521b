"""NuSLERP: interpolation along the great circle between two models, or between their task vectors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.merge.affine import combine_linearly, only_whole, take
from jaxtune.merge.angles import root
from jaxtune.merge.method import Method, Unit
from jaxtune.merge.sums import gram
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

SHORT = 1e-7  # lengths below it count as this much, as mergekit has it
PARALLEL = 1e-16  # squared sine up to which two vectors are taken for parallel


def merge_nuslerp(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Combine:
    """From the first model to the second along the great circle, at `t = w_1 / (w_0 + w_1)`; with a base, task vectors.

    `sin((1-t)Ω)/sin(Ω) v_0 + sin(tΩ)/sin(Ω) v_1`, on the straight line where the two are parallel or opposite.

    Args:
        view: Of the leaf.
        weight: Of the two models; where they sum to zero, t is one half.
        nuslerp_row_wise: Without `nuslerp_flatten`: the vectors run along the outputs of a matrix, so that it has one
            for every input. The name is mergekit's, where the first axis of a tensor is that of the outputs.
        nuslerp_flatten: The leaf is one vector; otherwise every row of a matrix, all inputs of one output, is its own.

    Reference:
        mergekit 0.1.5, after Shoemake 1985.
    """
    total = sum(weight)
    is_zero = isinstance(total, (int, float)) and abs(total) < 1e-6
    t = 0.5 if is_zero else weight[1] / total
    whole = only_whole((1 - t, t))
    if whole is not None:
        return take(whole)
    if nuslerp_flatten:
        products = view.reduce(gram, of="deltas" if view.has_base else "models")
        first, second = find_coefficients(view.xp, products[0, 0], products[1, 1], products[0, 1], t)
        return combine_linearly((first, second), 1 - first - second if view.has_base else 0.0)
    axis = -1 if not nuslerp_row_wise else 0 if view.input_axis == -1 else -1
    return Combine(_turn_vectors, (t,), (("axis", axis), ("has_base", view.has_base)))


def find_coefficients(xp: Any, square_0: Any, square_1: Any, product: Any, t: Any) -> tuple[Any, Any]:
    """Coefficients of two vectors, from their inner products; numbers or arrays of them."""
    lengths = xp.maximum(root(xp, square_0), SHORT) * xp.maximum(root(xp, square_1), SHORT)
    cosine = xp.clip(product / lengths, -1.0, 1.0)
    is_parallel = 1 - cosine * cosine <= PARALLEL
    angle = xp.arccos(xp.where(is_parallel, 0.0, cosine))
    first = xp.where(is_parallel, 1 - t, xp.sin((1 - t) * angle) / xp.sin(angle))
    second = xp.where(is_parallel, t, xp.sin(t * angle) / xp.sin(angle))
    return first, second


def _turn_vectors(elements: Elements, t: Any, *, axis: int, has_base: bool) -> Leaf:
    xp, wide = elements.xp, np.float64 if elements.xp is np else None
    one, other = elements.deltas if has_base else elements.models
    shape = one.shape
    one, other = (array.reshape(-1) if not shape else array for array in (one, other))
    products = [
        xp.sum(a * b, axis=axis, keepdims=True, dtype=wide) for a, b in ((one, one), (other, other), (one, other))
    ]
    first, second = find_coefficients(xp, *products, t)
    merged = (one * first.astype(one.dtype) + other * second.astype(one.dtype)).reshape(shape)
    return elements.base + merged if has_base else merged


def _unit(options: Mapping[str, Any]) -> Unit:
    return "element" if options["nuslerp_flatten"] else "leaf" if options["nuslerp_row_wise"] else "row"


NUSLERP = Method(
    merge_nuslerp,
    "along the great circle between two models or task vectors, whole or by vectors of a matrix",
    "mergekit",
    unit=_unit,
    base="may",
    num_models=(2, 2),
    per_model=("weight",),
)
