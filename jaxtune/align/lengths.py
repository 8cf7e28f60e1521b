"""How long the units of one network are, and the scales that make both sides of each unit equally long."""

from collections.abc import Mapping

import numpy as np

from jaxtune.symmetry.element import Element, apply_to_leaf
from jaxtune.symmetry.spec import Spec
from jaxtune.types import Leaf

# Balancing one layer tips its neighbours; a chain of three settles to 1e-9 within a few dozen rounds.
MAX_ROUNDS = 1000


def unit_squares(spec: Spec, element: Element, path: str, axis: int, source: Leaf) -> np.ndarray:
    """Squared norms of the source's units along one axis of one leaf, its other axes moved: float64[n]."""
    moved = apply_to_leaf(spec, element, path, np.asarray(source, np.float64), skip_axes=(axis,))
    rows = np.moveaxis(moved, axis, 0).reshape(moved.shape[axis], -1)
    return np.einsum("ix,ix->i", rows, rows)


def balance_units(spec: Spec, tree: Mapping[str, Leaf], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The scales after which every unit's incoming and outgoing weights are equally long.

    Alone, a unit is balanced by `s = sqrt(out / in)`, where `s^2 in^2 + out^2 / s^2` is least; this goes round the
    groups until nothing moves. The sum over all units is convex in the logarithms, so the result does not depend on
    the scales the network came in, and two networks that differ by scales alone balance into one. A unit with a
    dead side stays.

    Args:
        spec: Symmetry of the network.
        tree: Path -> leaf.
        weights: Path -> factor of that leaf; leaves without one do not count.

    Shapes:
        result[group]: float64[n], of every group of kind "scaled_permutation".
    """
    tables = [_table(spec, path, tree[path], weight) for path, weight in weights.items() if _scaled_axes(spec, path)]
    groups = [name for name, group in spec.groups.items() if group.kind == "scaled_permutation"]
    squares = {name: np.ones(spec.groups[name].size) for name in groups}  # of the scales
    for _ in range(MAX_ROUNDS):
        largest_step = 0.0
        for name in groups:
            into = sum(_side(table, name, False, squares) for table in tables)
            out = sum(_side(table, name, True, squares) for table in tables)
            is_alive = (into > 0) & (out > 0)
            new = np.sqrt(np.divide(out, into, out=squares[name] ** 2, where=is_alive))
            largest_step = max(largest_step, np.abs(np.log(new / squares[name])).max())
            squares[name] = new
        if largest_step < 1e-9:
            break
    return {name: np.sqrt(square) for name, square in squares.items()}


def _scaled_axes(spec, path):
    """Positions of the axes that a scale multiplies or divides."""
    return [
        position
        for position, axis in enumerate(spec.axes[path])
        if axis and not axis.order_only and spec.groups[axis.group].kind == "scaled_permutation"
    ]


def _table(spec, path, leaf, weight):
    """(owners of the scaled axes, the leaf's squares summed over all others)."""
    kept = _scaled_axes(spec, path)
    rest = tuple(position for position in range(len(spec.axes[path])) if position not in kept)
    owners = [spec.axes[path][position] for position in kept]
    return owners, weight * np.square(np.asarray(leaf, np.float64)).sum(axis=rest)


def _side(table, name, dual, squares):
    """Squared lengths of the units of group `name` over one table, on its plain or its dual side."""
    owners, values = table
    mine = [n for n, axis in enumerate(owners) if axis.group == name and axis.dual == dual]
    if not mine:
        return 0.0
    for n, axis in enumerate(owners):
        if n not in mine:
            factors = 1 / squares[axis.group] if axis.dual else squares[axis.group]
            values = values * factors.reshape([-1 if m == n else 1 for m in range(values.ndim)])
    return values.sum(axis=tuple(m for m in range(values.ndim) if m not in mine))
