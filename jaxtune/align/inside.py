"""Every kind of group inside a head: the best value given who is matched with whom, and what a value is worth.

All work on what is summed over the matched queries of matched heads. Of units whose basis changes these are tables
[heads, target units, source units], of rotary planes complex numbers [heads, n/2] (see `products.query_pairs`), both
once over the plain and once over the dual leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.align.assignment import score_of, solve_assignments
from jaxtune.align.bases import Sides, inside_objective, make_sides, solve_inside
from jaxtune.align.planes import planes_objective, solve_plane_signs, solve_planes
from jaxtune.symmetry.rotary import join_planes, planes_of, side_of

Cross = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Inside:
    """The arithmetic of one kind.

    Attributes:
        sides: (plain, dual) own products of one network's units -> what `solve` wants to know of that network; None
            where nothing is wanted.
        reorder: (sides, order of heads) -> sides.
        solve: (cross, source sides, target sides, current value) -> (value, its objective float64[heads]), never
            below the current one's.
        objective: (value, cross, source sides) -> float64[heads].
        side: (value, is_dual) -> what one side of the source is multiplied by: float64[heads, source units, target
            units], or complex128[heads, n/2].
    """

    sides: Callable[..., Any] | None
    reorder: Callable[..., Any]
    solve: Callable[..., tuple[np.ndarray, np.ndarray]]
    objective: Callable[..., np.ndarray]
    side: Callable[..., np.ndarray]


def _t(matrix):
    return np.swapaxes(matrix, -1, -2)


def _solve_maps(cross, source, target, current):
    return solve_inside(tuple(map(_t, cross)), source, target, np.asarray(current, np.float64))


def _maps_objective(maps, cross, source):
    return inside_objective(maps, tuple(map(_t, cross)), source.grams)


def _maps_side(maps, is_dual):
    return _t(np.linalg.inv(maps)) if is_dual else np.asarray(maps, np.float64)


def _solve_numbers(cross, source, target, current):
    numbers, scores = solve_planes(cross, source, target, planes_of(current))
    return join_planes(numbers), scores


def _numbers_objective(value, cross, source):
    return planes_objective(planes_of(value), cross, source)


def _solve_signs(cross, source, target, current):
    del source, target
    return solve_plane_signs(cross, current)


def _signs_objective(value, cross, source):
    del source
    return np.sum(value * (cross[0] + cross[1]).real, axis=-1)


def _solve_orders(cross, source, target, current):
    del source, target
    scores = cross[0] + cross[1]
    orders = solve_assignments(scores)
    is_better = score_of(scores, orders) > score_of(scores, np.asarray(current))
    orders = np.where(is_better[:, None], orders, current).astype(np.int32)
    return orders, score_of(scores, orders)


def _orders_objective(value, cross, source):
    del source
    return score_of(cross[0] + cross[1], np.asarray(value))


def _orders_side(orders, is_dual):
    del is_dual
    return _t(np.eye(orders.shape[-1])[orders])


def _reorder_pair(pair, order):
    return tuple(side[order] for side in pair)


def _no_sides(sides, order):
    del order
    return sides


INSIDE: dict[str, Inside] = {
    "general_linear": Inside(make_sides, Sides.reorder, _solve_maps, _maps_objective, _maps_side),
    "rotary": Inside(
        lambda plain, dual: (plain, dual),
        _reorder_pair,
        _solve_numbers,
        _numbers_objective,
        lambda value, is_dual: side_of(value, dual=is_dual),
    ),
    "rotary_signs": Inside(
        None, _no_sides, _solve_signs, _signs_objective, lambda value, is_dual: np.asarray(value, np.complex128)
    ),
    "permutation": Inside(None, _no_sides, _solve_orders, _orders_objective, _orders_side),
}
