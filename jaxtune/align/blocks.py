"""The best move of one block of groups, everything else held still.

A block is a group without a parent together with the groups inside it: an order or a rotation of units, or
the order of the heads with the order (or the basis) of the units inside each. Every solver returns the
gain in the objective, `sum over leaves of weight * (<target, g(source)> - |g(source)|^2 / 2)`, whose second
term matters for maps inside heads and for scales alone: nothing else changes a norm.
"""

from typing import Any

import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignments
from jaxtune.align.bases import centred_polar_factor, polar_factor
from jaxtune.align.circuits import circuit_scores, query_of
from jaxtune.align.experts import solve_experts
from jaxtune.align.factors import Pairing, best_signs, score_of_signs, solve_order, solve_scales
from jaxtune.align.grouped import solve_grouped_heads
from jaxtune.align.heads import exact_scores, head_leaves, inside_scores
from jaxtune.align.lengths import unit_squares
from jaxtune.align.problem import Problem, Weights
from jaxtune.align.products import sum_unit_scores, unit_scores
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
        SpecError: a group of a kind that has no matching, or not inside heads.
    """
    spec = problem.spec
    children = spec.children_of(name)
    if not children:
        return _solve_units(problem, name, element, weights)
    if spec.groups[name].role == "expert":
        return solve_experts(problem, name, element, weights, is_start=is_start)
    if query_of(spec, name) is None and {spec.groups[child].kind for child in children} == {"permutation"}:
        return _solve_ordered_heads(problem, name, element, weights, is_start=is_start)
    return solve_grouped_heads(problem, name, element, weights, is_start=is_start)


def _solve_units(problem, name, element, weights):
    spec = problem.spec
    group = spec.groups[name]
    if group.kind == "signed_permutation":
        return _solve_signs(problem, name, element, weights)
    if group.kind == "scaled_permutation":
        return _solve_scales(problem, name, element, weights)
    scores = _unit_sum(problem, name, element, weights)
    if group.kind == "permutation":
        order = problem.best_order(name, scores)
        return float(score_of(scores, order) - score_of(scores, element[name])), {name: order}
    if group.kind in ("orthogonal", "centred_orthogonal"):
        solve = polar_factor if group.kind == "orthogonal" else centred_polar_factor
        rotation = solve(scores.T)
        return float(np.vdot(scores.T, rotation) - np.vdot(scores.T, element[name])), {name: rotation}
    raise SpecError(f"group {name}: no matching for kind {group.kind!r}.")


def _solve_signs(problem, name, element, weights):
    """Orders with a sign each; what stands already stays where nothing found is better."""
    axes = {path: problem.spec.axes[path][position] for path, position in problem.spec.leaves_of(name)}
    touched = {path: weight for path, weight in weights.items() if path in axes and not axes[path].order_only}
    others = {path: weight for path, weight in weights.items() if path in axes and axes[path].order_only}
    signed, fixed = (_unit_sum(problem, name, element, leaves) for leaves in (touched, others))
    current, found = np.asarray(element[name]), best_signs(signed, fixed)
    gain = score_of_signs(found, signed, fixed) - score_of_signs(current, signed, fixed)
    return (gain, {name: found}) if gain > 0 else (0.0, {name: current})


def _solve_scales(problem, name, element, weights):
    """The same with a positive scale each."""
    spec, size = problem.spec, problem.spec.groups[name].size
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
    if all(path in weights for path in problem.blocks[name] if path in problem.weights):
        found = solve_scales(pairing)
    else:  # at the start, one side of a unit says too little about its scale
        found = solve_order(pairing, *(scales[name] for scales in problem.balanced_scales()))
    gain = pairing.objective(found) - pairing.objective(current)
    return (gain, {name: found}) if gain > 0 else (0.0, {name: current})


def _solve_ordered_heads(problem, name, element, weights, *, is_start):
    spec = problem.spec
    inside = inside_scores(spec, name, element, problem.target, problem.source, weights)
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
        order = solve_assignment(circuit_scores(spec, name, element, problem.target, problem.source))
    else:
        order = problem.spectral_order(name)
    moves = [move_to(order)] + ([] if is_start else [move_to(element[name])])
    score, values = max(moves, key=lambda move: move[0])
    return float(score - old), values


def _unit_sum(problem, name, element, weights):
    """Weighted scores of a group's units over all of its leaves: float64[n, n]; above 1024 float32, to be read only."""
    spec, size = problem.spec, problem.spec.groups[name].size
    leaves = (
        (weights[path], path, axis, problem.target[path], problem.source[path])
        for path, axis in spec.leaves_of(name)
        if path in weights
    )
    if size > 1024:
        scores = sum_unit_scores(spec, element, leaves)
        return np.zeros((size, size), np.float32) if scores is None else np.asarray(scores)
    scores = np.zeros((size, size))
    for weight, path, axis, target, source in leaves:
        scores += weight * np.asarray(unit_scores(spec, element, path, axis, target, source))
    return scores


def _without_units(spec, head, weights):
    """The leaves of a head that hold one number per head."""
    with_units = {path for path, _, _ in head_leaves(spec, head)}
    return {path: weight for path, weight in weights.items() if path not in with_units}
