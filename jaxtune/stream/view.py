"""Views of leaves that are read from files, run by run, on the host."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxtune.merge.arrays import RUN
from jaxtune.merge.view import View, weaken
from jaxtune.stream.leaves import Leaf, split
from jaxtune.stream.order import find_ranks

GROUP = 16  # runs that one task of a pool takes: a thread pool costs microseconds a task


class StreamView(View):
    """A view of one stored leaf, or of all that a method looks at together.

    Args:
        leaves: In order.
        map_groups: `map` of a pool of workers, which keeps order.
    """

    def __init__(self, leaves: Sequence[Leaf], map_groups: Callable[..., Iterable] = map):
        first = leaves[0]
        self.name, self.num_models, self.has_base = first.name, first.num_models, first.has_base
        self.seed = first.seed
        self.extra_shapes = tuple(leaf.extra_shape for leaf in leaves)
        self.shape = first.shape if len(leaves) == 1 else (sum(leaf.size for leaf in leaves),)
        self.input_axis, self.xp, self._map = -1, np, map_groups
        self.unit, self.dtype = first.unit, first.dtype
        self._leaves = tuple(leaves)
        self.starts = tuple(np.cumsum([0, *(leaf.size for leaf in leaves)])[:-1].tolist())

    def reduce(self, function: Callable[..., Any], *numbers: Any, **constants: Any) -> Any:
        """As `View.reduce`."""

        weakened = self._weaken(numbers)

        def sum_group(group):
            return [
                np.asarray(function(run, *weakened[run.dtype], **constants), np.float64) for run in self._read(group)
            ]

        stacked = np.stack([part for parts in self._map(sum_group, self._groups()) for part in parts])
        columns = stacked.reshape(len(stacked), -1).T
        return np.array([math.fsum(column) for column in columns]).reshape(stacked.shape[1:])

    def add_up(self, function: Callable[..., Any], *numbers: Any, num_rows: int, **constants: Any) -> np.ndarray:
        """As `View.add_up`."""
        (leaf,) = self._leaves
        runs = split(leaf, num_rows * leaf.row_length)
        return sum(function(leaf.elements(low, high), *numbers, **constants) for low, high in runs)

    def rank_from_top(self, function: Callable[..., Any], count: Any, *numbers: Any, **constants: Any) -> Any:
        """As `View.rank_from_top`."""

        weakened = self._weaken(numbers)

        def values_of(group):
            for run in self._read(group):
                yield run.start, function(run, *weakened[run.dtype], **constants).reshape(-1)

        counts = [int(one) for one in count] if isinstance(count, tuple) else [int(count)]
        ranks = find_ranks(values_of, self._groups(), self._map, self.size, counts)
        return ranks if isinstance(count, tuple) else ranks[0]

    def _weaken(self, numbers):
        return {leaf.dtype: weaken(numbers, leaf) for leaf in self._leaves}

    def _groups(self):
        """Runs as (leaf, low, high), some of them together."""
        runs = [(n, low, high) for n, leaf in enumerate(self._leaves) for low, high in split(leaf, RUN)]
        return [runs[n : n + GROUP] for n in range(0, len(runs), GROUP)]

    def _read(self, group):
        for leaf, low, high in group:
            yield self._leaves[leaf].elements(low, high, start=self.starts[leaf])
