"""The exact element at a rank among values that are too many to sort: a sketch, and a pass that makes it exact."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxtune.merge.view import Rank

SAMPLE = 1 << 20  # values of the sketch
SLACK = 8.0  # half the width of the bracket, in standard deviations of a rank among independent draws
MAX_KEPT = 1 << 22  # values strictly inside a bracket that are kept and sorted

# (place of the run's first value, its values), run by run.
Runs = Iterable[tuple[int, np.ndarray]]


@dataclass
class _Pass:
    """What one pass found out about a bracket, in one group of runs: how many values lie where, and those inside."""

    above: int = 0
    at_high: int = 0
    at_low: int = 0
    num_inside: int = 0
    inside: list = field(default_factory=list)
    places: list = field(default_factory=list)


def find_rank(
    values_of: Callable[[Sequence], Runs],
    groups: Sequence[Sequence],
    map_groups: Callable[..., Iterable],
    size: int,
    count: int,
) -> Rank:
    """The `count` largest of many values >= 0, equal ones by place; exact.

    A bracket is drawn around the rank from a sample. One pass counts what lies above it and keeps what lies inside.
    Where that does not settle it (the sample misled, or one value fills the bracket, as differences of bfloat16 have
    it) a single value of the sample is tried, which settles it or halves what is left.

    Args:
        values_of: Runs -> their values.
        groups: All runs in order, some of them together.
        map_groups: `map`, possibly of a pool.
        size: Number of values.
        count: Of the largest that are wanted.
    """
    if count <= 0:
        return Rank(np.inf, -1)
    if count >= size:
        return Rank(-1.0, -1)
    sample = _draw_sample(values_of, groups, size)
    value_of = sample.dtype.type
    low, high = _draw_bracket(sample, count / size)
    bounds = (-1.0, np.inf)  # the value at the rank lies between them, or is the lower one
    while True:
        passed = list(map_groups(lambda group, ends=(low, high): _count(values_of(group), *ends), groups))
        above = sum(one.above for one in passed)
        at_high = above + sum(one.at_high for one in passed)
        inside = at_high + sum(one.num_inside for one in passed)
        at_low = inside + sum(one.at_low for one in passed)
        if count <= above:
            bounds = (high, bounds[1])
        elif count <= at_high:
            return Rank(
                value_of(high), _place_of_equal(values_of, groups, [p.at_high for p in passed], high, count - above)
            )
        elif count <= inside:
            if inside - at_high <= MAX_KEPT:
                return _sort_inside(passed, count - at_high)
            bounds = (low, high)
        elif count <= at_low:
            return Rank(
                value_of(low), _place_of_equal(values_of, groups, [p.at_low for p in passed], low, count - inside)
            )
        else:
            bounds = (bounds[0], low)
        low = high = _choose_between(values_of, groups, sample, bounds)


def _draw_sample(values_of, groups, size):
    """Values of evenly spaced runs, from the largest down."""
    first = sum(len(values) for _, values in values_of(groups[0][:1]))
    wanted = max(1, SAMPLE // max(1, first))  # runs
    runs = [run for group in groups for run in group]
    chosen = runs[:: max(1, len(runs) // wanted)]
    step = max(1, size // SAMPLE) if len(runs) <= wanted else 1
    return np.sort(np.concatenate([values[::step] for _, values in values_of(chosen)]))[::-1]


def _draw_bracket(sample, share):
    """Two values between which the one at the rank almost surely lies; one value where it is that of many."""
    n = len(sample)
    slack = SLACK * np.sqrt(n * share * (1 - share)) + 4  # runs are no independent draws: neighbours are alike
    first, last = int(share * n - slack), int(np.ceil(share * n + slack))
    high = float(sample[first]) if first >= 0 else np.inf
    low = float(sample[last]) if last < n else -1.0
    between = sample[max(first, 0) : last + 1]
    if len(between) > 8 * len(np.unique(between)):
        low = high = float(sample[min(int(share * n), n - 1)])
    return low, high


def _count(runs, low, high):
    result = _Pass()
    for start, values in runs:
        is_above = values > high
        result.above += int(np.count_nonzero(is_above))
        places = np.flatnonzero(np.greater(values >= low, is_above))  # from low to high, both included
        middle = values[places]
        at_high, at_low = middle == high, middle == low
        result.at_high += int(np.count_nonzero(at_high))
        if low == high:
            continue
        result.at_low += int(np.count_nonzero(at_low))
        is_inside = ~(at_high | at_low)
        result.inside.append(middle[is_inside])
        result.places.append(places[is_inside] + start)
        result.num_inside += len(result.inside[-1])
        if result.num_inside > MAX_KEPT:
            result.inside, result.places = [], []
    return result


def _sort_inside(passed, within):
    values = np.concatenate([part for one in passed for part in one.inside])
    places = np.concatenate([part for one in passed for part in one.places])
    order = np.lexsort((places, -values))
    return Rank(values[order[within - 1]], int(places[order[within - 1]]))


def _place_of_equal(values_of, groups, counts, value, number):
    """Place of the `number`-th value that equals `value`, given how many each group has."""
    before = np.cumsum(counts)
    group = int(np.searchsorted(before, number))
    number -= int(before[group]) - counts[group]
    for start, values in values_of(groups[group]):
        places = np.flatnonzero(values == value)
        if number <= len(places):
            return int(places[number - 1]) + start
        number -= len(places)
    raise AssertionError("a group has fewer values of a kind than it had a pass ago")


def _choose_between(values_of, groups, sample, bounds):
    """A value of the sample strictly between two others, the middle one; of all values where the sample has none."""
    low, high = bounds
    between = sample[(sample > low) & (sample < high)]
    if len(between):
        return float(between[len(between) // 2])
    for group in groups:
        for _, values in values_of(group):
            between = values[(values > low) & (values < high)]
            if len(between):
                return float(between[0])
    return float(max(low, 0.0))  # nothing lies between: the lower bound it is
