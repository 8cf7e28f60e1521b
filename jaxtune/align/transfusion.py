"""TransFusion's matching loop: heads by singular values, then the units inside, with its faults as switches.

Kept apart from `align.weights` because it is not a coordinate ascent: the head step minimises a distance
of spectra while every other step maximises an inner product, in two phases that share one loop.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignments
from jaxtune.align.heads import head_leaves, spectral_scores
from jaxtune.align.products import slot_scores, unit_scores
from jaxtune.errors import ConfigError, unknown_name
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

    Raises:
        TreeMismatchError: `target` and `source` differ in a path or a shape.
        SpecError: the trees do not fit `spec`.
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
    target, source = flatten(target), flatten(source)
    blocks = [name for name, group in spec.groups.items() if group.parent is None]
    heads = {name for name in blocks if spec.children_of(name)}
    spectra = {
        name: spectral_scores(spec, name, target, source, include_output=include_output_spectrum) for name in heads
    }
    element, phase, num_sweeps, reached_inside = elements.identity(spec), "heads", 0, False
    neighbours = _neighbours(spec, blocks)
    stale = set(blocks)  # solving a group again whose neighbours stand still gives what it gave before

    def has_progressed(gain, size):
        return gain > (1e-6 * abs(size) if repair_tolerance else PUBLISHED_TOLERANCE)

    while num_sweeps < max_sweeps:
        progress, head_progress = False, False
        for name in _ordered(named_key(key, "sweep", num_sweeps), blocks, order, repair_backward):
            if name in heads and phase == "heads":
                new = solve_assignment(spectra[name])
                gain = score_of(spectra[name], new) - score_of(spectra[name], element[name])
                moved = has_progressed(gain, score_of(spectra[name], element[name]))
                head_progress = moved or (head_progress and repair_phase)
                values = {name: new}
            elif name not in stale:
                continue
            elif name in heads:
                reached_inside = True
                values, gain, size = _solve_inside(spec, name, element, target, source)
                moved = has_progressed(gain, size)
            else:
                scores = np.zeros((spec.groups[name].size,) * 2, np.float32)
                for path, axis in spec.leaves_of(name):
                    if path not in spec.unmatched:
                        scores += np.asarray(unit_scores(spec, element, path, axis, target[path], source[path]))
                new = solve_assignment(scores)
                gain = score_of(scores, new) - score_of(scores, element[name])
                moved = has_progressed(gain, score_of(scores, new))
                values = {name: new}
            stale.discard(name)
            if moved:
                element.update(values)
                progress = True
                stale |= neighbours[name]
        num_sweeps += 1
        if not repair_stop and not progress:
            break
        if phase == "heads" and not head_progress:
            phase = "inside"
            stale |= heads
        elif not progress:
            break
    else:
        return TransfusionResult(element, False, num_sweeps, reached_inside)
    return TransfusionResult(element, True, num_sweeps, reached_inside)


def _neighbours(spec, blocks):
    """Block -> the other blocks that own an axis of one of its matched leaves."""
    near = {name: set() for name in blocks}
    for path, axes in spec.axes.items():
        owners = {spec.groups[axis.group].parent or axis.group for axis in axes if axis}
        if path not in spec.unmatched:
            for name in owners:
                near[name] |= owners - {name}
    return near


def _solve_inside(spec, head, element, target, source):
    """(new values, gain, size of the sum) for the units inside each matched head, biases left out."""
    values, gain, size = {}, 0.0, 0.0
    for child in spec.children_of(head):
        scores = 0.0
        for path, head_axis, unit_axis in head_leaves(spec, head):
            if spec.axes[path][unit_axis].group == child and len(spec.axes[path]) > 2 and path not in spec.unmatched:
                product = slot_scores(spec, element, path, head_axis, unit_axis, target[path], source[path])
                scores = scores + np.asarray(product, np.float64)
        values[child] = solve_assignments(scores)
        size += score_of(scores, values[child]).sum()
        gain += score_of(scores, values[child]).sum() - score_of(scores, element[child]).sum()
    return values, gain, size


def _ordered(key, names, order, repair_backward):
    if order == "random":
        return [names[n] for n in np.asarray(jax.random.permutation(key, len(names)))]
    if order == "backward":
        return names[::-1] if repair_backward else names[:0:-1]
    if order == "alternate":
        pairs = zip(names, reversed(names), strict=True)
        return [name for pair in pairs for name in pair][: len(names)]
    return list(names)
