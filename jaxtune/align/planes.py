"""Closed forms for rotary planes: the best complex number of each, the best sign of each."""

import numpy as np

from jaxtune.align.factors import MAX_SCALE, best_scales

# Phase and modulus in turn, each the best for the other, from a start that is exact on planted pairs.
NUM_TURNS = 5

# Of one network's planes inside its heads, over the plain and over the dual leaves: float64[heads, n/2] each.
Squares = tuple[np.ndarray, np.ndarray]


def solve_planes(
    cross: tuple[np.ndarray, np.ndarray], source: Squares, target: Squares, current: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The number of each plane that brings the source's two sides closest to the target's.

    Maximises `planes_objective` plane by plane over three starts and keeps the best: the current number, a turn
    alone, and the turn after the stretch that makes source and target equally unbalanced. The last is exact where
    source and target are one plane in two gauges. The last two are improved by turns of phase and modulus.

    Args:
        cross: `sum conj(target) source` of every plane over the plain and over the dual leaves.
        source, target: Squared norms of the planes.
        current: Numbers to beat.

    Shapes:
        cross: complex[heads, n/2] each. current: complex[heads, n/2].
        returns: complex128[heads, n/2] and their objective float64[heads].
    """
    x, y = (np.asarray(product, np.complex128) for product in cross)
    ones = np.ones(x.shape)
    candidates = [np.asarray(current, np.complex128)]
    for modulus in (ones, np.clip(_balance(*source) / _balance(*target), 1 / MAX_SCALE, MAX_SCALE)):
        for _ in range(NUM_TURNS):
            phase = _phase(modulus * x + y / modulus)
            candidates.append(modulus * phase)
            modulus = best_scales((x * phase).real, (y * phase).real, *source)
        candidates.append(modulus * _phase(modulus * x + y / modulus))
    gains = np.stack([_gain(z, cross, source) for z in candidates])
    best = np.argmax(gains, axis=0)[None]
    chosen = np.take_along_axis(np.stack(candidates), best, axis=0)[0]
    return chosen, np.take_along_axis(gains, best, axis=0)[0].sum(axis=-1)


def planes_objective(numbers: np.ndarray, cross: tuple[np.ndarray, np.ndarray], source: Squares) -> np.ndarray:
    """`<X_B, X_A z> - |X_A z|^2 / 2`, and the same for the dual side with 1 / conj(z): float64[heads]."""
    return _gain(np.asarray(numbers, np.complex128), cross, source).sum(axis=-1)


def solve_plane_signs(cross: tuple[np.ndarray, np.ndarray], current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sign of each plane that maximises the inner products over both sides: exact.

    Shapes:
        cross: complex[heads, n/2] each. current: float[heads, n/2], kept where nothing speaks for either sign.
        returns: float64[heads, n/2] and their objective float64[heads].
    """
    product = (cross[0] + cross[1]).real.astype(np.float64)
    signs = np.where(product == 0, current, np.where(product < 0, -1.0, 1.0))
    return signs, np.abs(product).sum(axis=-1)


def _gain(z, cross, source):
    modulus = np.abs(z)
    products = (cross[0] * z + cross[1] * (z / modulus**2)).real
    return products - 0.5 * (source[0] * modulus**2 + source[1] / modulus**2)


def _phase(product):
    """What turns `product` onto the positive real axis; 1 where it is zero."""
    size = np.abs(product)
    return np.where(size > 0, np.conj(product) / np.where(size > 0, size, 1.0), 1.0)


def _balance(plain, dual):
    """The modulus after which both sides of a plane are equally long; 1 where one of them is zero."""
    is_alive = (plain > 0) & (dual > 0)
    return np.where(is_alive, np.where(is_alive, dual, 1.0) / np.where(is_alive, plain, 1.0), 1.0) ** 0.25
