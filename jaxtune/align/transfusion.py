"""TransFusion's matching loop: heads by singular values, then the units inside, with its faults as switches.

Kept apart from `align.weights` because it is not a coordinate ascent: the head step minimises a distance
of spectra while every other step maximises an inner product, in two phases that share one loop.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignment_from, solve_assignments
from jaxtune.align.heads import head_leaves, spectral_scores
from jaxtune.align.products import slot_scores
from jaxtune.align.tables import UnitTable, check_orders
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.lazy import ReadOnUse
from jaxtune.rng import named_key
from jaxtune.symmetry import element as elements
from jaxtune.symmetry.spec import Spec
from jaxtune.tree import check_finite, check_same, flatten
from jaxtune.types import Params

ORDERS = ("random", "forward", "backward", "alternate")
PUBLISHED_TOLERANCE = 1e-12


@dataclass(frozen=True)
class TransfusionResult:
    """An element found by TransFusion's loop.

    Attributes:
        element: Group -> int32[n]; entry i is the source unit that lands at position i.
        is_converged: False where `max_sweeps` ended the search.
        num_sweeps: Sweeps over all groups.
        reached_inside: Whether the units inside the heads were ever matched. The published stop test
            can end the search before; then they keep the order they had.
    """

    element: dict[str, Any]
    is_converged: bool
    num_sweeps: int
    reached_inside: bool


def match_transfusion(
    key: jax.Array,
    spec: Spec,
    target: Params,
    source: Params,
    *,
    order: str = "random",
    max_sweeps: int = 100,
    include_output_spectrum: bool = True,
    repair_stop: bool = True,
    repair_phase: bool = True,
    repair_backward: bool = True,
    repair_tolerance: bool = True,
    repair_start: bool = True,
) -> TransfusionResult:
    """Finds permutations as TransFusion does; with all repairs off, as its released code does.

    Args:
        key: Draws the order of the groups, anew in every sweep, where `order` is "random".
        spec: Symmetry of both networks; the paper's own has one stream group per junction and one order
            for the units of a head (`junctions="each", inside="joint"`).
        target: Parameters that stay as they are.
        source: Parameters to move; paths and shapes as in `target`.
        order: "random" (the released main program), "forward", "backward" or "alternate" (first, last,
            second, last but one, ...), in the spec's order of declaration.
        max_sweeps: Give up after this many.
        include_output_spectrum: The code adds the output projection to the paper's Q, K and V spectra.
        repair_stop: The code tests for the end before it changes phase, so a sweep without progress in
            the first phase ends the search and the units inside heads are never matched.
        repair_phase: The code lets the last attention group alone decide whether heads progressed.
        repair_backward: The code's backward order leaves out the first group, the stream's entry.
        repair_tolerance: The code counts a gain of 1e-12 on float32 sums of order 100 as progress; here a
            gain counts relative to the sum.
        repair_start: The code solves the stream and the hidden units in its first phase too, in the order
            asked for, around heads whose units are still unmatched: most of the time of an easy match. Here
            all heads are set first, and the first sweep runs forward from the inputs, each group on those
            leaves whose other axes are known by then; `order` rules from the second sweep on.

    Raises:
        TreeMismatchError: `target` and `source` differ in a path or a shape.
        SpecError: the trees do not fit `spec`, or a group of it is more than an order of units.
        NonFiniteError: a leaf holds NaN or Inf.
        UnknownNameError: no such `order`.
        ConfigError: `max_sweeps` below 1.

    Reference:
        Rinaldi et al. 2025, arXiv:2505.22697, Algorithm 1 and its released code. Attention biases never
        enter a cost, as there. Differs: spectra are taken once, since no permutation changes them.
    """
    if order not in ORDERS:
        raise unknown_name("order", order, ORDERS)
    if max_sweeps < 1:
        raise ConfigError(f"max_sweeps={max_sweeps}: expected at least 1.")
    check_same({"target": target, "source": source})
    spec.check(target)
    check_finite("target", target)
    check_finite("source", source)
    check_orders(spec)
    target, source = ReadOnUse(flatten(target)), ReadOnUse(flatten(source))
    search = _Search(spec, target, source, include_output_spectrum=include_output_spectrum)
    element, phase, num_sweeps, reached_inside = elements.identity(spec), "heads", 0, False
    if repair_start:
        element, search.stale = search.start()
        phase, num_sweeps, reached_inside = "inside", 1, bool(search.heads)

    def has_progressed(gain, size):
        return gain > (1e-6 * abs(size) if repair_tolerance else PUBLISHED_TOLERANCE)

    while num_sweeps < max_sweeps:
        progress, head_progress = False, False
        for name in _ordered(named_key(key, "sweep", num_sweeps), search.blocks, order, repair_backward):
            is_head = name in search.heads and phase == "heads"
            if not is_head and name not in search.stale:
                continue
            if is_head:
                values, gain, size = search.solve_heads(name, element)
                head_progress = has_progressed(gain, size) or (head_progress and repair_phase)
            elif name in search.heads:
                reached_inside = True
                values, gain, size = search.solve_inside(name, element)
            else:
                values, gain, size = search.solve_units(name, element)
            search.stale.discard(name)
            if has_progressed(gain, size):
                element.update(values)
                progress = True
                search.stale |= search.neighbours[name]
        num_sweeps += 1
        if not repair_stop and not progress:
            break
        if phase == "heads" and not head_progress:
            phase = "inside"
            search.stale |= search.heads
        elif not progress:
            break
    else:
        return TransfusionResult(element, False, num_sweeps, reached_inside)
    return TransfusionResult(element, True, num_sweeps, reached_inside)


class _Search:
    """What the loop keeps between visits: spectra, scores, the last assignment, and who must be visited again.

    `neighbours[b]` are the blocks that share a matched leaf with block b. A block outside `stale` was solved with
    every neighbour where it stands now; solving it again would give the same.
    """

    def __init__(self, spec, target, source, *, include_output_spectrum):
        self.spec, self.target, self.source = spec, target, source
        self.blocks = [name for name, group in spec.groups.items() if group.parent is None]
        self.heads = {name for name in self.blocks if spec.children_of(name)}
        self.owners = {
            path: {spec.groups[axis.group].parent or axis.group for axis in axes if axis}
            for path, axes in spec.axes.items()
            if path not in spec.unmatched
        }
        self.neighbours = {
            name: set().union(*(owners for owners in self.owners.values() if name in owners)) - {name}
            for name in self.blocks
        }
        self.stale = set(self.blocks)
        self.spectra = {
            name: spectral_scores(spec, name, target, source, include_output=include_output_spectrum)
            for name in self.heads
        }
        self.tables = {name: UnitTable(spec, name, target, source) for name in self.blocks if name not in self.heads}
        self.standing = {}

    def start(self):
        """(element, blocks to visit again): all heads by their spectra, then one sweep forward from what is known.

        In that sweep a group is solved on those leaves alone whose other axes are known by then. Where that leads
        below where the networks stood, only the order of the heads is kept.
        """
        spec = self.spec
        standing = elements.identity(spec)
        standing |= {name: solve_assignment(spectra) for name, spectra in self.spectra.items()}
        element, known, stale, objective = dict(standing), set(), set(), 0.0
        for name in self.blocks:
            mine = [path for path, owners in self.owners.items() if name in owners]
            usable = {path for path in mine if self.owners[path] - {name} <= known}
            if usable:
                solve = self.solve_inside if name in self.heads else self.solve_units
                values, _, size = solve(name, element, usable)
                element.update(values)
                objective += size  # a leaf counts where the last of its axes is solved, so once
            known.add(name)
            if len(usable) < len(mine):
                stale.add(name)
        return (element, stale) if objective > self._objective(standing) else (standing, self.stale)

    def solve_heads(self, head, element):
        """(new values, gain, size of the sum it is judged by) of the order of heads with the nearest spectra."""
        scores = self.spectra[head]
        new = solve_assignment(scores)
        standing = score_of(scores, element[head])
        return {head: new}, score_of(scores, new) - standing, standing

    def solve_inside(self, head, element, usable=None):
        """The same of the units inside each matched head, biases left out."""
        spec, values, gain, size = self.spec, {}, 0.0, 0.0
        for child in spec.children_of(head):
            scores = np.zeros((spec.groups[head].size, *(spec.groups[child].size,) * 2))
            for path, head_axis, unit_axis in head_leaves(spec, head):
                is_mine = spec.axes[path][unit_axis].group == child and path in (usable or self.owners)
                if is_mine and len(spec.axes[path]) > 2 and path in self.owners:
                    product = slot_scores(
                        spec, element, path, head_axis, unit_axis, self.target[path], self.source[path]
                    )
                    scores += np.asarray(product, np.float64)
            values[child] = solve_assignments(scores)
            size += score_of(scores, values[child]).sum()
            gain += score_of(scores, values[child]).sum() - score_of(scores, element[child]).sum()
        return values, gain, size

    def solve_units(self, name, element, usable=None):
        """The same of the units of a group without heads."""
        paths = [path for path, _ in self.spec.leaves_of(name) if path in (usable or self.owners)]
        scores = self.tables[name].scores(element, paths)
        new, self.standing[name] = solve_assignment_from(scores, self.standing.get(name))
        size = score_of(scores, new)
        return {name: new}, size - score_of(scores, element[name]), size

    def _objective(self, element):
        """Inner product of target and source over the leaves that enter a cost, where nothing but heads moves."""
        total = 0.0
        for path, owners in self.owners.items():
            axes = self.spec.axes[path]
            if len(axes) > 2 or owners - self.heads:
                still = tuple(a for a, axis in enumerate(axes) if axis is None or axis.group not in self.heads)
                moved = elements.apply_to_leaf(self.spec, element, path, self.source[path], skip_axes=still)
                total += float(np.vdot(np.asarray(self.target[path]), np.asarray(moved)))
        return total


def _ordered(key, names, order, repair_backward):
    if order == "random":
        return [names[n] for n in np.asarray(jax.random.permutation(key, len(names)))]
    if order == "backward":
        return names[::-1] if repair_backward else names[:0:-1]
    if order == "alternate":
        pairs = zip(names, reversed(names), strict=True)
        return [name for pair in pairs for name in pair][: len(names)]
    return list(names)
