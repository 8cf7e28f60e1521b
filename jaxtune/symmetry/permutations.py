"""Orders of units: how one is drawn, acts on an axis, composes and inverts.

Elements of units inside a head carry the head's slot as their first axis.
"""

import numpy as np

from jaxtune.symmetry.groups import Kind


def _identity_permutation(size, count):
    order = np.arange(size, dtype=np.int32)
    return order if count is None else np.tile(order, (count, 1))


def _draw_permutation(key, size, count):
    import jax

    if count is None:
        return np.asarray(jax.random.permutation(key, size), np.int32)
    orders = jax.vmap(jax.random.permutation, in_axes=(0, None))(jax.random.split(key, count), size)
    return np.asarray(orders, np.int32)


def _act_by_permutation(order, leaf, axis, parent_axis, dual):
    del dual  # the inverse transpose of a permutation is itself
    if parent_axis is None:
        return leaf.take(order, axis=axis)
    # [parent, unit] laid along the leaf's two axes, length 1 elsewhere.
    index = order if parent_axis < axis else order.T
    index = index.reshape([leaf.shape[a] if a in (axis, parent_axis) else 1 for a in range(leaf.ndim)])
    if isinstance(leaf, np.ndarray):
        return np.take_along_axis(leaf, index, axis=axis)
    import jax.numpy as jnp

    return jnp.take_along_axis(leaf, jnp.asarray(index), axis=axis)


def _compose_permutations(second, first, second_parent):
    if second_parent is None:
        return first[second]
    # Slot i holds what `first` left in slot second_parent[i], in that slot's order.
    return np.take_along_axis(first[second_parent], second, axis=1)


def _invert_permutation(order, parent):
    if parent is None:
        return np.argsort(order).astype(np.int32)
    return np.argsort(order, axis=1).astype(np.int32)[np.argsort(parent)]


def _check_permutation(order, size, count):
    shape = (size,) if count is None else (count, size)
    if np.shape(order) != shape:
        return f"expected indices of shape {list(shape)}, got {list(np.shape(order))}"
    if not np.issubdtype(np.asarray(order).dtype, np.integer):
        return f"expected integer indices, got {np.asarray(order).dtype}"
    if not np.array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(size), shape)):
        return f"not a permutation of 0..{size - 1}"
    return None


# Element: int32[n], or int32[parent, n]. Entry i is the source unit that lands at position i.
PERMUTATION = Kind(
    identity=_identity_permutation,
    draw=_draw_permutation,
    act=_act_by_permutation,
    compose=_compose_permutations,
    invert=_invert_permutation,
    check=_check_permutation,
    order=np.asarray,
)
