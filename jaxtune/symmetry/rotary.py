"""What rotary positions leave free inside a head: one complex number a plane, or one sign where q and k are normalised.

Rotary embedding turns plane i of an axis of length n, its entries i and i + n/2, by an angle that grows with the
position, at a speed of the plane's own. Planes can therefore not be swapped or mixed, but every plane may be turned
and stretched, `q z` against `k / conj(z)`: `Re(q conj(k) exp(1j * angle))` stays at every distance. Where a norm with a
gain stands between projection and positions, only the sign of a whole plane passes through it.

The layout is the half-split one, planes (i, i + n/2); key tables bring the interleaved layout to it.
"""

import numpy as np

from jaxtune.errors import SpecError
from jaxtune.symmetry.groups import Kind

# Beyond this, one side of a plane is lost in float32.
MAX_MODULUS = 1e6


def planes_of(element: np.ndarray) -> np.ndarray:
    """The numbers themselves: float[..., 2, n/2] -> complex128[..., n/2]."""
    element = np.asarray(element, np.float64)
    return element[..., 0, :] + 1j * element[..., 1, :]


def join_planes(numbers: np.ndarray) -> np.ndarray:
    """The element of complex numbers: complex[..., n/2] -> float64[..., 2, n/2]."""
    numbers = np.asarray(numbers, np.complex128)
    return np.stack([numbers.real, numbers.imag], axis=-2)


def side_of(element: np.ndarray, *, dual: bool) -> np.ndarray:
    """What planes are multiplied by on the plain or on the dual side: float[..., 2, n/2] -> complex128[..., n/2]."""
    numbers = planes_of(element)
    return 1 / np.conj(numbers) if dual else numbers


def both_halves(signs: np.ndarray) -> np.ndarray:
    """Signs of planes as signs of entries: float[..., n/2] -> float64[..., n]."""
    signs = np.asarray(signs, np.float64)
    return np.concatenate([signs, signs], axis=-1)


def _num_planes(size):
    if size % 2:
        raise SpecError(f"an axis of {size} entries has no rotary planes; the length must be even.")
    return size // 2


def _shape(size, count, *inner):
    planes = _num_planes(size)
    return (*inner, planes) if count is None else (count, *inner, planes)


def _identity(size, count):
    return join_planes(np.ones(_shape(size, count)))


def _draw(key, size, count):
    """Any phase, and a modulus between a half and two."""
    import jax

    phase_key, modulus_key = jax.random.split(key)
    shape = _shape(size, count)
    phase = np.asarray(jax.random.uniform(phase_key, shape, np.float32, 0.0, 2 * np.pi), np.float64)
    modulus = 2.0 ** np.asarray(jax.random.uniform(modulus_key, shape, np.float32, -1.0, 1.0), np.float64)
    return join_planes(modulus * np.exp(1j * phase))


def _spread(values, leaf_shape, axis, parent_axis):
    """One value per plane or entry (and parent), laid along the axes of a leaf: length 1 elsewhere."""
    if parent_axis is not None and parent_axis > axis:
        values = values.T
    length = values.shape[-1 if parent_axis is None or parent_axis < axis else 0]
    shape = [1] * len(leaf_shape)
    shape[axis] = length
    if parent_axis is not None:
        shape[parent_axis] = leaf_shape[parent_axis]
    return values.reshape(shape)


def _act(element, leaf, axis, parent_axis, dual):
    """The moved leaf in float32 or wider; `element.apply` rounds once, after the last axis."""
    numbers = _spread(side_of(element, dual=dual), leaf.shape, axis, parent_axis)
    wide = np.promote_types(leaf.dtype, np.float32)  # NumPy's own: under strict promotion JAX's refuses
    if isinstance(leaf, np.ndarray):
        xp = np
    else:
        import jax.numpy as xp
    re, im = (xp.asarray(part.astype(wide)) for part in (numbers.real, numbers.imag))
    x, y = xp.split(leaf.astype(wide), 2, axis=axis)
    return xp.concatenate([x * re - y * im, x * im + y * re], axis=axis)


def _compose(second, first, second_parent):
    first = first if second_parent is None else np.asarray(first)[second_parent]
    return join_planes(planes_of(first) * planes_of(second))


def _invert(element, parent):
    inverse = join_planes(1 / planes_of(element))
    return inverse if parent is None else inverse[np.argsort(parent)]


def _check(element, size, count):
    shape = _shape(size, count, 2)
    if np.shape(element) != shape:
        return f"expected real over imaginary parts of planes, of shape {list(shape)}, got {list(np.shape(element))}"
    if np.asarray(element).dtype.kind != "f" or not np.isfinite(element).all():
        return "expected finite floats"
    modulus = np.abs(planes_of(element))
    if modulus.min(initial=1.0) < 1 / MAX_MODULUS or modulus.max(initial=1.0) > MAX_MODULUS:
        return f"a plane is stretched by {modulus.min():.1e} to {modulus.max():.1e}; float32 loses one of its sides"
    return None


def _identity_signs(size, count):
    return np.ones(_shape(size, count))


def _draw_signs(key, size, count):
    import jax

    return np.where(np.asarray(jax.random.bernoulli(key, shape=_shape(size, count))), 1.0, -1.0)


def _act_by_signs(element, leaf, axis, parent_axis, dual):
    del dual  # a sign is its own inverse
    factors = _spread(both_halves(element), leaf.shape, axis, parent_axis)
    if isinstance(leaf, np.ndarray):
        return leaf * factors.astype(leaf.dtype)
    import jax.numpy as jnp

    return leaf * jnp.asarray(factors.astype(leaf.dtype))


def _compose_signs(second, first, second_parent):
    return second * (first if second_parent is None else np.asarray(first)[second_parent])


def _invert_signs(element, parent):
    return np.array(element) if parent is None else np.asarray(element)[np.argsort(parent)]


def _check_signs(element, size, count):
    shape = _shape(size, count)
    if np.shape(element) != shape:
        return f"expected one sign a plane, of shape {list(shape)}, got {list(np.shape(element))}"
    if np.asarray(element).dtype.kind != "f" or (np.abs(element) != 1).any():
        return "expected signs, 1.0 or -1.0"
    return None


# Element: float64[2, n/2], or float64[parent, 2, n/2]: real and imaginary part of one number a plane, never zero.
ROTARY = Kind(_identity, _draw, _act, _compose, _invert, _check)
# Element: float64[n/2], or float64[parent, n/2]: the sign of both entries of a plane.
ROTARY_SIGNS = Kind(_identity_signs, _draw_signs, _act_by_signs, _compose_signs, _invert_signs, _check_signs)
