"""Spectral methods on long matrices (tables of a row a token): rows are read in passes and never all held.

Of a long matrix M the n×n matrix MᵀM says all but the left singular vectors, which are M times something: what comes
out is `θ_0 + λ Σ_t τ_t B_t` with n×n matrices B_t, row by row. All in float64; singular values below about 1e-8 of the
largest count as zero, as MᵀM does not show them.
"""

from typing import Any

import numpy as np

from jaxtune.merge.polar import polar
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf

RUN = 1 << 21  # elements of one product
GRAM_RATIO = 1e-4  # least ratio of singular values at which one pass gives a polar factor to 1e-8


def flatten_long(view: View, scale: float) -> Combine:
    """Iso-C of a long matrix: `θ_0 + λ σ̄ Q`, Q the polar factor of Σ τ_t."""
    gram = _add_up(view, _gram_of_sum)
    root, ratio = _inverse_root(gram)
    if ratio < GRAM_RATIO:  # Q once more, from what it makes of the matrix; then the angle that it is off by
        root = root @ _inverse_root(_add_up(view, _gram_of_sum, root))[0]
        root = root @ polar(np, _add_up(view, _product_of_sum, root))
    # The singular values are the eigenvalues of QᵀM, which add up to the inner product of Q and M, here of B and MᵀM.
    mean = np.sum(root * gram) / max(min(view.shape), 1)
    return Combine(_add_products, (scale, ((mean * root).astype(view.dtype),)))


def join_long(view: View, scale: float, kept: int) -> Combine:
    """TSV-M of a long matrix: the `kept` strongest directions of every task, orthonormal together."""
    rights, values = [], []
    for task in range(view.num_models):
        value, right = _strongest(_add_up(view, _gram_of_task, task=task), kept)
        rights.append(right)
        values.append(value)
    lefts = [right / np.where(value > 0, value, 1.0) for right, value in zip(rights, values, strict=True)]
    joined = _inverse_root(_add_up(view, _gram_of_lefts, tuple(lefts)))[0]
    joined = joined @ (np.concatenate(values)[:, None] * polar(np, np.concatenate(rights, axis=1)).T)
    places = np.split(joined, view.num_models)
    products = [(left @ rows).astype(view.dtype) for left, rows in zip(lefts, places, strict=True)]
    return Combine(_add_products, (scale, tuple(products)))


def _add_up(view, function, *numbers, **constants):
    return view.add_up(function, *numbers, num_rows=max(1, RUN // view.shape[view.input_axis]), **constants)


def _delta(elements, task):
    return (elements.models[task] - elements.base).astype(np.float64, copy=False)


def _sum_of_deltas(elements):
    total = elements.base * np.float64(-len(elements.models))
    for model in elements.models:
        total += model
    return total


def _gram_of_sum(elements: Elements, root: Leaf | None = None) -> Leaf:
    rows = _sum_of_deltas(elements)
    rows = rows if root is None else rows @ root
    return rows.T @ rows


def _product_of_sum(elements: Elements, root: Leaf) -> Leaf:
    rows = _sum_of_deltas(elements)
    return (rows @ root).T @ rows


def _gram_of_task(elements: Elements, *, task: int) -> Leaf:
    rows = _delta(elements, task)
    return rows.T @ rows


def _gram_of_lefts(elements: Elements, lefts: tuple[Leaf, ...]) -> Leaf:
    rows = np.concatenate([_delta(elements, task) @ left for task, left in enumerate(lefts)], axis=1)
    return rows.T @ rows


def _strongest(gram, count):
    """(values, vectors) of the `count` largest singular values of what the Gram matrix is of; zero where they are."""
    from scipy.linalg import eigh

    size = len(gram)
    squares, vectors = eigh(gram, subset_by_index=[size - count, size - 1], overwrite_a=True, check_finite=False)
    is_there = squares > 1e-16 * size * squares[-1]
    return np.sqrt(np.where(is_there, squares, 0.0))[::-1], np.where(is_there, vectors, 0.0)[:, ::-1]


def _inverse_root(gram) -> tuple[np.ndarray, float]:
    """`G^(-1/2)`, zero where G is; and the ratio of the least singular value that is there to the largest."""
    values, vectors = _strongest(gram.copy(), len(gram))
    is_there = values > 0
    if not is_there.any():
        return np.zeros_like(gram), 1.0
    vectors, values = vectors[:, is_there], values[is_there]
    return (vectors / values) @ vectors.T, float(values[-1] / values[0])


def _add_products(elements: Elements, scale: Any, products: tuple[Leaf, ...]) -> Leaf:
    """`θ_0 + scale Σ τ_t B_t`; one B is that of the sum."""
    xp = elements.xp
    multiply = xp.matmul if xp is np else lambda a, b: xp.matmul(a, b, precision="highest")
    if len(products) == 1:
        update = multiply(sum(elements.deltas[1:], elements.deltas[0]), products[0])
    else:
        update = sum(multiply(delta, product) for delta, product in zip(elements.deltas, products, strict=True))
    return elements.base + update * scale
