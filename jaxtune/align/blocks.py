"""The best move of one block of groups, everything else held still.

A block is a group without a parent together with the groups inside it: an order or a rotation of units, or
the order of the heads with the order (or the basis) of the units inside each. Every solver returns the
gain in the objective, `sum over leaves of weight * (<target, g(source)> - |g(source)|^2 / 2)`, whose second
term matters for maps inside heads alone: nothing else changes a norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignments
from jaxtune.align.bases import Sides, centred_polar_factor, inside_objective, make_sides, polar_factor, solve_inside
from jaxtune.align.heads import circuit_scores, exact_scores, head_leaves, inside_scores, spectral_scores
from jaxtune.align.products import leaf_product, slot_scores, unit_scores
from jaxtune.errors import SpecError
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec

Values = dict[str, Any]
Weights = Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """Two networks and their symmetry, ready for matching.

    Attributes:
        spec: Symmetry of both.
        target, source: Flat trees on the device.
        weights: Factor of each matched leaf that is not zero.
        mass: `weight * |target| * |source|` of each matched leaf: the most it can contribute.
        squares: `|source|^2` of each matched leaf.
        blocks: Block -> its leaves.
        owners: Leaf -> blocks that move it.
        head_cost: How the order of heads is proposed: "exact", "circuit" or "spectral".
    """

    spec: Spec
    target: Mapping[str, Any]
    source: Mapping[str, Any]
    weights: Weights
    mass: Mapping[str, float]
    squares: Mapping[str, float]
    blocks: Mapping[str, tuple[str, ...]]
    owners: Mapping[str, frozenset[str]]
    head_cost: str
    _spectral: dict[str, np.ndarray] = field(default_factory=dict)
    _sides: dict[str, tuple[Sides, Sides]] = field(default_factory=dict)

    def objective(self, element) -> float:
        """`sum of weight * (<target, g(source)> - (|g(source)|^2 - |source|^2) / 2)`; no unit."""
        total = 0.0
        for path, weight in self.weights.items():
            product, square = leaf_product(self.spec, element, path, self.target[path], self.source[path])
            total += weight * (product - 0.5 * (square - self.squares[path]))
        return total

    def spectral_order(self, head: str) -> np.ndarray:
        """Order of the heads by their spectra; taken once, since no order changes a spectrum."""
        if head not in self._spectral:
            self._spectral[head] = solve_assignment(spectral_scores(self.spec, head, self.target, self.source))
        return self._spectral[head]

    def sides(self, head: str, child: str, weights: Weights) -> tuple[Sides, Sides]:
        """Source's and target's own sides of the circuits of `child`; taken once for the full set of leaves."""
        if weights is self.weights and child in self._sides:
            return self._sides[child]
        still = elements.identity(self.spec)
        pair = tuple(
            make_sides(*_slot_tables(self.spec, head, child, still, tree, tree, weights))
            for tree in (self.source, self.target)
        )
        if weights is self.weights:
            self._sides[child] = pair
        return pair


def make_problem(
    spec: Spec, target: Mapping[str, Any], source: Mapping[str, Any], *, head_cost: str, weighting: str
) -> Problem:
    """Puts two flat trees on the device and works out who depends on whom.

    Args:
        weighting: "plain": every leaf counts as it is. "unit": every leaf counts by its cosine, so that no
            large leaf drowns the others.
    """
    matched = [path for path in spec.axes if path not in spec.unmatched]
    norms = {path: _norm(target[path]) * _norm(source[path]) for path in matched}
    # A leaf of zeros (a fresh bias) says nothing, whatever it is divided by.
    weights = {path: 1.0 if weighting == "plain" else 1.0 / norms[path] for path in matched if norms[path] > 0}
    identity = elements.identity(spec)
    source_on_device = {path: jnp.asarray(leaf) for path, leaf in source.items()}
    return Problem(
        spec=spec,
        target={path: jnp.asarray(leaf) for path, leaf in target.items()},
        source=source_on_device,
        weights=weights,
        mass={path: weights[path] * norms[path] for path in weights},
        squares={
            path: leaf_product(spec, identity, path, source_on_device[path], source_on_device[path])[1]
            for path in weights
        },
        blocks={
            name: tuple(dict.fromkeys(path for path, _ in spec.leaves_of(name)))  # children share them
            for name, group in spec.groups.items()
            if group.parent is None
        },
        owners={
            path: frozenset(spec.groups[axis.group].parent or axis.group for axis in axes if axis)
            for path, axes in spec.axes.items()
        },
        head_cost=head_cost,
    )


def solve_block(
    problem: Problem, name: str, element: elements.Element, weights: Weights, *, is_start: bool = False
) -> tuple[float, Values]:
    """(gain, new values) of the best move of block `name`.

    Args:
        problem: The two networks.
        name: A block.
        element: Where everything stands.
        weights: Leaves that count, with their factors; a subset of the problem's at the start.
        is_start: Whether the block has no value worth keeping yet.

    Raises:
        SpecError: a head mixes orders and bases inside, or has no two sides.
    """
    spec = problem.spec
    children = spec.children_of(name)
    kinds = {spec.groups[child].kind for child in children}
    if not children:
        return _solve_units(problem, name, element, weights)
    if kinds == {"permutation"}:
        return _solve_ordered_heads(problem, name, element, weights, is_start=is_start)
    if kinds == {"general_linear"}:
        return _solve_linear_heads(problem, name, element, weights, is_start=is_start)
    raise SpecError(f"group {name}: the groups inside it must all be permutation or all general_linear, not {kinds}.")


def _solve_units(problem, name, element, weights):
    spec = problem.spec
    group = spec.groups[name]
    scores = _unit_sum(problem, name, element, weights)
    if group.kind == "permutation":
        order = solve_assignment(scores)
        return float(score_of(scores, order) - score_of(scores, element[name])), {name: order}
    if group.kind in ("orthogonal", "centred_orthogonal"):
        solve = polar_factor if group.kind == "orthogonal" else centred_polar_factor
        rotation = solve(scores.T)
        return float(np.vdot(scores.T, rotation) - np.vdot(scores.T, element[name])), {name: rotation}
    raise SpecError(f"group {name}: no matching for kind {group.kind!r}.")


def _solve_ordered_heads(problem, name, element, weights, *, is_start):
    inside = inside_scores(problem.spec, name, element, problem.target, problem.source, weights)
    alone = _unit_sum(problem, name, element, _without_units(problem.spec, name, weights))
    slots = np.arange(len(alone))

    def move_to(order):
        values, score = {name: order}, score_of(alone, order)
        for child, scores in inside.items():
            values[child] = solve_assignments(scores[slots, order])
            score += score_of(scores[slots, order], values[child]).sum()
        return score, values

    old = score_of(alone, element[name]) + sum(
        score_of(scores[slots, element[name]], element[child]).sum() for child, scores in inside.items()
    )
    if problem.head_cost == "exact":
        order = solve_assignment(exact_scores(inside) + alone)
    elif problem.head_cost == "circuit":
        order = solve_assignment(circuit_scores(problem.spec, name, element, problem.target, problem.source))
    else:
        order = problem.spectral_order(name)
    moves = [move_to(order)] + ([] if is_start else [move_to(element[name])])
    score, values = max(moves, key=lambda move: move[0])
    return float(score - old), values


def _solve_linear_heads(problem, name, element, weights, *, is_start):
    """Heads by their circuits, which no basis inside a head changes; then the basis inside each."""
    spec = problem.spec
    alone = _unit_sum(problem, name, element, _without_units(spec, name, weights))
    if problem.head_cost == "spectral":
        order = problem.spectral_order(name)
    else:
        order = solve_assignment(circuit_scores(spec, name, element, problem.target, problem.source) + alone)

    sides = {child: problem.sides(name, child, weights) for child in spec.children_of(name)}

    def move_to(order, *, keep):
        values, score = {name: order}, score_of(alone, order)
        standing = {**element, name: order}
        for child in spec.children_of(name):
            cross, (source, target) = _cross(problem, name, child, standing, weights), sides[child]
            source = source.reorder(order)
            current = element[child] if keep else np.broadcast_to(np.eye(cross[0].shape[-1]), cross[0].shape)
            values[child], scores = solve_inside(cross, source, target, current)
            score += scores.sum()
        return score, values

    old = score_of(alone, element[name])
    for child in spec.children_of(name):
        grams = sides[child][0].reorder(element[name]).grams
        old += inside_objective(element[child], _cross(problem, name, child, element, weights), grams).sum()
    moves = [move_to(order, keep=False)] + ([] if is_start else [move_to(element[name], keep=True)])
    score, values = max(moves, key=lambda move: move[0])
    return float(score - old), values


def _cross(problem, head, child, element, weights):
    """`X_A^T X_B` and `Y_A^T Y_B` of matched heads: the closed forms want the source's units as rows."""
    tables = _slot_tables(problem.spec, head, child, element, problem.target, problem.source, weights)
    return tuple(np.swapaxes(table, -1, -2) for table in tables)


def _slot_tables(spec, head, child, element, rows, columns, weights):
    """Products of units inside matched heads, over the plain and over the dual leaves: float64[heads, n, n] each."""
    size = spec.groups[child].size
    tables = [np.zeros((spec.groups[head].size, size, size)) for _ in range(2)]
    for path, head_axis, unit_axis in head_leaves(spec, head):
        axis = spec.axes[path][unit_axis]
        if axis.group == child and path in weights:
            product = slot_scores(spec, element, path, head_axis, unit_axis, rows[path], columns[path])
            tables[axis.dual] += weights[path] * np.asarray(product, np.float64)
    return tables


def _unit_sum(problem, name, element, weights):
    size = problem.spec.groups[name].size
    scores = np.zeros((size, size), np.float64 if size <= 1024 else np.float32)
    for path, axis in problem.spec.leaves_of(name):
        if path in weights:
            product = unit_scores(problem.spec, element, path, axis, problem.target[path], problem.source[path])
            scores += weights[path] * np.asarray(product)
    return scores


def _without_units(spec, head, weights):
    """The leaves of a head that hold one number per head."""
    with_units = {path for path, _, _ in head_leaves(spec, head)}
    return {path: weight for path, weight in weights.items() if path not in with_units}


def _norm(leaf):
    return float(np.linalg.norm(np.asarray(leaf, np.float32)))
