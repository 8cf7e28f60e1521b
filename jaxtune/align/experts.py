"""The best move of a mixture of experts: their order, and the order and signs of the hidden units inside each.

Matching the units inside every pair of experts would cost an assignment a pair. So experts are first put in order by
what no order inside shows in: their rows of the router, and sketches of the maps that their kernels make of the
stream, `W_up W_down R` and `W_gate W_gate^T R` with one random R for all. Then the units inside matched experts are
matched exactly. The standing order is a candidate too, so nothing is taken that would lower the objective.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment
from jaxtune.align.factors import best_signs, score_of_signs
from jaxtune.align.problem import Problem, Weights
from jaxtune.align.products import add_scores_of_slot, unit_scores, units_of_slot
from jaxtune.errors import SpecError
from jaxtune.symmetry import element as elements

Values = dict[str, Any]
KINDS_INSIDE = ("permutation", "signed_permutation")
# Columns of R. A sketch of the maps of two unrelated experts has a cosine of about 1 / sqrt(width * columns).
NUM_COLUMNS = 32


def solve_experts(
    problem: Problem, name: str, element: elements.Element, weights: Weights, *, is_start: bool
) -> tuple[float, Values]:
    """`blocks.solve_block` for a group of experts; at the start the gain counts from zero.

    Raises:
        SpecError: units inside the experts that are neither ordered nor ordered with signs.
    """
    spec = problem.spec
    children = spec.children_of(name)
    for child in children:
        if spec.groups[child].kind not in KINDS_INSIDE:
            raise SpecError(f"group {child}: no matching for kind {spec.groups[child].kind!r} inside experts.")
    loose = {path: axis for path, axis in spec.leaves_of(name) if path in weights and _is_loose(spec, name, path)}
    rows = {path: _row_scores(problem, element, path, axis) for path, axis in loose.items()}
    alone = sum((weights[path] * rows[path] for path in rows), np.zeros((spec.groups[name].size,) * 2))
    inside = {child: _Inside(problem, name, child, element, weights) for child in children}

    def move_to(order):
        score, values = float(score_of(alone, order)), {name: order}
        for child, pairs in inside.items():
            found = [pairs.solve(slot, expert) for slot, expert in enumerate(order)]
            values[child] = np.stack([value for value, _ in found])
            score += sum(pair_score for _, pair_score in found)
        return score, values

    proposal = sum((_normalise(table) for table in rows.values()), np.zeros(alone.shape))
    proposal = proposal + sum(pairs.sketch_scores() for pairs in inside.values())
    moves = [move_to(solve_assignment(proposal))]
    if is_start:
        return moves[0]
    moves.append(move_to(np.asarray(element[name])))
    old = float(score_of(alone, np.asarray(element[name]))) + sum(pairs.standing_score() for pairs in inside.values())
    score, values = max(moves, key=lambda move: move[0])
    return (score - old, values) if score > old else (0.0, {group: element[group] for group in (name, *children)})


class _Inside:
    """Units of one group inside pairs of experts; each pair is solved once."""

    def __init__(self, problem, name, child, element, weights):
        self.spec, self.element, self.weights, self.name, self.child = problem.spec, element, weights, name, child
        self.is_signed = self.spec.groups[child].kind == "signed_permutation"
        self.leaves = {
            path: (self.spec.axes[path][unit_axis], (_axis_of(self.spec, path, name), unit_axis))
            for path, unit_axis in self.spec.leaves_of(child)
            if path in weights
        }
        self.pairs = {path: (problem.target[path], problem.source[path]) for path in self.leaves}
        self.solved, self.standing = {}, {}

    def solve(self, slot, expert):
        """(value, score) of the best units of the source's `expert` in the target's `slot`."""
        if (slot, expert) in self.solved:
            return self.solved[slot, expert]
        fixed, signed = (self._scores(slot, expert, sides) for sides in ((True,), (False,)))
        if not self.is_signed:
            fixed, signed = fixed + signed, None
        current = np.asarray(self.element[self.child])[slot]
        if self.is_signed:
            found = best_signs(signed, fixed)
            moves = [(found, score_of_signs(found, signed, fixed))]
        else:
            found = solve_assignment(fixed)
            moves = [(found, float(score_of(fixed, found)))]
        if expert == self.element[self.name][slot]:
            score = score_of_signs(current, signed, fixed) if self.is_signed else float(score_of(fixed, current))
            self.standing[slot] = score
            moves.insert(0, (current, score))  # the first of equals
        self.solved[slot, expert] = max(moves, key=lambda move: move[1])
        return self.solved[slot, expert]

    def standing_score(self):
        """Of the element as it stands; after `solve` has seen every standing pair."""
        return sum(self.standing.values())

    def _scores(self, slot, expert, order_only):
        """Scores of units over the leaves that a sign does (False) or does not touch (True): float32[n, n]."""
        scores = None
        for path, (axis, axes) in self.leaves.items():
            if axis.order_only in order_only:
                ours, theirs = self._parts(path, slot, expert)
                scores = add_scores_of_slot(
                    scores, self.weights[path], self.spec, self.element, path, axes, ours, theirs
                )
        size = self.spec.groups[self.child].size
        return np.zeros((size, size), np.float32) if scores is None else np.asarray(scores)

    def _parts(self, path, slot, expert):
        """What belongs to one expert of the target and one of the source."""
        parent_axis = self.leaves[path][1][0]
        ours, theirs = self.pairs[path]
        return ours.take(slot, axis=parent_axis), theirs.take(expert, axis=parent_axis)

    def sketch_scores(self):
        """Sum of cosines of sketches for every pair of experts: float64[target experts, source experts]."""
        kernels = [path for path, (axis, _) in self.leaves.items() if len(self.spec.axes[path]) > 2]
        sides = {
            "plain": [p for p in kernels if not self.leaves[p][0].dual and not self.leaves[p][0].order_only],
            "dual": [p for p in kernels if self.leaves[p][0].dual],
            "fixed": [p for p in kernels if self.leaves[p][0].order_only],
        }
        total = np.zeros((self.spec.groups[self.name].size,) * 2)
        for first, second in (("plain", "dual"), ("fixed", "fixed")):
            for a in sides[first]:
                for b in sides[second]:
                    total = total + _cosines(*(self._sketch(a, b, which) for which in (0, 1)))
        return total

    def _sketch(self, a, b, which):
        """`sum over units of a_unit (b_unit R)` of every expert of one network, centred: float32[experts, rest * r]."""
        rows = []
        for expert in range(self.spec.groups[self.name].size):
            parts = [self._moved(path, expert, which) for path in (a, b)]
            rows.append(np.asarray(_sketch(*parts)).ravel())
        rows = np.stack(rows)
        return rows - rows.mean(axis=0, keepdims=True)  # what all experts share tells none apart

    def _moved(self, path, expert, which):
        """One expert's part of a leaf with its units first: float32[n, rest], the source's stream moved."""
        _, (parent_axis, unit_axis) = self.leaves[path]
        part = self.pairs[path][which].take(expert, axis=parent_axis)
        return units_of_slot(self.spec, self.element, path, (parent_axis, unit_axis), part, is_moved=which == 1)


def _is_loose(spec, name, path):
    return not any(axis and spec.groups[axis.group].parent == name for axis in spec.axes[path])


def _row_scores(problem, element, path, axis):
    leaves = problem.target[path], problem.source[path]
    return np.asarray(unit_scores(problem.spec, element, path, axis, *leaves), np.float64)


def _normalise(table):
    """Products of rows, without what all rows share, over the largest of them."""
    table = table - table.mean(axis=0, keepdims=True)
    table = table - table.mean(axis=1, keepdims=True)
    return table / max(np.abs(table).max(), np.finfo(np.float64).tiny)


def _cosines(ours, theirs):
    ours, theirs = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in (ours, theirs))
    return (ours @ theirs.T).astype(np.float64)


def _axis_of(spec, path, group):
    return next(n for n, axis in enumerate(spec.axes[path]) if axis and axis.group == group)


@functools.cache
def _columns(size):
    return np.random.default_rng(0).choice(np.array([-1.0, 1.0], np.float32), size=(size, NUM_COLUMNS))


def _sketch(a, b):
    return _multiply(a, b, _columns(b.shape[1]))


@jax.jit
def _multiply(a, b, columns):
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("hx,hr->xr", a, jnp.einsum("hy,yr->hr", b, columns, precision=highest), precision=highest)
