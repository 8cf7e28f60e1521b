"""Elements of a network's symmetry group: apply, compose, invert, draw at random.

An element is a plain dict, group name -> value: one array each, for a permutation int32[n] (for units inside heads
int32[heads, n]), for the others see their kinds. Read these names with their module: `element.apply(spec, g, params)`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.errors import SpecError
from jaxtune.rng import named_key
from jaxtune.symmetry.kinds import kind_of
from jaxtune.symmetry.permutations import PERMUTATION
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import map_leaves
from jaxtune.types import Leaf, Params

Element = Mapping[str, Any]


def identity(spec: Spec) -> dict[str, Any]:
    """The element that changes nothing."""
    return {name: kind_of(group).identity(group.size, spec.count_of(name)) for name, group in spec.groups.items()}


def random(key: jax.Array, spec: Spec) -> dict[str, Any]:
    """An element drawn at random (see the kinds); each group's draw depends on `key` and the group's name alone."""
    return {
        name: kind_of(group).draw(named_key(key, name), group.size, spec.count_of(name))
        for name, group in spec.groups.items()
    }


def apply(spec: Spec, element: Element, params: Params) -> dict[str, Any]:
    """Moves every axis of every leaf by the element of the group that owns it.

    Linear in `params`, so a task vector moves like the weights it was taken from. Permutations are
    index gathers and therefore exact in every dtype.

    Args:
        spec: Symmetry of the architecture.
        element: One value per group.
        params: Weights or a task vector; numpy or JAX leaves (then traceable). Changes of basis are
            computed in float32 or wider and rounded once.

    Raises:
        SpecError: the tree does not fit the spec, or the element does not.
    """
    spec.check(params)
    check(spec, element)
    return map_leaves(lambda path, leaf: apply_to_leaf(spec, element, path, leaf), params)


def apply_to_leaf(spec: Spec, element: Element, path: str, leaf: Leaf, *, skip_axes: tuple[int, ...] = ()) -> Leaf:
    """`apply` for the one leaf at `path`, holding the axes `skip_axes` still."""
    axes, dtype = spec.axes[path], leaf.dtype

    def is_inside(position):
        return axes[position] is not None and spec.groups[axes[position].group].parent is not None

    # Parents first: a unit inside a head is indexed by the slot that its head lands in.
    for position in sorted(range(len(axes)), key=is_inside):
        axis = axes[position]
        if axis is None or position in skip_axes:
            continue
        group = spec.groups[axis.group]
        parent_axis = None
        if group.parent is not None:
            parent_axis = next(p for p, other in enumerate(axes) if other and other.group == group.parent)
        kind, value = kind_of(group), element[axis.group]
        if axis.order_only:
            kind, value = PERMUTATION, kind.order(value)
        leaf = kind.act(value, leaf, position, parent_axis, axis.dual)
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def compose(spec: Spec, second: Element, first: Element) -> dict[str, Any]:
    """The element that acts as `first` and then `second`."""
    return {
        name: kind_of(group).compose(second[name], first[name], second[group.parent] if group.parent else None)
        for name, group in spec.groups.items()
    }


def invert(spec: Spec, element: Element) -> dict[str, Any]:
    """The element that undoes `element`."""
    return {
        name: kind_of(group).invert(element[name], element[group.parent] if group.parent else None)
        for name, group in spec.groups.items()
    }


def check(spec: Spec, element: Element) -> None:
    """Checks that `element` has one legal value per group.

    Raises:
        SpecError: names the groups that are missing, unknown or illegal.
    """
    lines = [f"  {name}: missing" for name in spec.groups if name not in element]
    lines += [f"  {name}: no such group" for name in element if name not in spec.groups]
    for name, group in spec.groups.items():
        if name in element:
            complaint = kind_of(group).check(np.asarray(element[name]), group.size, spec.count_of(name))
            if complaint:
                lines.append(f"  {name}: {complaint}")
    if lines:
        raise SpecError("the element does not fit its spec:\n" + "\n".join(lines))
