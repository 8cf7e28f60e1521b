"""Weight matching: the element of the symmetry group that brings a source closest to a target.

One objective, `sum over leaves <target, g(source)>` (see `align.blocks` for maps that change norms), and
one loop over blocks of groups: each is solved with the others held still, so the objective never falls.
"""

import contextvars
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.align.blocks import solve_block
from jaxtune.align.memory import keep_search, recall_search
from jaxtune.align.problem import STRETCHING_KINDS, Problem, make_problem
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten
from jaxtune.types import Params

HEAD_COSTS = ("exact", "circuit", "spectral")
WEIGHTINGS = ("plain", "unit", "agreement")
# Rounds of "agreement": on planted truth the weights settle in two or three.
MAX_REWEIGHTINGS = 5
# A gain below this share of the largest possible objective is float32 rounding.
ROUNDING = 1e-7
# Blocks solved side by side. More would hold more scores in memory, and products keep all cores busy anyway.
NUM_LANES = 2
# Scores of larger groups are too much memory to hold twice.
MAX_UNITS_SIDE_BY_SIDE = 4096


@dataclass(frozen=True)
class MatchResult:
    """An element and how it was found.

    Attributes:
        element: Group -> value of its kind; of a permutation int32[n], where entry i is the source unit that
            lands at position i.
        objective: Inner product of target and moved source over the matched leaves; no unit.
        objective_of_identity: The same without moving anything.
        is_converged: False where `max_sweeps` ended the best search.
        num_sweeps: Sweeps of the best search.
        history: Objective of the best search after its start and after each update; never falls.
        start: How the best search began, "anchors" or "identity".
        objectives: Final objective of every search tried.
        reweighted: Of "agreement": objectives under each round's own weights, as `history`, round by round.
    """

    element: dict[str, Any]
    objective: float
    objective_of_identity: float
    is_converged: bool
    num_sweeps: int
    history: tuple[float, ...]
    start: str
    objectives: tuple[float, ...]
    reweighted: tuple[tuple[float, ...], ...] = ()


def match_weights(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    head_cost: str = "exact",
    weighting: str = "plain",
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
            proposes is taken when it does not lower the objective; "spectral" proposes once. Where units
            inside a head have a basis and no order, "exact" stands for "circuit".
        weighting: "plain": every leaf counts as it is. "unit": every leaf counts by its cosine. "agreement": as
            "unit" to the end; then, a few times over, every leaf counts by its cosine times the cosine it has
            reached, and the search goes on from where it stands. Leaves that say nothing fall silent. Objectives
            are those of "unit", which the last rounds may lower.
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
        UnknownNameError: no such `head_cost` or `weighting`.
        ConfigError: `max_sweeps` below 1 or `num_restarts` below 0.

    Reference:
        Ainsworth et al. 2023, arXiv:2209.04836, Algorithm 1; head costs from TransFusion,
        arXiv:2505.22697; "agreement" is iteratively reweighted least squares, after Holland and Welsch 1977.
        Differs: starts from anchors, so that a planted permutation of a residual
        network is found; gains count relative to the objective; heads move as units.
    """
    if head_cost not in HEAD_COSTS:
        raise unknown_name("head cost", head_cost, HEAD_COSTS)
    if weighting not in WEIGHTINGS:
        raise unknown_name("weighting", weighting, WEIGHTINGS)
    if max_sweeps < 1 or num_restarts < 0:
        raise ConfigError(f"max_sweeps={max_sweeps}, num_restarts={num_restarts}: at least 1, and at least 0.")
    check_same({"target": target, "source": source})
    spec.check(target)
    check_finite("target", target)
    check_finite("source", source)
    options = dict(
        head_cost=head_cost,
        weighting=weighting,
        num_restarts=num_restarts,
        max_sweeps=max_sweeps,
        tolerance=tolerance,
    )
    known = recall_search(key, spec, options)
    if known is not None:
        return MatchResult(element=known[0], **{name: _tuples(value) for name, value in known[1].items()})
    basis = "plain" if weighting == "plain" else "unit"
    problem = make_problem(spec, flatten(target), flatten(source), head_cost=head_cost, weighting=basis)
    search = Search(problem)

    def run(start, order_key):
        return search.run(start, order_key, max_sweeps=max_sweeps, tolerance=tolerance)

    results = [run("anchors", None)]
    if results[0].objective < problem.objective_of_identity:
        results.append(run("identity", None))
    results += [run(results[0].start, named_key(key, "restart", n)) for n in range(num_restarts)]
    best = max(results, key=lambda result: result.objective)
    if weighting == "agreement":
        best = _reweigh(problem, best, max_sweeps=max_sweeps, tolerance=tolerance)
    best = dataclasses.replace(
        best,
        objective_of_identity=problem.objective_of_identity,
        objectives=tuple(result.objective for result in results),
    )
    fields = {field.name: getattr(best, field.name) for field in dataclasses.fields(best) if field.name != "element"}
    keep_search(key, spec, options, best.element, fields)
    return best


def _tuples(value):
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _reweigh(problem, result, *, max_sweeps, tolerance):
    """The search continued under weights that follow the leaves' own agreement, until the element stands."""
    histories = []
    for _ in range(MAX_REWEIGHTINGS):
        cosines = problem.agreements(result.element)
        search = Search(problem.reweigh({path: max(cosine, 0.0) for path, cosine in cosines.items()}))
        found = search.run(result.start, None, max_sweeps=max_sweeps, tolerance=tolerance, element=result.element)
        histories.append(found.history)
        result = dataclasses.replace(
            result,
            element=found.element,
            is_converged=result.is_converged and found.is_converged,
            num_sweeps=result.num_sweeps + found.num_sweeps,
        )
        if found.history[-1] - found.history[0] <= max(tolerance, 1e-6) * abs(found.history[0]):
            break
    return dataclasses.replace(result, objective=problem.objective(result.element), reweighted=tuple(histories))


class Search:
    """Host state of one coordinate ascent; `match_weights` is its face."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.neighbours = {
            name: {other for path in paths if path in problem.weights for other in problem.owners[path]} - {name}
            for name, paths in problem.blocks.items()
        }
        self.seen = {
            name: {other for path in paths for other in problem.owners[path]} for name, paths in problem.blocks.items()
        }

    def run(self, start: str, order_key, *, max_sweeps: int, tolerance: float, element=None) -> MatchResult:
        """One search; from `element` where one is given, else from `start`."""
        problem, stale = self.problem, set(self.problem.blocks)
        is_new = element is None
        element = elements.identity(problem.spec) if is_new else dict(element)
        if is_new and start == "anchors":
            stale = self._start_from_anchors(element)
        objective = problem.objective(element)
        history, floor = [objective], ROUNDING * sum(problem.mass.values())
        num_sweeps, is_converged = 0, False
        while not is_converged and num_sweeps < max_sweeps:
            names = list(problem.blocks)
            if order_key is not None:
                draw = jax.random.permutation(named_key(order_key, "sweep", num_sweeps), len(names))
                names = [names[n] for n in np.asarray(draw)]
            before = objective
            while names:
                several = [name for name in self._take(names) if name in stale]
                stale.difference_update(several)
                for name, (gain, values) in zip(several, self._solve(several, element), strict=True):
                    if gain > floor:
                        element.update(values)
                        objective += gain
                        history.append(objective)
                        stale |= self.neighbours[name]
            num_sweeps += 1
            is_converged = not stale or objective - before <= tolerance * abs(objective)
        return MatchResult(
            element=element,
            objective=problem.objective(element),
            objective_of_identity=float("nan"),
            is_converged=is_converged,
            num_sweeps=num_sweeps,
            history=tuple(history),
            start=start,
            objectives=(),
        )

    def _take(self, names):
        """The next block, and those after it as long as none sees what another does; they leave the list."""
        taken, seen = [], set()
        while names and names[0] not in seen:
            taken.append(names.pop(0))
            seen |= self.seen[taken[-1]]
        return taken

    def _solve(self, names, element, *, is_start=False):
        """The best moves of blocks that do not see each other, side by side: [(gain, values)] in their order.

        A product keeps all cores busy, an assignment or a factorisation one; the latter then run beside the former.
        """
        problem = self.problem

        def solve(name):
            return solve_block(problem, name, element, problem.weights, is_start=is_start)

        largest = max((problem.spec.groups[part].size for name in names for part in self._parts_of(name)), default=0)
        if len(names) < 2 or largest > MAX_UNITS_SIDE_BY_SIDE:
            return [solve(name) for name in names]
        # What a caller has set for his own thread holds in ours too.
        wide, device = jax.config.jax_enable_x64, jax.config.jax_default_device

        def solve_likewise(name, context):
            with jax.enable_x64(wide), jax.default_device(device):
                return context.run(solve, name)

        with ThreadPoolExecutor(NUM_LANES) as pool:
            return list(pool.map(solve_likewise, names, [contextvars.copy_context() for _ in names]))

    def _parts_of(self, name):
        return [name, *self.problem.spec.children_of(name)]

    def _start_from_anchors(self, element):
        """Solves every block once, best known first, on leaves whose other axes are known.

        Returns the blocks to visit again: those that could not use all of their leaves. The others were solved
        with every neighbour where it stands now.
        """
        problem, known, waiting, stale = self.problem, set(), list(self.problem.blocks), set()
        while waiting:
            usable = {
                name: [
                    path
                    for path in problem.blocks[name]
                    if path in problem.weights and problem.owners[path] - {name} <= known
                ]
                for name in waiting
            }

            # None of those that can use all of their leaves sees another: the owners of a leaf that two share are not
            # known to either.
            matched = {name: [path for path in problem.blocks[name] if path in problem.weights] for name in waiting}
            whole = [name for name in waiting if usable[name] and len(usable[name]) == len(matched[name])]
            if whole:
                for _, values in self._solve(whole, element, is_start=True):
                    element.update(values)
                known.update(whole)
                waiting = [name for name in waiting if name not in known]
                continue

            def share(name, usable=usable, matched=matched):
                total = sum(problem.mass[path] for path in matched[name])
                part = sum(problem.mass[path] for path in usable[name]) / total if total else 0.0
                return (0.0 if self._lacks_a_side(name, usable[name]) else part), part

            name = max(waiting, key=share)  # the first of equals: declaration order
            if len(usable[name]) < len(matched[name]):
                stale.add(name)
            if usable[name]:
                weights = {path: problem.weights[path] for path in usable[name]}
                element.update(solve_block(problem, name, element, weights, is_start=True)[1])
            known.add(name)
            waiting.remove(name)
        return stale

    def _lacks_a_side(self, name, usable):
        """Whether a map inside the block would be found from one of its two sides alone, which tells too little."""
        spec, weights = self.problem.spec, self.problem.weights
        for child in spec.children_of(name):
            if spec.groups[child].kind in STRETCHING_KINDS:
                sides = {path: spec.axes[path][axis].dual for path, axis in spec.leaves_of(child) if path in weights}
                if set(sides.values()) != {sides[path] for path in usable if path in sides}:
                    return True
        return False
