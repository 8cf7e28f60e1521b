"""Exact elements at ranks among values that are too many to sort: a sketch, and a pass that makes it exact."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxtune.merge.view import Rank

SAMPLE = 1 << 20  # values of the sketch, at most
SHARE = 64  # values that one of the sketch stands for
SLACK = 8.0  # half the width of the bracket, in standard deviations of a rank among independent draws
MAX_KEPT = 1 << 22  # values strictly inside a bracket that are kept and sorted

# (place of the run's first value, its values), run by run.
Runs = Iterable[tuple[int, np.ndarray]]


@dataclass
class _Search:
    """One rank that is looked for: it lies from `low` to `high`, or else anywhere between the two of `bounds`."""

    count: int
    low: float
    high: float
    bounds: tuple[float, float] = (-1.0, np.inf)


@dataclass
class _Pass:
    """What one pass found out about a bracket, in one group of runs: how many values lie where, and those inside."""

    above: int = 0
    at_high: int = 0
    at_low: int = 0
    num_inside: int = 0
    inside: list = field(default_factory=list)
    places: list = field(default_factory=list)


def find_ranks(
    values_of: Callable[[Sequence], Runs],
    groups: Sequence[Sequence],
    map_groups: Callable[..., Iterable],
    size: int,
    counts: Sequence[int],
) -> tuple[Rank, ...]:
    """For each count: so many largest of many values >= 0, equal ones by place; exact.

    A bracket is drawn around the rank from a sample. One pass counts what lies above it and keeps what lies inside.
    Where that does not settle it (the sample misled, or one value fills the bracket, as differences of bfloat16 have
    it) a single value of the sample is tried, which settles it or halves what is left. All ranks share the passes.

    Args:
        values_of: Runs -> their values.
        groups: All runs in order, some of them together.
        map_groups: `map`, possibly of a pool.
        size: Number of values.
        counts: Of the largest that are wanted.
    """
    found: dict[int, Rank] = {}
    for n, count in enumerate(counts):
        if count <= 0 or count >= size:
            found[n] = Rank(np.inf if count <= 0 else -1.0, -1)
    if len(found) < len(counts):
        sample = _draw_sample(values_of, groups, size)
        searches = {
            n: _Search(count, *_draw_bracket(sample, size, count)) for n, count in enumerate(counts) if n not in found
        }
    while len(found) < len(counts):
        brackets = [(one.low, one.high) for one in searches.values()]
        passed = list(map_groups(lambda group, ends=brackets: _count(values_of(group), ends), groups))
        for n, results in zip(list(searches), zip(*passed, strict=True), strict=True):
            rank = _settle(searches[n], results, values_of, groups, sample)
            if rank is not None:
                found[n] = rank
                del searches[n]
    return tuple(found[n] for n in range(len(counts)))


def _settle(search, passed, values_of, groups, sample):
    """The rank where a pass tells; else None, and the search goes on with another bracket."""
    count, low, high = search.count, search.low, search.high
    value_of = sample.dtype.type
    above = sum(one.above for one in passed)
    at_high = above + sum(one.at_high for one in passed)
    inside = at_high + sum(one.num_inside for one in passed)
    at_low = inside + sum(one.at_low for one in passed)
    if count <= above:
        search.bounds = (high, search.bounds[1])
    elif count <= at_high:
        place = _place_of_equal(values_of, groups, [one.at_high for one in passed], high, count - above)
        return Rank(value_of(high), place)
    elif count <= inside:
        if inside - at_high <= MAX_KEPT:
            return _select_inside(passed, count - at_high)
        search.bounds = (low, high)
    elif count <= at_low:
        place = _place_of_equal(values_of, groups, [one.at_low for one in passed], low, count - inside)
        return Rank(value_of(low), place)
    else:
        search.bounds = (search.bounds[0], low)
    search.low = search.high = _choose_between(values_of, groups, sample, search.bounds)
    return None


def _draw_sample(values_of, groups, size):
    """Values of evenly spaced runs, from the largest down."""
    first = sum(len(values) for _, values in values_of(groups[0][:1]))
    wanted_values = min(SAMPLE, max(size // SHARE, 1 << 14))
    wanted = max(1, wanted_values // max(1, first))  # runs
    runs = [run for group in groups for run in group]
    chosen = runs[:: max(1, len(runs) // wanted)]
    step = max(1, len(chosen) * first // wanted_values)
    return np.sort(np.concatenate([values[::step] for _, values in values_of(chosen)]))[::-1]


def _draw_bracket(sample, size, count):
    """Two values between which the one at the rank almost surely lies; one value where too many lie between."""
    n, share = len(sample), count / size
    slack = SLACK * np.sqrt(n * share * (1 - share)) + 4  # runs are no independent draws: neighbours are alike
    first, last = int(share * n - slack), int(np.ceil(share * n + slack))
    high = float(sample[first]) if first >= 0 else np.inf
    low = float(sample[last]) if last < n else -1.0
    between = sample[max(first, 0) : last + 1]
    if np.count_nonzero((between > low) & (between < high)) * (size / n) > MAX_KEPT:
        low = high = float(sample[min(int(share * n), n - 1)])
    return low, high


def _count(runs, brackets):
    results = [_Pass() for _ in brackets]
    for start, values in runs:
        for result, (low, high) in zip(results, brackets, strict=True):
            _count_run(result, start, values, low, high)
    return results


def _count_run(result, start, values, low, high):
    is_above = values > high
    result.above += int(np.count_nonzero(is_above))
    if low == high:
        result.at_high += int(np.count_nonzero(values == high))
        return
    places = np.flatnonzero(np.greater(values >= low, is_above))  # from low to high, both included
    middle = values[places]
    at_high, at_low = middle == high, middle == low
    result.at_high += int(np.count_nonzero(at_high))
    result.at_low += int(np.count_nonzero(at_low))
    is_inside = ~(at_high | at_low)
    result.num_inside += int(np.count_nonzero(is_inside))
    if result.num_inside > MAX_KEPT:
        result.inside, result.places = [], []
    else:
        result.inside.append(middle[is_inside])
        result.places.append(places[is_inside] + start)


def _select_inside(passed, within):
    """The `within`-th largest of the values that were kept, equal ones by place."""
    values = np.concatenate([part for one in passed for part in one.inside])
    places = np.concatenate([part for one in passed for part in one.places])  # rising
    value = np.partition(values, len(values) - within)[len(values) - within]
    equal = within - int(np.count_nonzero(values > value))
    return Rank(value, int(places[np.flatnonzero(values == value)[equal - 1]]))


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
