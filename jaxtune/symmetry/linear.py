"""Changes of basis: rotations of the residual stream, invertible maps inside a head.

An element is a matrix G (one per head inside heads). A leaf's axis becomes `sum_i leaf[i] G[i, j]`; the
dual side takes the inverse transpose, so that a product over the axis stays what it was.
"""

import numpy as np

from jaxtune.symmetry.groups import Kind

# How far G^T G may be from I, and G 1 from 1, in float32 and in float64.
TOLERANCE = {np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-8}


def _tolerance(matrix):
    return TOLERANCE.get(matrix.dtype, TOLERANCE[np.dtype(np.float32)])


def fix_ones(size: int) -> np.ndarray:
    """Orthonormal basis whose first vector is the normalised ones vector: float64[n, n], symmetric."""
    ones = np.full(size, size**-0.5)
    if size == 1:
        return ones[None]
    mirror = ones - np.eye(size)[0]  # the reflection that swaps the first axis and the ones vector
    return np.eye(size) - 2 * np.outer(mirror, mirror) / (mirror @ mirror)


def _identity(size, count):
    return np.eye(size) if count is None else np.tile(np.eye(size), (count, 1, 1))


def _draw_normal(key, size, count):
    import jax

    shape = (size, size) if count is None else (count, size, size)
    return np.asarray(jax.random.normal(key, shape, dtype=np.float32), np.float64)


def _draw_orthogonal(key, size, count):
    factor, triangle = np.linalg.qr(_draw_normal(key, size, count))
    # Signs of the diagonal make the draw uniform (Mezzadri 2007, arXiv:math-ph/0609050).
    return factor * np.sign(np.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]


def _draw_centred_orthogonal(key, size, count):
    if size == 1:
        return _identity(size, count)
    inner = _draw_orthogonal(key, size - 1, count)
    basis = fix_ones(size)
    whole = np.broadcast_to(np.eye(size), (*inner.shape[:-2], size, size)).copy()
    whole[..., 1:, 1:] = inner
    return basis.T @ whole @ basis


def _draw_general_linear(key, size, count):
    """Rotation times positive scales within a factor of four times rotation: invertible, far from orthogonal."""
    import jax

    left, right, scales = jax.random.split(key, 3)
    shape = (size,) if count is None else (count, size)
    stretch = 2.0 ** np.asarray(jax.random.uniform(scales, shape, minval=-1.0, maxval=1.0), np.float64)
    return (_draw_orthogonal(left, size, count) * stretch[..., None, :]) @ _draw_orthogonal(right, size, count)


def _act(matrix, leaf, axis, parent_axis, dual):
    matrix = np.asarray(matrix)
    if dual:
        matrix = np.swapaxes(np.linalg.inv(matrix), -1, -2)
    return _contract(matrix, leaf, axis, parent_axis)


def _act_orthogonal(matrix, leaf, axis, parent_axis, dual):
    del dual  # the inverse transpose of an orthogonal matrix is itself
    return _contract(matrix, leaf, axis, parent_axis)


def _contract(matrix, leaf, axis, parent_axis):
    """The moved leaf in float32 or wider; `element.apply` rounds once, after the last axis."""
    letters = "abcdefgh"[: leaf.ndim]
    inner = letters[axis] + "z"
    matrix_letters = inner if parent_axis is None else letters[parent_axis] + inner
    formula = f"{letters},{matrix_letters}->{letters.replace(letters[axis], 'z')}"
    wide = np.promote_types(leaf.dtype, np.float32)  # NumPy's own: under strict promotion JAX's refuses
    if isinstance(leaf, np.ndarray):
        return np.einsum(formula, leaf.astype(wide, copy=False), np.asarray(matrix).astype(wide), optimize=True)
    import jax
    import jax.numpy as jnp

    return jnp.einsum(formula, leaf.astype(wide), jnp.asarray(matrix).astype(wide), precision=jax.lax.Precision.HIGHEST)


def _compose(second, first, second_parent):
    return (first if second_parent is None else first[second_parent]) @ second


def _invert(matrix, parent):
    inverse = np.linalg.inv(matrix)
    return inverse if parent is None else inverse[np.argsort(parent)]


def _check_finite(matrix, size, count):
    shape = (size, size) if count is None else (count, size, size)
    if np.shape(matrix) != shape:
        return f"expected matrices of shape {list(shape)}, got {list(np.shape(matrix))}"
    matrix = np.asarray(matrix)
    if matrix.dtype.kind != "f" or not np.isfinite(matrix).all():
        return "expected finite floats"
    return None


def _check_invertible(matrix, size, count):
    complaint = _check_finite(matrix, size, count)
    if complaint:
        return complaint
    if (np.linalg.cond(np.asarray(matrix)) > 1e6).any():
        return "a matrix that cannot be inverted in float32 (condition above 1e6)"
    return None


def _check_orthogonal(matrix, size, count):
    complaint = _check_finite(matrix, size, count)  # a condition would cost more than the product below, and says less
    if complaint:
        return complaint
    matrix = np.asarray(matrix)
    error = np.abs(np.swapaxes(matrix, -1, -2) @ matrix - np.eye(size)).max()
    return f"not orthogonal: G^T G is {error:.1e} from I" if error > _tolerance(matrix) else None


def _check_centred_orthogonal(matrix, size, count):
    complaint = _check_orthogonal(matrix, size, count)
    if complaint:
        return complaint
    matrix = np.asarray(matrix)
    error = np.abs(matrix.sum(axis=-2) - 1).max()
    return f"moves the ones vector by {error:.1e}" if error > _tolerance(matrix) else None


# Element of all three: float[n, n], or float[parent, n, n].
ORTHOGONAL = Kind(_identity, _draw_orthogonal, _act_orthogonal, _compose, _invert, _check_orthogonal)
CENTRED_ORTHOGONAL = Kind(
    _identity, _draw_centred_orthogonal, _act_orthogonal, _compose, _invert, _check_centred_orthogonal
)
GENERAL_LINEAR = Kind(_identity, _draw_general_linear, _act, _compose, _invert, _check_invertible)
