"""Frank-Wolfe steps on the product of the groups of many models: orders and rotations relaxed, and hard at the end."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.assignment import solve_assignments
from jaxtune.align.bases import centred_polar_factor, polar_factor
from jaxtune.align.relaxed import ORDER_KINDS, contract
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import flatten
from jaxtune.types import Params

ROTATIONS = ("orthogonal", "centred_orthogonal")
# Steps in a row that gain less than `tolerance` of the objective before the search ends.
NUM_IDLE = 5


def joint_objective(spec: Spec, moved: Sequence[Params]) -> float:
    """Sum over pairs of models, and over matched leaves, of their inner products."""
    total = 0.0
    trees = [flatten(model) for model in moved]
    for path in spec.axes:
        if path not in spec.unmatched:
            leaves = np.stack([np.asarray(tree[path], np.float64).ravel() for tree in trees])
            total += (np.sum(leaves.sum(axis=0) ** 2) - np.sum(leaves**2)) / 2
    return float(total)


def climb_relaxed(
    spec: Spec, moved: Sequence[Params], max_steps: int, tolerance: float
) -> tuple[list[dict[str, Any]], list[float], bool]:
    """Frank-Wolfe steps of all models at once, from where they stand; the factors reached are made hard at the end.

    Args:
        spec: Symmetry of all.
        moved: Models.
        max_steps: At most so many.
        tolerance: A step that gains less than this share of the objective is idle; `NUM_IDLE` in a row end the search.

    Returns:
        (a correction of every model, objective of the relaxed factors after every step, whether it came to rest).
    """
    groups = _free_groups(spec)
    layout, degree = _layout_of(spec, groups)
    leaves = {
        path: jnp.stack([jnp.asarray(np.asarray(flatten(model)[path], np.float32)) for model in moved])
        for path, _ in layout
    }
    fixed = joint_objective(spec, moved) - float(_objective({}, leaves, tuple((path, ()) for path, _ in layout)))
    factors = {
        name: jnp.tile(jnp.eye(spec.groups[name].size), (len(moved), *[c or 1 for c in (spec.count_of(name),)], 1, 1))
        for name in groups
    }
    factors = {name: x if spec.count_of(name) else x[:, 0] for name, x in factors.items()}
    steps = (1 - np.cos(np.pi * np.arange(degree + 1) / max(degree, 1))) / 2  # from 0 to 1, dense at the ends
    relaxed, num_idle = [float(_objective(factors, leaves, layout))], 0
    while groups and len(relaxed) <= max_steps and num_idle < NUM_IDLE:
        gradient = _gradient(factors, leaves, layout)
        ahead = {name: best_corner(spec.groups[name].kind, gradient[name]) for name in groups}
        values = np.asarray(_along(factors, ahead, leaves, jnp.asarray(steps, jnp.float32), layout), np.float64)
        step, value = best_step(steps, values)
        if value - relaxed[-1] <= tolerance * abs(relaxed[-1]):
            num_idle += 1
        else:
            num_idle = 0
        if step == 0 or value <= relaxed[-1]:
            break  # the best corner is where the factors stand: the next step would be the same
        share = np.float32(step)
        factors = {name: (1 - share) * factors[name] + share * ahead[name] for name in groups}
        relaxed.append(value)
    is_converged = not groups or len(relaxed) <= max_steps
    corners = {name: best_corner(spec.groups[name].kind, factors[name]) for name in groups}
    corrections = [
        {**elements.identity(spec), **{name: value_of(spec.groups[name].kind, corners[name][m]) for name in groups}}
        for m in range(len(moved))
    ]
    return corrections, [value + fixed for value in relaxed], is_converged


def best_step(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Where on [0, 1] the polynomial through the given points is highest, and how high.

    Shapes:
        steps, values: float64[degree + 1]; steps differ and hold 0 and 1.
    """
    polynomial = np.polynomial.Polynomial.fit(steps, values, len(steps) - 1)
    turns = polynomial.deriv().roots() if len(steps) > 2 else np.zeros(0)
    turns = turns[np.abs(turns.imag) < 1e-9].real
    candidates = np.concatenate([[0.0, 1.0], turns[(turns > 0) & (turns < 1)]])
    heights = polynomial(candidates)
    best = int(np.argmax(heights))
    return float(candidates[best]), float(heights[best])


def _free_groups(spec):
    """Groups that the steps move: orders and rotations, but for heads whose units have bases of their own."""
    parents = {group.parent for group in spec.groups.values() if group.kind not in ORDER_KINDS and group.parent}
    return [
        name
        for name, group in spec.groups.items()
        if (group.kind in ORDER_KINDS or group.kind in ROTATIONS) and name not in parents
    ]


def _layout_of(spec, groups):
    """((path, ((axis, group, axis of the parent), ...)), ...) of matched leaves, and the degree in one step."""
    layout, degree = [], 0
    for path, axes in spec.axes.items():
        owners = [axis.group if axis else None for axis in axes]
        moves = [
            (position, owner, owners.index(spec.groups[owner].parent) if spec.groups[owner].parent else None)
            for position, owner in enumerate(owners)
            if owner in groups
        ]
        if path not in spec.unmatched and moves:
            layout.append((path, tuple(sorted(moves, key=lambda move: move[2] is not None))))
            degree = max(degree, 2 * len(moves))
    return tuple(layout), degree


def best_corner(kind: str, scores: np.ndarray) -> np.ndarray:
    """The element whose inner product with `scores` is highest, as a matrix [source unit, target unit].

    Shapes:
        scores: float[..., n, n]; result: float32[..., n, n].
    """
    scores = np.asarray(scores, np.float64)
    if kind in ROTATIONS:
        solve = polar_factor if kind == "orthogonal" else centred_polar_factor
        flat = scores.reshape(-1, *scores.shape[-2:])
        return np.stack([solve(one) for one in flat]).reshape(scores.shape).astype(np.float32)
    orders = solve_assignments(np.swapaxes(scores, -1, -2))
    return np.swapaxes(np.eye(scores.shape[-1], dtype=np.float32)[orders], -1, -2)


def value_of(kind: str, matrix: np.ndarray) -> np.ndarray:
    """The value of a group whose matrix is `matrix`, a corner."""
    if kind in ROTATIONS:
        return np.asarray(matrix, np.float64)
    order = np.argmax(matrix, axis=-2).astype(np.int32)
    return order if kind == "permutation" else np.stack([order.astype(np.float64), np.ones(order.shape)], axis=-2)


def _objective_of(factors, leaves, layout):
    total = jnp.zeros(())
    for path, moves in layout:
        leaf = leaves[path]
        for position, name, parent in moves:
            leaf = jax.vmap(functools.partial(contract, axis=position, parent_axis=parent))(factors[name], leaf)
        total += (jnp.sum(jnp.sum(leaf, axis=0) ** 2) - jnp.sum(leaf**2)) / 2
    return total


_objective = jax.jit(_objective_of, static_argnums=2)
_gradient = jax.jit(jax.grad(_objective_of), static_argnums=2)


@functools.partial(jax.jit, static_argnums=4)
def _along(factors, ahead, leaves, steps, layout):
    def value(step):
        between = jax.tree.map(lambda x, y: (1 - step) * x + step * y, factors, ahead)
        return _objective_of(between, leaves, layout)

    return jax.lax.map(value, steps)
