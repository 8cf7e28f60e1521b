"""The kinds of symmetry: how an element of each is made, acts on one axis, composes and inverts.

A kind is one row of `KINDS`. Everything else in the package goes through that table, so a new kind
(signed permutation, orthogonal, general linear) is one more row and no special case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.errors import SpecError


@dataclass(frozen=True)
class Group:
    """One freedom of the network: the order (later: the basis) of one set of units.

    Attributes:
        name: Path-like and unique, for instance "block_0/attn/head".
        size: Number of units that one element rearranges.
        kind: Row of `KINDS`.
        parent: Name of the group whose every unit has an element of its own, as the units inside a
            head have one per head; None for a group that stands alone.
        role: What the units are, for reports and for alignment: "stream", "head", "qk", "vo",
            "inside" (one order for qk and vo), "hidden" or "channel".
    """

    name: str
    size: int
    kind: str = "permutation"
    parent: str | None = None
    role: str = "hidden"


@dataclass(frozen=True)
class Kind:
    """The arithmetic of one kind of group. `count` is the number of units of the parent, or None.

    Attributes:
        identity: (size, count) -> element.
        draw: (key, size, count) -> element, uniform over the kind.
        act: (element, leaf, axis, parent_axis, dual) -> leaf. A parent, if any, acted before.
        compose: (second, first, second_parent) -> the element that acts as `first`, then `second`.
        invert: (element, parent) -> element.
        check: (element, size, count) -> None or the complaint.
    """

    identity: Callable[..., Any]
    draw: Callable[..., Any]
    act: Callable[..., Any]
    compose: Callable[..., Any]
    invert: Callable[..., Any]
    check: Callable[..., str | None]


def _identity_permutation(size, count):
    order = np.arange(size, dtype=np.int32)
    return order if count is None else np.tile(order, (count, 1))


def _draw_permutation(key, size, count):
    import jax

    draw = lambda key: jax.random.permutation(key, size)  # noqa: E731
    order = draw(key) if count is None else jax.vmap(draw)(jax.random.split(key, count))
    return np.asarray(order, np.int32)


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


KINDS: dict[str, Kind] = {
    # Element: int32[n], or int32[parent, n]. Entry i is the source unit that lands at position i.
    "permutation": Kind(
        identity=_identity_permutation,
        draw=_draw_permutation,
        act=_act_by_permutation,
        compose=_compose_permutations,
        invert=_invert_permutation,
        check=_check_permutation,
    ),
}


def kind_of(group: Group) -> Kind:
    """The row of `KINDS` for `group`; `SpecError` where there is none."""
    if group.kind not in KINDS:
        raise SpecError(f"group {group.name}: unknown kind {group.kind!r}; known: {', '.join(KINDS)}.")
    return KINDS[group.kind]
