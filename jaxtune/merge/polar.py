"""Polar factors: the nearest matrix with orthonormal columns, by matrix products on a device, by LAPACK on the host."""

import functools
from typing import Any

import numpy as np

from jaxtune.types import Leaf

SMALLEST = {4: 3e-6, 8: 1e-12}  # bytes of a number -> least singular value, of 1, that ends at 1
CUSHION, MARGIN = 0.05, 1.001
GRAM_RATIO = 1e-5  # least ratio of singular values for which a Gram matrix in float64 is asked


def polar(xp: Any, matrix: Leaf) -> Leaf:
    """`U Vᵀ` of `M = U Σ Vᵀ`, and zero on directions where M is zero.

    Shapes:
        matrix, result: float[m, n], in one dtype.

    Where M has no full rank the factor is no longer unique; what comes out is the partial isometry, whose singular
    values are 1 on the range of M and 0 beside it (`U Vᵀ` of an SVD has arbitrary ones there). On the host a singular
    value counts as zero up to max(m, n) machine epsilons of the largest. On a device none is looked at: those that are
    `SMALLEST` of `‖MᵀM‖_F^(1/2)` or more end at 1 within some machine epsilons, smaller ones between 0 and 1, zeros
    at 0.
    """
    return _polar_host(matrix) if xp is np else newton_schulz(xp, matrix)


def multiply(xp: Any, *factors: Leaf) -> Leaf:
    """A product of matrices, from the left; on devices in full precision and not in that of their tensor cores."""
    if xp is np:
        return functools.reduce(np.matmul, factors)
    return functools.reduce(functools.partial(xp.matmul, precision="highest"), factors)


def newton_schulz(xp: Any, matrix: Leaf) -> Leaf:
    """The polar factor by products alone: odd polynomials that bring all singular values to 1.

    Shapes:
        matrix, result: float[m, n]. Where m < n its transpose is worked on, so that Gram matrices are small.

    Each step is the polynomial of degree 5 that is nearest to 1 on the interval where the singular values then are
    (`plan_steps`); in the end that is `(15x - 10x³ + 3x⁵) / 8`, whose errors cube, so that the factor is as orthonormal
    as the arithmetic allows. Error of the result: a few machine epsilons times the condition number, as an SVD's.

    Reference:
        Amsel et al. 2025, arXiv:2505.16932 (Polar Express), Algorithm 1. Differs: planned to the end, for float32 and
        float64, so that no step is damped.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return newton_schulz(xp, matrix.T).T
    # (Σ σ⁴)^(1/4): no singular value is larger, and it is at most n^(1/4) of the largest.
    gram = multiply(xp, matrix.T, matrix)
    size = xp.max(xp.abs(gram))
    safe = xp.where(size > 0, size, 1.0)
    bound = xp.sqrt(safe * xp.sqrt(xp.sum((gram / safe) ** 2)))
    x = matrix / xp.where(size > 0, bound, 1.0)
    for a, b, c in plan_steps(SMALLEST[np.dtype(matrix.dtype).itemsize]):
        gram = multiply(xp, x.T, x)
        x = a * x + multiply(xp, x, b * gram + c * multiply(xp, gram, gram))
    return x


@functools.cache
def plan_steps(smallest: float) -> tuple[tuple[float, float, float], ...]:
    """Coefficients of x, x³ and x⁵, step by step, that take all of [`smallest`, 1] to 1.

    No step is planned for less than `CUSHION` of the largest: a polynomial that is good for tiny values is so by taking
    some large ones down to them, and with them the digits of their vectors. Each is planned for somewhat more than the
    largest, above which it is steep: rounding would grow from step to step.
    """
    low, high, steps = smallest, 1.0, []
    while high - low > 1e-6:  # the cube of which is below the machine epsilon of float64
        (a, b, c), error = _nearest_to_one(max(low, CUSHION * high), MARGIN * high)
        steps.append((a, b, c))
        low, high = min(a * low + b * low**3 + c * low**5, 1 - error), 1 + error
    return (*steps, (15 / 8, -10 / 8, 3 / 8), (15 / 8, -10 / 8, 3 / 8))


def _nearest_to_one(low, high):
    """(a, b, c), error: a x + b x³ + c x⁵ nearest to 1 on [low, high], by Remez exchange of its two inner extrema."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        moved = np.sqrt(np.sort([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
        if not np.all(np.isfinite(moved)) or np.abs(moved - inner).max() < 1e-12 * high:
            break
        inner = np.clip(moved, low, high)
    return (float(a), float(b), float(c)), float(error)


def _polar_host(matrix):
    if 0 in matrix.shape:
        return matrix
    if matrix.shape[0] < matrix.shape[1]:
        return _polar_host(matrix.T).T
    gram = matrix.T @ matrix
    values, vectors = np.linalg.eigh(gram)
    if values[0] > GRAM_RATIO**2 * values[-1]:
        factor = matrix @ ((vectors / np.sqrt(values)) @ vectors.T)
        if values[0] > 1e-7 * values[-1]:
            return factor
        # The Gram matrix has squared the condition number: lengths of the smallest directions are off by that much of
        # a machine epsilon, which one step of Newton-Schulz squares away.
        return 1.5 * factor - 0.5 * factor @ (factor.T @ factor)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.count_nonzero(values > np.finfo(matrix.dtype).eps * max(matrix.shape) * values[0]))
    return left[:, :rank] @ right[:rank]
