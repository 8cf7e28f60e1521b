"""Closed forms for changes of basis: the best rotation, the best invertible map inside a head."""

from dataclasses import dataclass

import numpy as np

from jaxtune.symmetry.linear import fix_ones

# Directions in which a side does (almost) nothing, relative to its strongest, cannot be balanced and are left
# alone. Gram matrices of float32 products know singular values to 3e-4 of the largest and no better.
RANK_TOLERANCE = 1e-3
# A map worse conditioned than this would blow up whatever a fine-tune changed along its weak directions.
MAX_CONDITION = 1e3


def polar_factor(matrix: np.ndarray) -> np.ndarray:
    """The orthogonal matrix nearest to `matrix`: float[..., n, n] -> float64[..., n, n].

    It maximises `trace(O^T matrix)`; where `matrix` is singular, one of several.
    """
    left, _, right = np.linalg.svd(np.asarray(matrix, np.float64))
    return left @ right


def centred_polar_factor(matrix: np.ndarray) -> np.ndarray:
    """The same among the orthogonal matrices that keep the ones vector: float[n, n] -> float64[n, n]."""
    basis = fix_ones(len(matrix))
    turned = basis @ np.asarray(matrix, np.float64) @ basis.T
    whole = np.eye(len(matrix))
    whole[1:, 1:] = polar_factor(turned[1:, 1:])
    return basis.T @ whole @ basis


def balance(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map S after which both sides of a circuit have one Gram matrix: (S, its inverse).

    Args:
        rows, columns: Gram matrices of the two sides, `X^T X` and `Y^T Y`.

    Shapes:
        rows, columns: float[..., n, n]. Both results: float64[..., n, n].

    `X S` and `Y S^-T` make the same product `X Y^T`, and share one diagonal Gram matrix. Any two
    factorisations of one product then differ by a rotation only. Directions that the product does not use
    are left unscaled.
    """
    half_rows, half_columns = _root(rows), _root(columns)
    left, values, _ = np.linalg.svd(half_rows @ half_columns)
    values = np.maximum(values, RANK_TOLERANCE * values[..., :1] + np.finfo(np.float64).tiny)
    # X^T X = R R with R symmetric, and R_x R_y = U V W^T, so S = R_x^-1 U sqrt(V).
    forward = np.linalg.solve(half_rows, left) * np.sqrt(values)[..., None, :]
    return forward, np.linalg.inv(forward)


@dataclass(frozen=True)
class Sides:
    """What one network's circuits look like from inside their heads; no element of the other groups changes it.

    Attributes:
        grams: Gram matrices of the two sides, `X^T X` and `Y^T Y`, the sides being (query, key) or (value, output).
        forward: The balancing map of each head, see `balance`. Its inverse is made when asked for: one more matrix a
            head, kept for the whole search, is more than the time is worth.

    Shapes:
        every matrix: float64[heads, n, n].
    """

    grams: tuple[np.ndarray, np.ndarray]
    forward: np.ndarray

    @property
    def backward(self) -> np.ndarray:
        """The inverse of `forward`."""
        return np.linalg.inv(self.forward)

    def reorder(self, order: np.ndarray) -> "Sides":
        """The same with the heads in another order."""
        rows, columns = (gram[order] for gram in self.grams)
        return Sides((rows, columns), self.forward[order])


def make_sides(rows: np.ndarray, columns: np.ndarray) -> Sides:
    """Balances the two sides of every head."""
    return Sides((rows, columns), balance(rows, columns)[0])


def solve_inside(
    cross: tuple[np.ndarray, np.ndarray], source: Sides, target: Sides, current: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The map inside each head that brings the source's two sides closest to the target's.

    Minimises `|X_A g - X_B|^2 + |Y_A g^-T - Y_B|^2` over three candidates and keeps the best for each head:
    the current map, the best rotation, and the rotation between the balanced sides. The last is exact where the
    two heads are one circuit of full rank in two bases. Maps of a condition above 1000 are not considered.

    Args:
        cross: `X_A^T X_B` and `Y_A^T Y_B`.
        source, target: Either network's own sides, heads in matching order.
        current: Maps to beat.

    Shapes:
        cross, current: float[heads, n, n].
        returns: maps float64[heads, n, n] and their objective float64[heads], see `inside_objective`.

    Reference:
        Schönemann 1966 (orthogonal Procrustes); for the balanced start, the gauge of a matrix product.
    """
    x, y = (np.asarray(matrix, np.float64) for matrix in cross)
    # In balanced coordinates: X_A S_A against X_B S_B, Y_A S_A^-T against Y_B S_B^-T.
    source_back, target_back = source.backward, target.backward
    turned = _t(source.forward) @ x @ target.forward + source_back @ y @ _t(target_back)
    rotation, balanced = polar_factor(x + y), polar_factor(turned)
    current = np.asarray(current, np.float64)
    candidates = [current, rotation, source.forward @ balanced @ target_back]
    inverses = [np.linalg.inv(current), _t(rotation), target.forward @ _t(balanced) @ source_back]
    scores = np.stack(
        [_objective(g, inverse, cross, source.grams) for g, inverse in zip(candidates, inverses, strict=True)]
    )
    usable = np.isfinite(scores)
    # The current map has passed, and a rotation always does. The norms bound the condition, which takes an SVD.
    with np.errstate(over="ignore", invalid="ignore"):  # directions without use may have run to either end
        bound = np.linalg.norm(candidates[2], axis=(1, 2)) * np.linalg.norm(inverses[2], axis=(1, 2))
    doubtful = ~(bound < MAX_CONDITION)
    usable[2, doubtful] &= np.linalg.cond(candidates[2][doubtful]) < MAX_CONDITION
    scores = np.where(usable, scores, -np.inf)
    best = np.argmax(scores, axis=0)
    heads = np.arange(len(best))
    return np.stack(candidates)[best, heads], scores[best, heads]


def inside_objective(
    maps: np.ndarray, cross: tuple[np.ndarray, np.ndarray], source: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """`<X_B, X_A g> - |X_A g|^2 / 2`, and the same for the dual side: float[heads, n, n] -> float64[heads].

    Minus half the squared distance to the target, up to the target's own square.
    """
    return _objective(maps, np.linalg.inv(maps), cross, source)


def _objective(maps, inverse, cross, source):
    x, y = cross
    products = np.sum(x * maps, axis=(1, 2)) + np.sum(y * _t(inverse), axis=(1, 2))
    squares = np.sum(maps * (source[0] @ maps), axis=(1, 2)) + np.sum(inverse * (inverse @ source[1]), axis=(1, 2))
    return products - 0.5 * squares


def _root(gram):
    """Symmetric square root, with silent directions lifted off zero so that it can be inverted."""
    values, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    values = np.maximum(values, RANK_TOLERANCE**2 * values[..., -1:] + np.finfo(np.float64).tiny)
    return (vectors * np.sqrt(values)[..., None, :]) @ _t(vectors)


def _t(matrix):
    return np.swapaxes(matrix, -1, -2)
