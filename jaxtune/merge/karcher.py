"""The Karcher mean: the point of a sphere whose squared distances to all models sum to the least."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtune.merge.affine import combine_linearly, take
from jaxtune.merge.angles import angle_of, root
from jaxtune.merge.method import Method
from jaxtune.merge.sums import gram
from jaxtune.merge.view import Combine, View
from jaxtune.types import Leaf


def merge_karcher(view: View, *, max_iter: int = 10, tol: float = 1e-5) -> Combine:
    """Mean direction of the models on the unit sphere, times the mean of their lengths.

    Starts at the mean of the directions (where that vanishes, at the first) and follows the mean of the tangents that
    lead to each model. Inner products of the models are all that is needed: the search runs on coefficients.

    Args:
        view: Of the leaf.
        max_iter: Steps at most.
        tol: Steps, angles and lengths below it count as zero.

    Reference:
        Karcher 1977; arXiv:2603.04972; mergekit 0.1.5. Differs: a model opposite to the mean, to which no one way
        leads, does not pull.
    """
    if view.num_models == 1:
        return take(0)
    coefficients = find_karcher_mean(view.xp, view.reduce(gram), max_iter, tol)
    return combine_linearly(tuple(coefficients[k] for k in range(view.num_models)))


def find_karcher_mean(xp: Any, products: Leaf, max_iter: int, tol: float) -> Leaf:
    """Coefficients of the models, from their inner products."""
    lengths = root(xp, xp.diagonal(products))
    is_long = lengths > tol
    inverse = xp.where(is_long, 1.0 / xp.where(is_long, lengths, 1.0), 0.0)
    units = products * inverse[:, None] * inverse[None, :]  # inner products of the directions
    share = is_long.astype(lengths.dtype) / xp.maximum(is_long.sum(), 1).astype(lengths.dtype)

    def length_of(coefficients):
        return root(xp, coefficients @ units @ coefficients)

    def divide(coefficients, length):
        return coefficients / xp.where(length > 0, length, 1.0)

    size = length_of(share)
    first = (xp.arange(len(lengths)) == xp.argmax(is_long)).astype(lengths.dtype)
    mean = xp.where(size < tol, first, divide(share, size))

    def step(_, state):
        mean, is_done = state
        cosines = units @ mean
        angles = angle_of(xp, cosines)
        is_pulling = (angles >= tol) & (xp.pi - angles >= tol) & is_long
        pull = xp.where(is_pulling, share * angles / xp.where(is_pulling, xp.sin(angles), 1.0), 0.0)
        tangent = pull - (pull * cosines).sum() * mean
        size = length_of(tangent)
        is_done = is_done | (size < tol)
        moved = xp.cos(size) * mean + xp.sin(size) * divide(tangent, size)
        length = length_of(moved)
        moved = xp.where(length > tol, divide(moved, length), moved)
        return xp.where(is_done, mean, moved), is_done

    mean, _ = repeat(xp, max_iter, step, (mean, xp.asarray(False)))
    return xp.where(is_long, lengths.mean() * inverse * mean, 0.0)


def repeat(xp: Any, times: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """`step(n, state)` so many times; a loop that is compiled once where JAX computes."""
    if xp is np:
        return functools.reduce(lambda state, n: step(n, state), range(times), state)
    import jax

    return jax.lax.fori_loop(0, times, step, state)


KARCHER = Method(
    merge_karcher,
    "Karcher mean of the models on a sphere",
    "arXiv:2603.04972",
    base="may",
)
