"""The best move of one block of groups, everything else held still.

A block is a group without a parent together with the groups inside it: an order or a rotation of units, or
the order of the heads with the order (or the basis) of the units inside each. Every solver returns the
gain in the objective, `sum over leaves of weight * (<target, g(source)> - |g(source)|^2 / 2)`, whose second
term matters for maps inside heads and for scales alone: nothing else changes a norm.
"""

from typing import Any

import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignments
from jaxtune.align.bases import centred_polar_factor, inside_objective, polar_factor, solve_inside
from jaxtune.align.factors import Pairing, solve_order, solve_scales, solve_signs
from jaxtune.align.heads import exact_scores, head_leaves, inside_scores, pair_tables
from jaxtune.align.lengths import unit_squares
from jaxtune.align.problem import Problem, Weights
from jaxtune.align.products import add_unit_scores, unit_scores
from jaxtune.errors import SpecError
from jaxtune.symmetry import element as elements

Values = dict[str, Any]


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
    if group.kind in ("signed_permutation", "scaled_permutation"):
        return _solve_factors(problem, name, element, weights)
    scores = _unit_sum(problem, name, element, weights)
    if group.kind == "permutation":
        order = problem.best_order(name, scores)
        return float(score_of(scores, order) - score_of(scores, element[name])), {name: order}
    if group.kind in ("orthogonal", "centred_orthogonal"):
        solve = polar_factor if group.kind == "orthogonal" else centred_polar_factor
        rotation = solve(scores.T)
        return float(np.vdot(scores.T, rotation) - np.vdot(scores.T, element[name])), {name: rotation}
    raise SpecError(f"group {name}: no matching for kind {group.kind!r}.")


def _solve_factors(problem, name, element, weights):
    """Orders with a sign or a scale each; what stands already stays where nothing found is better."""
    spec = problem.spec
    size, kind = spec.groups[name].size, spec.groups[name].kind
    leaves = {"plain": {}, "dual": {}, "fixed": {}}
    own = {"plain": np.zeros(size), "dual": np.zeros(size)}
    for path, position in spec.leaves_of(name):
        if path in weights:
            axis = spec.axes[path][position]
            side = "dual" if axis.dual else "fixed" if axis.order_only else "plain"
            leaves[side][path] = weights[path]
            if side in own:
                own[side] += weights[path] * unit_squares(spec, element, path, position, problem.source[path])
    pairing = Pairing(
        **{side: _unit_sum(problem, name, element, leaves[side]) for side in leaves},
        own_plain=own["plain"],
        own_dual=own["dual"],
    )
    current = np.asarray(element[name])
    if kind == "signed_permutation":
        found = solve_signs(pairing)
    elif all(path in weights for path in problem.blocks[name] if path in problem.weights):
        found = solve_scales(pairing)
    else:  # at the start, one side of a unit says too little about its scale
        found = solve_order(pairing, *(scales[name] for scales in problem.balanced_scales()))
    gain = pairing.objective(found) - pairing.objective(current)
    return (gain, {name: found}) if gain > 0 else (0.0, {name: current})


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
        order = solve_assignment(problem.circuit_scores(name, element))
    else:
        order = problem.spectral_order(name)
    moves = [move_to(order)] + ([] if is_start else [move_to(element[name])])
    score, values = max(moves, key=lambda move: move[0])
    return float(score - old), values


def _solve_linear_heads(problem, name, element, weights, *, is_start):
    """Heads by their circuits, which no basis inside a head changes; then the basis inside each."""
    spec = problem.spec
    alone = _unit_sum(problem, name, element, _without_units(spec, name, weights))
    # One product for every pair of heads serves the circuits and, for any order, what is inside matched heads.
    pairs = pair_tables(spec, name, element, problem.target, problem.source)
    if problem.head_cost == "spectral":
        order = problem.spectral_order(name)
    else:
        order = solve_assignment(problem.circuit_scores(name, element, pairs=pairs) + alone)

    sides = {child: problem.sides(name, child, weights) for child in spec.children_of(name)}

    def move_to(order, *, keep):
        values, score = {name: order}, score_of(alone, order)
        for child in spec.children_of(name):
            cross, (source, target) = _cross(spec, child, pairs, order, weights), sides[child]
            source = source.reorder(order)
            current = element[child] if keep else np.broadcast_to(np.eye(cross[0].shape[-1]), cross[0].shape)
            values[child], scores = solve_inside(cross, source, target, current)
            score += scores.sum()
        return score, values

    old = score_of(alone, element[name])
    for child in spec.children_of(name):
        grams = sides[child][0].reorder(element[name]).grams
        old += inside_objective(element[child], _cross(spec, child, pairs, element[name], weights), grams).sum()
    moves = [move_to(order, keep=False)] + ([] if is_start else [move_to(element[name], keep=True)])
    score, values = max(moves, key=lambda move: move[0])
    return float(score - old), values


def _cross(spec, child, pairs, order, weights):
    """`X_A^T X_B` and `Y_A^T Y_B` of matched heads: the closed forms want the source's units as rows."""
    tables, slots = [0.0, 0.0], np.arange(len(order))
    for path, unit_axis in spec.leaves_of(child):
        if path in weights:
            tables[spec.axes[path][unit_axis].dual] += weights[path] * pairs[path][slots, order].astype(np.float64)
    empty = np.zeros((len(order), *(spec.groups[child].size,) * 2))
    return tuple(np.swapaxes(table + empty, -1, -2) for table in tables)


def _unit_sum(problem, name, element, weights):
    """Weighted scores of a group's units over all of its leaves: float64[n, n]; above 1024 float32, to be read only."""
    spec, size = problem.spec, problem.spec.groups[name].size
    is_large = size > 1024
    scores = None if is_large else np.zeros((size, size))
    for path, axis in spec.leaves_of(name):
        if path in weights and is_large:
            pair = problem.target[path], problem.source[path]
            scores = add_unit_scores(scores, weights[path], spec, element, path, axis, *pair)
        elif path in weights:
            product = unit_scores(spec, element, path, axis, problem.target[path], problem.source[path])
            scores += weights[path] * np.asarray(product)
    return np.zeros((size, size), np.float32) if scores is None else np.asarray(scores)


def _without_units(spec, head, weights):
    """The leaves of a head that hold one number per head."""
    with_units = {path for path, _, _ in head_leaves(spec, head)}
    return {path: weight for path, weight in weights.items() if path not in with_units}
