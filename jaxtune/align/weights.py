"""Weight matching: the element of the symmetry group that brings a source closest to a target.

One objective, `sum over leaves <target, g(source)>`, and one loop over the groups: each is solved
exactly with the others held still, so the objective never falls.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignments
from jaxtune.align.heads import circuit_scores, exact_scores, head_leaves, inside_scores, spectral_scores
from jaxtune.align.products import leaf_product, unit_scores
from jaxtune.errors import unknown_name
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten
from jaxtune.types import Params

HEAD_COSTS = ("exact", "circuit", "spectral")
# A gain below this share of the largest possible objective is float32 rounding.
ROUNDING = 1e-7


@dataclass(frozen=True)
class MatchResult:
    """An element and how it was found.

    Attributes:
        element: Group -> int32[n]; entry i is the source unit that lands at position i.
        objective: Inner product of target and moved source over the matched leaves; no unit.
        objective_of_identity: The same without moving anything.
        is_converged: False where `max_sweeps` ended the best search.
        num_sweeps: Sweeps of the best search.
        history: Objective of the best search after its start and after each update; never falls.
        start: How the best search began, "anchors" or "identity".
        objectives: Final objective of every search tried.
    """

    element: dict[str, Any]
    objective: float
    objective_of_identity: float
    is_converged: bool
    num_sweeps: int
    history: tuple[float, ...]
    start: str
    objectives: tuple[float, ...]


def match_weights(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    head_cost: str = "exact",
    num_restarts: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-6,
) -> MatchResult:
    """Finds the element that brings `source` closest to `target`.

    The search starts from the anchors: axes that nothing can move (pixels, positions, a shared
    read-out) fix the stream, the stream fixes the heads and the hidden units, and each group is first
    solved on those leaves alone whose other axes are known already. Then all leaves count, group by
    group, until a sweep gains nothing. Groups whose neighbours stand still are not visited again.

    Args:
        key: Orders the groups in restarts; the first search does not use it.
        spec: Symmetry of both networks.
        target: Parameters that stay as they are.
        source: Parameters to move; paths and shapes as in `target`.
        head_cost: "exact", "circuit" or "spectral", see `align.heads`. The order of heads that a score
            proposes is taken when it does not lower the objective; "spectral" proposes once.
        num_restarts: Further searches, each from the same start with the groups in another random order.
        max_sweeps: Give up after this many.
        tolerance: A sweep that gains less than this share of the objective ends the search.

    Returns:
        The best of all searches, and never less than the identity: if the anchors lead below it, a
        search starts from the identity too.

    Raises:
        TreeMismatchError: `target` and `source` differ in a path or a shape.
        SpecError: the trees do not fit `spec`.
        NonFiniteError: a leaf holds NaN or Inf.
        UnknownNameError: no such `head_cost`.

    Reference:
        Ainsworth et al. 2023, arXiv:2209.04836, Algorithm 1; head costs from TransFusion,
        arXiv:2505.22697. Differs: starts from anchors, so that a planted permutation of a residual
        network is found; gains count relative to the objective; heads move as units.
    """
    if head_cost not in HEAD_COSTS:
        raise unknown_name("head cost", head_cost, HEAD_COSTS)
    check_same({"target": target, "source": source})
    spec.check(target)
    check_finite("target", target)
    check_finite("source", source)
    search = Search(spec, flatten(target), flatten(source), head_cost)
    identity = elements.identity(spec)
    objective_of_identity = search.objective(identity)

    def run(start, order_key):
        return search.run(start, order_key, max_sweeps=max_sweeps, tolerance=tolerance)

    results = [run("anchors", None)]
    if results[0].objective < objective_of_identity:
        results.append(run("identity", None))
    results += [run(results[0].start, named_key(key, "restart", n)) for n in range(num_restarts)]
    best = max(results, key=lambda result: result.objective)
    return dataclasses.replace(
        best,
        objective_of_identity=objective_of_identity,
        objectives=tuple(result.objective for result in results),
    )


class Search:
    """Host state of one coordinate ascent; `match_weights` is its face."""

    def __init__(self, spec: Spec, target: Mapping[str, Any], source: Mapping[str, Any], head_cost: str):
        self.spec, self.head_cost = spec, head_cost
        self.target = {path: jax.numpy.asarray(leaf) for path, leaf in target.items()}
        self.source = {path: jax.numpy.asarray(leaf) for path, leaf in source.items()}
        matched = [path for path in spec.axes if path not in spec.unmatched]
        self.weights = dict.fromkeys(matched, 1.0)
        self.mass = {path: _norm(target[path]) * _norm(source[path]) for path in matched}
        # A head and the units inside it are solved together, so a block is a group without a parent.
        self.blocks = {
            name: tuple(
                sorted({path for group in (name, *spec.children_of(name)) for path, _ in spec.leaves_of(group)})
            )
            for name, group in spec.groups.items()
            if group.parent is None
        }
        self.owners = {path: {_root(spec, axis.group) for axis in axes if axis} for path, axes in spec.axes.items()}
        self.neighbours = {
            name: {other for path in paths if path in self.weights for other in self.owners[path]} - {name}
            for name, paths in self.blocks.items()
        }
        self.spectral = {}

    def objective(self, element) -> float:
        return sum(
            weight * leaf_product(self.spec, element, path, self.target[path], self.source[path])
            for path, weight in self.weights.items()
        )

    def run(self, start: str, order_key, *, max_sweeps: int, tolerance: float) -> MatchResult:
        element = elements.identity(self.spec)
        if start == "anchors":
            self._start_from_anchors(element)
        objective = self.objective(element)
        history, floor = [objective], ROUNDING * sum(self.mass.values())
        stale, num_sweeps, is_converged = set(self.blocks), 0, False
        while not is_converged and num_sweeps < max_sweeps:
            names = list(self.blocks)
            if order_key is not None:
                draw = jax.random.permutation(named_key(order_key, "sweep", num_sweeps), len(names))
                names = [names[n] for n in np.asarray(draw)]
            before = objective
            for name in names:
                if name not in stale:
                    continue
                stale.discard(name)
                gain, proposal = self._solve(name, element, self.weights)
                if gain > floor:
                    element.update(proposal)
                    objective += gain
                    history.append(objective)
                    stale |= self.neighbours[name]
            num_sweeps += 1
            is_converged = not stale or objective - before <= tolerance * abs(objective)
        return MatchResult(
            element=element,
            objective=self.objective(element),
            objective_of_identity=float("nan"),
            is_converged=is_converged,
            num_sweeps=num_sweeps,
            history=tuple(history),
            start=start,
            objectives=(),
        )

    def _start_from_anchors(self, element):
        """Solves every block once, best known first, on leaves whose other axes are known."""
        known, waiting = set(), list(self.blocks)
        while waiting:
            usable = {
                name: [p for p in self.blocks[name] if p in self.weights and self.owners[p] - {name} <= known]
                for name in waiting
            }

            def share(name, usable=usable):
                total = sum(self.mass[path] for path in self.blocks[name] if path in self.weights)
                return sum(self.mass[path] for path in usable[name]) / total if total else 0.0

            name = max(waiting, key=share)  # the first of equals: declaration order
            if usable[name]:
                weights = {path: self.weights[path] for path in usable[name]}
                element.update(self._solve(name, element, weights, is_start=True)[1])
            known.add(name)
            waiting.remove(name)

    def _solve(self, name, element, weights, *, is_start=False):
        """(gain, new values) of the best move of one block, the others held still."""
        if self.spec.children_of(name):
            return self._solve_heads(name, element, weights, is_start=is_start)
        size = self.spec.groups[name].size
        scores = np.zeros((size, size), np.float64 if size <= 512 else np.float32)
        for path, axis in self.spec.leaves_of(name):
            if path in weights:
                product = unit_scores(self.spec, element, path, axis, self.target[path], self.source[path])
                scores += weights[path] * np.asarray(product)
        order = solve_assignment(scores)
        return float(score_of(scores, order) - score_of(scores, element[name])), {name: order}

    def _solve_heads(self, name, element, weights, *, is_start):
        spec = self.spec
        inside = inside_scores(spec, name, element, self.target, self.source, weights)
        alone = np.zeros((spec.groups[name].size,) * 2)  # leaves with one number per head
        with_units = {path for path, _, _ in head_leaves(spec, name)}
        for path, axis in spec.leaves_of(name):
            if path in weights and path not in with_units:
                product = unit_scores(spec, element, path, axis, self.target[path], self.source[path])
                alone += weights[path] * np.asarray(product)

        def move_to(order):
            values, score = {name: order}, score_of(alone, order)
            for child, scores in inside.items():
                matched = scores[np.arange(len(order)), order]
                values[child] = solve_assignments(matched)
                score += score_of(matched, values[child]).sum()
            return score, values

        old = score_of(alone, element[name]) + sum(
            score_of(scores[np.arange(len(element[name])), element[name]], element[child]).sum()
            for child, scores in inside.items()
        )
        moves = [move_to(self._propose(name, element, inside, alone))]
        if not is_start:
            moves.append(move_to(element[name]))
        score, values = max(moves, key=lambda move: move[0])
        return float(score - old), values

    def _propose(self, name, element, inside, alone):
        if self.head_cost == "exact":
            return solve_assignment(exact_scores(inside) + alone)
        if self.head_cost == "circuit":
            return solve_assignment(circuit_scores(self.spec, name, element, self.target, self.source))
        if name not in self.spectral:
            scores = spectral_scores(self.spec, name, self.target, self.source)
            self.spectral[name] = solve_assignment(scores)
        return self.spectral[name]


def _root(spec, name):
    return spec.groups[name].parent or name


def _norm(leaf):
    return float(np.linalg.norm(np.asarray(leaf, np.float32)))
