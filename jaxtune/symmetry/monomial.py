"""Orders of units with a factor each: a sign behind an odd activation, a positive scale behind ReLU.

An element is float64[2, n], or float64[parent, 2, n]: row 0 is an order, as a permutation has it, row 1 what the unit
at that position is multiplied by; one array, so it is stored like any other. The dual side divides. On an axis marked
"~" the order acts alone: a kernel that a batch norm reads and running statistics know no scale.
"""

import numpy as np

from jaxtune.symmetry.groups import Kind
from jaxtune.symmetry.permutations import PERMUTATION


def order_of(element: np.ndarray) -> np.ndarray:
    """Row 0 as indices: float[..., 2, n] -> int32[..., n]."""
    return np.asarray(element)[..., 0, :].astype(np.int32)


def factors_of(element: np.ndarray, *, dual: bool) -> np.ndarray:
    """What units are multiplied by on the plain or on the dual side: float[..., 2, n] -> float64[..., n]."""
    factors = np.asarray(element, np.float64)[..., 1, :]
    return 1.0 / factors if dual else factors


def _identity(size, count):
    order = PERMUTATION.identity(size, count)
    return _join(order, np.ones(order.shape))


def _draw_signed(key, size, count):
    import jax

    order_key, sign_key = jax.random.split(key)
    order = PERMUTATION.draw(order_key, size, count)
    return _join(order, np.where(np.asarray(jax.random.bernoulli(sign_key, shape=order.shape)), 1.0, -1.0))


def _draw_scaled(key, size, count):
    """Scales between a quarter and four."""
    import jax

    order_key, scale_key = jax.random.split(key)
    order = PERMUTATION.draw(order_key, size, count)
    return _join(order, 2.0 ** np.asarray(jax.random.uniform(scale_key, order.shape, np.float32, -2.0, 2.0)))


def _act(element, leaf, axis, parent_axis, dual):
    """The moved leaf in float32 or wider; `element.apply` rounds once, after the last axis."""
    leaf = PERMUTATION.act(order_of(element), leaf, axis, parent_axis, dual)
    factors = factors_of(element, dual=dual)
    if parent_axis is not None and parent_axis > axis:
        factors = factors.T
    factors = factors.reshape([leaf.shape[a] if a in (axis, parent_axis) else 1 for a in range(leaf.ndim)])
    wide = np.promote_types(leaf.dtype, np.float32)  # NumPy's own: under strict promotion JAX's refuses
    if isinstance(leaf, np.ndarray):
        moved = leaf.astype(wide, copy=False)  # a gather is a copy already, and nobody else's
        return np.multiply(moved, factors.astype(wide), out=moved)
    import jax.numpy as jnp

    return leaf.astype(wide) * jnp.asarray(factors.astype(wide))


def _compose(second, first, second_parent):
    if second_parent is not None:
        first = first[second_parent]
    order = order_of(second)
    rows = np.take_along_axis(first, order[..., None, :], axis=-1)
    return _join(rows[..., 0, :], rows[..., 1, :] * second[..., 1, :])


def _invert(element, parent):
    back = np.argsort(element[..., 0, :], axis=-1)
    inverse = _join(back, 1.0 / np.take_along_axis(element[..., 1, :], back, axis=-1))
    return inverse if parent is None else inverse[np.argsort(parent)]


def _join(order, factors):
    return np.stack([np.asarray(order, np.float64), np.asarray(factors, np.float64)], axis=-2)


def _check(element, size, count):
    shape = (2, size) if count is None else (count, 2, size)
    if np.shape(element) != shape:
        return f"expected an order over its factors, of shape {list(shape)}, got {list(np.shape(element))}"
    if element.dtype.kind != "f" or not np.isfinite(element).all():
        return "expected finite floats"
    if (element[..., 0, :] % 1).any():
        return "expected whole numbers in row 0, the order"
    return PERMUTATION.check(order_of(element), size, count)


def _check_signed(element, size, count):
    complaint = _check(element, size, count)
    if complaint is None and (np.abs(element[..., 1, :]) != 1).any():
        return "expected signs, 1 or -1, in row 1"
    return complaint


def _check_scaled(element, size, count):
    complaint = _check(element, size, count)
    if complaint is None and (element[..., 1, :] <= 0).any():
        return "expected positive scales in row 1; ReLU keeps no other"
    return complaint


SIGNED_PERMUTATION = Kind(_identity, _draw_signed, _act, _compose, _invert, _check_signed, order_of)
SCALED_PERMUTATION = Kind(_identity, _draw_scaled, _act, _compose, _invert, _check_scaled, order_of)
