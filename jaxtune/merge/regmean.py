"""The matrix whose answers are nearest to every model's on that model's own inputs."""

import math

import numpy as np

from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.merge.covariance import divide_matrix
from jaxtune.merge.factors import is_matrix
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.polar import multiply
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

LEAST_RIDGE = {4: 1e-6, 8: 0.0}  # bytes of a number -> ridge that a solve in it needs


def merge_regmean(
    view: View, *, weight: tuple[float, ...] = 1.0, off_diagonal: float = 0.95, ridge: float = 1e-10
) -> Combine:
    """`W = (Σ λ_t W_t G_t + ρ W̄)(Σ λ_t G_t + ρ I)⁻¹` (y = W x), `G_t = X_tᵀ X_t` of the inputs of task t.

    It minimises `Σ λ_t ‖W X_tᵀ - W_t X_tᵀ‖²`. Off-diagonal entries of G_t are scaled first; ρ is the `ridge` times the
    mean diagonal entry: inputs that no task has keep the mean W̄.

    A leaf of our own families, `.../kernel`, has its inputs first, one axis or several (heads and their units, the
    patch of a convolution); they count as one, in their order.

    Args:
        view: Of the models, with Grams as extras. Leaves without are averaged, with weights λ.
        weight: λ.
        off_diagonal: 0 leaves the diagonals, 1 is the least-squares solution.
        ridge: At least 1e-6 in float32.

    Shapes:
        extras: float[n, n], n the number of the leaf's inputs.

    Reference:
        Jin et al. 2023, arXiv:2212.09849. Differs: the ridge, which the release lacks and fails without where an input
        is always zero.
    """
    if view.extra_shapes is None:
        raise ConfigError("merge method 'regmean' needs Grams, one tree a model; none were given.")
    shape = view.extra_shapes[0]
    if shape is None:
        return Combine(_average, (tuple(weight),))
    is_kernel = view.name.endswith("/kernel")
    sizes = [math.prod(view.shape[:end]) for end in range(1, len(view.shape))] if is_kernel else []
    if len(shape) == 2 and shape[0] == shape[1] and shape[0] in sizes:
        return Combine(_solve, (tuple(weight), off_diagonal, ridge), (("input_axis", 0),))
    known = sizes or ([view.shape[view.input_axis]] if is_matrix(view) else [])
    wanted = (known[0],) * 2 if known else None
    if shape != wanted:
        raise TreeMismatchError(
            f"{view.name}: a Gram has the shape {shape}; "
            + (f"expected {wanted}." if wanted else f"a leaf of the shape {view.shape} is no matrix and has none.")
        )
    return Combine(_solve, (tuple(weight), off_diagonal, ridge), (("input_axis", view.input_axis),))


def _average(elements: Elements, weight: tuple) -> Leaf:
    merged = sum(model * factor for model, factor in zip(elements.models, weight, strict=True))
    return merged / sum(weight)


def _solve(elements: Elements, weight: tuple, off_diagonal: float, ridge: float, input_axis: int) -> Leaf:
    xp, count = elements.xp, len(elements.models)
    above = below = mean = 0.0
    for model, gram, factor in zip(elements.models, elements.extras, weight, strict=True):
        model = model.reshape(len(gram), -1) if input_axis == 0 else model
        matrix = model.T if input_axis % 2 == 0 else model
        if xp is np:
            matrix, gram = matrix.astype(np.float64), gram.astype(np.float64)
        is_diagonal = xp.eye(len(gram), dtype=bool)
        gram = xp.where(is_diagonal, gram, gram * off_diagonal) * factor
        above, below = above + multiply(xp, matrix, gram), below + gram
        mean = mean + matrix / count
    size = xp.trace(below) / len(below)
    pull = xp.where(size > 0, size, 1.0) * xp.maximum(ridge, LEAST_RIDGE[below.dtype.itemsize])
    merged = divide_matrix(xp, above + pull * mean, below + pull * xp.eye(len(below), dtype=below.dtype))
    merged = merged.T if input_axis % 2 == 0 else merged
    return merged.reshape(elements.models[0].shape).astype(elements.dtype)


def _check(options):
    check_between(options, "weight", 0, float("inf"))
    check_between(options, "off_diagonal", 0, 1)
    check_between(options, "ridge", 0, float("inf"))


REGMEAN = Method(
    merge_regmean,
    "least squares over the inputs of every model",
    "arXiv:2212.09849",
    unit="leaf",
    base="may",
    per_model=("weight",),
    data="grams",
    presets={"fusionbench-gpt2": {"off_diagonal": 0.6}},
    check=_check,
)
