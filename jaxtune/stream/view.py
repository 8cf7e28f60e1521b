"""Views of leaves that are read from files, run by run, on the host."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxtune.merge.arrays import RUN, compute_dtype
from jaxtune.merge.random_bits import make_stream
from jaxtune.merge.view import Elements, MadeOnUse, Rank, View
from jaxtune.stream.order import find_rank
from jaxtune.stream.tensors import TensorReader
from jaxtune.types import Leaf

GROUP = 16  # runs that one task of a pool takes: a thread pool costs microseconds a task


class StoredLeaf:
    """One leaf of several models in their files.

    Args:
        name: Of the tensor of the output.
        models: Their readers.
        base: That of the base, or None.
        unit: As `Method.unit`.
        seed: Of random bits.
    """

    def __init__(
        self, name: str, models: Sequence[TensorReader], base: TensorReader | None, *, unit: str, seed: int = 0
    ):
        self.name, self.models, self.base, self.unit = name, tuple(models), base, unit
        self.readers = (*self.models, *(() if base is None else (base,)))
        self.shape, self.size = self.models[0].shape, self.models[0].size
        self.dtype = functools.reduce(np.promote_types, [compute_dtype(reader.dtype) for reader in self.readers])
        self.streams = tuple(make_stream(seed, model, name) for model in range(len(self.models)))
        # Rows of a stored matrix run along its inputs, and lie one after another.
        self.row_length = self.shape[-1] if unit == "row" and self.shape else self.size

    def elements(self, low: int, high: int, *, start: int = 0) -> Elements:
        """Elements `low` to `high`, whole rows where the unit has them; each model is read when it is asked for."""
        shape = {"element": (high - low,), "row": (-1, self.row_length), "leaf": self.shape}[self.unit]

        def read(reader):
            return reader.read(low, high, self.dtype).reshape(shape)

        return Elements(
            xp=np,
            models=MadeOnUse(len(self.models), lambda model: read(self.models[model])),
            base=None if self.base is None else read(self.base),
            start=start + low,
            streams=self.streams,
        )

    def split(self, length: int) -> Iterable[tuple[int, int]]:
        """Runs of about `length` elements, of whole rows, or the whole leaf, as the unit has it."""
        if self.unit == "leaf":
            step = self.size
        else:
            step = length if self.unit == "element" else max(1, length // self.row_length) * self.row_length
        return ((low, min(low + step, self.size)) for low in range(0, self.size, max(1, step)))

    def release(self) -> None:
        """Forgets what was read as a whole."""
        for reader in self.readers:
            reader.release()


class StreamView(View):
    """A view of one stored leaf, or of all that a method looks at together.

    Args:
        leaves: In order.
        map_groups: `map` of a pool of workers, which keeps order.
    """

    def __init__(self, leaves: Sequence[StoredLeaf], map_groups: Callable[..., Iterable] = map):
        first = leaves[0]
        self.name, self.num_models, self.has_base = first.name, len(first.models), first.base is not None
        self.shape = first.shape if len(leaves) == 1 else (sum(leaf.size for leaf in leaves),)
        self.input_axis, self.xp, self._map = -1, np, map_groups
        self._leaves = tuple(leaves)
        self.starts = tuple(np.cumsum([0, *(leaf.size for leaf in leaves)])[:-1].tolist())

    def reduce(self, function: Callable[..., Leaf], *numbers: Any, **constants: Any) -> Leaf:
        """As `View.reduce`."""

        def sum_group(group):
            return [np.asarray(function(run, *numbers, **constants), np.float64) for run in self._read(group)]

        stacked = np.stack([part for parts in self._map(sum_group, self._groups()) for part in parts])
        columns = stacked.reshape(len(stacked), -1).T
        return np.array([math.fsum(column) for column in columns]).reshape(stacked.shape[1:])

    def rank_from_top(self, function: Callable[..., Leaf], count: Any, *numbers: Any, **constants: Any) -> Rank:
        """As `View.rank_from_top`."""

        def values_of(group):
            for run in self._read(group):
                yield run.start, function(run, *numbers, **constants).reshape(-1)

        return find_rank(values_of, self._groups(), self._map, self.size, int(count))

    def _groups(self):
        """Runs as (leaf, low, high), some of them together."""
        runs = [(n, low, high) for n, leaf in enumerate(self._leaves) for low, high in leaf.split(RUN)]
        return [runs[n : n + GROUP] for n in range(0, len(runs), GROUP)]

    def _read(self, group):
        for leaf, low, high in group:
            yield self._leaves[leaf].elements(low, high, start=self.starts[leaf])
