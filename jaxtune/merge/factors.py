"""Leaves as matrices, and as few of their singular vectors as a method needs."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxtune.merge.options import check_choice
from jaxtune.merge.polar import multiply, newton_schulz
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.merge.weighted import add_weighted
from jaxtune.types import Leaf

GRAM_RATIO = 1e-4  # least ratio of singular values, last wanted to first, for which a Gram matrix in float64 is asked
OTHERS = ("average", "sum", "base")


def is_matrix(view: View) -> bool:
    """Whether a leaf has a spectrum: exactly two axes."""
    return len(view.shape) == 2


def merge_others(view: View, others: str, scale: Any) -> Combine:
    """What spectral methods do with leaves that are no matrices: vectors, scalars, kernels of convolutions.

    `θ_0 + scale (1/T) Σ τ` for "average", as FusionBench and most releases have it; "sum" has no 1/T; "base" leaves
    them alone, as merge-and-rebase has it by default.
    """
    factor = {"average": scale / view.num_models, "sum": scale, "base": 0.0 * scale}[others]
    return Combine(add_weighted, ((factor,) * view.num_models,))


def check_others(options: Any) -> None:
    """Checks the option `others` of spectral methods."""
    check_choice(options, "others", OTHERS)


def each_matrix(elements: Elements, input_axis: int) -> Iterator[Leaf]:
    """The task vectors as matrices [outputs, inputs], one at a time; on the host in float64."""
    for model in elements.models:
        delta = model - elements.base
        delta = delta.T if input_axis % 2 == 0 else delta
        yield delta.astype(np.float64, copy=False) if elements.xp is np else delta


def sum_matrices(elements: Elements, input_axis: int) -> Leaf:
    """The sum of the task vectors, as `each_matrix` has them."""
    if elements.xp is not np:
        return sum(each_matrix(elements, input_axis))
    # Sums of models and one difference: float64 has the digits to spare, and no task vector is written out.
    total = elements.base * np.float64(-len(elements.models))
    for model in elements.models:
        total += model
    return total.T if input_axis % 2 == 0 else total


def add_matrix(elements: Elements, matrix: Leaf, scale: Any, input_axis: int) -> Leaf:
    """`θ_0 + scale M`, M as `each_matrix` has them, in the leaf's own axes."""
    matrix = matrix.T if input_axis % 2 == 0 else matrix
    return (elements.base + matrix * scale).astype(elements.dtype)


def top_factors(xp: Any, matrix: Leaf, count: int | None = None, *, exact_tail: bool = True) -> tuple[Leaf, Leaf, Leaf]:
    """The `count` largest singular values, from the largest down, with their vectors: `M ≈ U diag(σ) Vᵀ`.

    Shapes:
        matrix: float[m, n].
        result: U float[m, count], σ float[count], V float[n, count]; `count` is min(m, n) where it is None or more.

    Where σ is zero (up to max(m, n) machine epsilons of the largest) so are the columns of U and V. On the host from
    the eigenvectors of the smaller Gram matrix, in float64, where the last value wanted is `GRAM_RATIO` of the first or
    more (errors then stay below 1e-8) or not `exact_tail`, for callers who drop what is small (values below 1e-8 of the
    first are then noise of that size, or zero); else by an SVD. On a device from the polar factor Q and the
    eigenvectors of QᵀM, which squares nothing.
    """
    count = min(matrix.shape) if count is None else min(count, *matrix.shape)
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = top_factors(xp, matrix.T, count, exact_tail=exact_tail)
        return left, values, right
    if count == 0:
        return matrix[:, :0], matrix[0, :0] if matrix.shape[0] else xp.zeros(0, matrix.dtype), matrix[:0].T[:, :0]
    found = _from_gram(matrix, count, exact_tail) if xp is np else None
    if found is not None:
        return found
    if xp is np:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        left, values, right = left[:, :count], values[:count], right[:count].T
    else:
        factor = newton_schulz(xp, matrix)
        product = multiply(xp, factor.T, matrix)
        values, right = xp.linalg.eigh((product + product.T) / 2)
        values, right = values[::-1][:count], right[:, ::-1][:, :count]
        left = multiply(xp, factor, right)
    is_there = values > np.finfo(matrix.dtype).eps * max(matrix.shape) * values[0]
    zero = xp.zeros((), matrix.dtype)
    left, right = (xp.where(is_there[None, :], vectors, zero) for vectors in (left, right))
    return left, xp.where(is_there, values, zero), right


def _from_gram(matrix, count, exact_tail):
    """Of a tall matrix, or None where squaring its singular values would cost too many digits."""
    from scipy.linalg import eigh

    gram = matrix.T @ matrix
    size = len(gram)
    if count < size // 2:
        squares, right = eigh(gram, subset_by_index=[size - count, size - 1], check_finite=False, driver="evr")
    else:
        squares, right = np.linalg.eigh(gram)
    squares, right = squares[::-1][:count], right[:, ::-1][:, :count]
    if not squares[-1] > GRAM_RATIO**2 * squares[0]:
        if exact_tail:
            return None
        is_there = squares > 1e-16 * squares[0] * size
        squares, right = np.where(is_there, squares, 0.0), np.where(is_there, right, 0.0)
    values = np.sqrt(squares)
    return (matrix @ right) / np.where(values > 0, values, 1.0), values, right
