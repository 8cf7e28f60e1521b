"""The best move of attention heads whose insides are more than orders: heads, queries inside them, maps inside both.

Heads are matched by their circuits, which no map inside shows in, and so are the queries that share keys and values.
Then each group of units inside has a closed form by its kind, given who is matched with whom; the queries are
matched once more, exactly, given these maps. Nothing is taken that would lower the objective.
"""

from typing import Any

import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignments
from jaxtune.align.circuits import (
    PLANE_KINDS,
    inside_of,
    list_head_leaves,
    loose_scores,
    match_queries,
    pair_tables,
    query_of,
    query_scores,
)
from jaxtune.align.inside import INSIDE
from jaxtune.align.problem import Problem, Weights
from jaxtune.errors import SpecError
from jaxtune.symmetry import element as elements

Values = dict[str, Any]
# Maps given queries, queries given maps. On planted pairs the first round settles it.
MAX_ROUNDS = 4


def solve_grouped_heads(
    problem: Problem, name: str, element: elements.Element, weights: Weights, *, is_start: bool
) -> tuple[float, Values]:
    """`blocks.solve_block` for a group of heads.

    Raises:
        SpecError: a group inside is of a kind without a closed form, or QK and VO are one group.
    """
    check_heads(problem.spec, name)
    visit = _Visit(problem, name, element, weights)
    standing = {child: element[child] for child in visit.children}
    still = elements.identity(problem.spec)
    order, queries = visit.propose()
    # Where nobody changes places the maps that stand are one candidate more, and identities win over no closed form.
    is_new = is_start or visit.query is not None or not np.array_equal(order, element[name])
    moves = [visit.improve(order, queries, {child: still[child] for child in visit.children})] if is_new else []
    if not is_start:
        moves.append(visit.improve(element[name], visit.queries_of(element), standing))
    score, values = max(moves, key=lambda move: move[0])
    return score - visit.score(element[name], visit.queries_of(element), standing), values


def check_heads(spec, name: str) -> None:
    """Raises `SpecError` where a group inside the heads `name` has no closed form."""
    query = query_of(spec, name)
    known = dict.fromkeys(inside_of(spec, name), INSIDE) | ({query: ("permutation",)} if query else {})
    for child, kinds in known.items():
        group = spec.groups[child]
        if group.kind not in kinds:
            raise SpecError(
                f"group {child}: no matching for kind {group.kind!r} inside heads; known: {', '.join(kinds)}."
            )


class _Visit:
    """What one visit to a group of heads measures once, and scores of moves made from it."""

    def __init__(self, problem, name, element, weights):
        self.problem, self.spec, self.name, self.weights = problem, problem.spec, name, weights
        self.query, self.children = query_of(self.spec, name), inside_of(self.spec, name)
        self.leaves = [leaf for leaf in list_head_leaves(self.spec, name) if leaf.path in weights]
        self.slots = np.arange(self.spec.groups[name].size)
        # One product for every pair of heads serves the circuits and, for any order, what is inside matched heads.
        self.pairs = pair_tables(self.spec, name, element, problem.target, problem.source)
        self.alone, self.alone_inside = loose_scores(self.spec, name, element, problem.target, problem.source, weights)
        self.sides = {child: problem.sides(name, child, weights) for child in self.children}

    def queries_of(self, element):
        """int32[heads, queries] of an element."""
        return np.zeros((len(self.slots), 1), np.int32) if self.query is None else np.asarray(element[self.query])

    def propose(self):
        """(order of heads, order of queries inside each) by the circuits."""
        scores = query_scores(self.spec, self.name, self.pairs, self.problem.circuit_norms(self.name))
        if self.alone_inside is not None:
            scores = scores + self.alone_inside
        sums, queries = match_queries(scores)
        if self.problem.head_cost == "spectral":
            order = self.problem.spectral_order(self.name)
        else:
            order = solve_assignment(sums + self.alone)
        return order, queries[self.slots, order]

    def improve(self, order, queries, maps):
        """(score, values) of the best maps for who is matched with whom, and of the best queries for those maps."""
        for _ in range(MAX_ROUNDS):
            score, maps = self._solve_maps(order, queries, maps)
            if self.query is None:
                break
            tables = self._query_tables(order, maps)
            found = solve_assignments(tables)
            if (score_of(tables, found) <= score_of(tables, queries)).all():
                break
            queries = found
            score = self.score(order, queries, maps)
        return score, {self.name: order, **maps} | ({self.query: queries} if self.query else {})

    def score(self, order, queries, maps):
        """The block's part of the objective, up to a constant."""
        total = self._score_of_orders(order, queries)
        for child in self.children:
            inside, cross = INSIDE[self.spec.groups[child].kind], self._cross(child, order, queries)
            total += inside.objective(maps[child], cross, self._reordered(child, order)).sum()
        return float(total)

    def _solve_maps(self, order, queries, maps):
        total, found = self._score_of_orders(order, queries), {}
        for child in self.children:
            inside, cross = INSIDE[self.spec.groups[child].kind], self._cross(child, order, queries)
            source, target = self._reordered(child, order), self.sides[child][1]
            found[child], scores = inside.solve(cross, source, target, maps[child])
            total += scores.sum()
        return float(total), found

    def _reordered(self, child, order):
        return INSIDE[self.spec.groups[child].kind].reorder(self.sides[child][0], order)

    def _score_of_orders(self, order, queries):
        """Over the leaves that have no units inside heads."""
        score = score_of(self.alone, order)
        if self.alone_inside is not None:
            score += score_of(self.alone_inside[self.slots, order], queries).sum()
        return score

    def _cross(self, child, order, queries):
        """Products of matched units over the plain and over the dual leaves, matched queries added up."""
        sides = [0.0, 0.0]
        for leaf in self.leaves:
            if leaf.child == child:
                table = self.pairs[leaf.path][self.slots, order]  # [head, query, query, ...]
                if leaf.axes[1] >= 0:
                    index = queries.reshape(*queries.shape, *[1] * (table.ndim - 2))
                    table = np.take_along_axis(table, index, axis=2)
                sides[leaf.is_dual] = sides[leaf.is_dual] + self.weights[leaf.path] * _wide(table[:, :, 0]).sum(axis=1)
        empty = np.zeros(self._inner_shape(child))
        return sides[0] + empty, sides[1] + empty

    def _inner_shape(self, child):
        units, is_plane = self.spec.groups[child].size, self.spec.groups[child].kind in PLANE_KINDS
        return (len(self.slots), units // 2) if is_plane else (len(self.slots), units, units)

    def _query_tables(self, order, maps):
        """Products of every pair of queries of matched heads, their units moved by the maps."""
        tables = 0.0 if self.alone_inside is None else self.alone_inside[self.slots, order]
        for leaf in self.leaves:
            if leaf.axes[1] >= 0:
                table = _wide(self.pairs[leaf.path][self.slots, order])
                side = INSIDE[self.spec.groups[leaf.child].kind].side(maps[leaf.child], leaf.is_dual)
                formula = "habp,hp->hab" if leaf.by_plane else "habuv,hvu->hab"
                tables = tables + self.weights[leaf.path] * np.einsum(formula, table, side, optimize=True).real
        num_queries = 1 if self.query is None else self.spec.groups[self.query].size
        return tables + np.zeros((len(self.slots), num_queries, num_queries))


def _wide(table):
    return table.astype(np.complex128 if table.dtype.kind == "c" else np.float64)
