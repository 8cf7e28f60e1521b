"""Batches of a source in a seeded order, made ahead of time, with a position that can be saved.

Grain does the same and much more; it is an optional extra here (`tfds`), and arrays in memory and drawn glyphs
need one thread and a position of two numbers. A `DataSource` has the methods grain asks of one, so
`grain.MapDataset.source(source)` stands open to who wants worker processes.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxtune.data.source import DataSource
from jaxtune.errors import DataError

Batch = dict[str, np.ndarray]


class Loader:
    """Iterates over the batches of a source, from wherever it stands.

    The order of epoch e is a function of (seed, e, number of records) alone, so going on from a saved position
    gives the same batches, bit for bit, as never having stopped. A loader is one pass, like a file: iterating
    over it again goes on behind the last batch handed out, and after the last epoch there is nothing more.

    Args:
        source: Where records come from.
        batch_size: Records per batch, of all devices together; the trainer spreads them.
        seed: Of the order.
        shuffle: Whether records come in a new order every epoch, or in their own.
        maps: Applied to each batch in turn, `map(batch, indices) -> batch`, `indices` being the records' numbers.
        num_epochs: None goes on without end.
        drop_remainder: Whether the records that fill no batch are left out of their epoch; else the last
            batch of an epoch is smaller.
        prefetch: Batches made ahead by a background thread; 0 makes them in the caller's, when asked for.

    Raises:
        DataError: the source is empty, a number is out of range, or no batch would ever come.
    """

    def __init__(
        self,
        source: DataSource,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        maps: Sequence[Callable[[Batch, np.ndarray], Batch]] = (),
        num_epochs: int | None = None,
        drop_remainder: bool = True,
        prefetch: int = 2,
    ):
        where = f"{source.name} ({source.split})"
        if not len(source):
            raise DataError(f"{where}: there are no records to load.")
        if batch_size < 1 or prefetch < 0 or (num_epochs is not None and num_epochs < 1):
            raise DataError(
                f"{where}: batch_size {batch_size} and num_epochs {num_epochs} must be at least 1, "
                f"prefetch {prefetch} at least 0."
            )
        if drop_remainder and batch_size > len(source):
            raise DataError(
                f"{where}: batch_size {batch_size} exceeds its {len(source)} records, so no batch would ever be full. "
                "Lower batch_size, or set drop_remainder=False."
            )
        self.batch_size = batch_size
        self._source, self._maps, self._prefetch = source, tuple(maps), prefetch
        self._seed, self._is_shuffled = seed, shuffle
        self._num_batches = len(source) // batch_size if drop_remainder else -(-len(source) // batch_size)
        self._end = None if num_epochs is None else num_epochs * self._num_batches
        self._position = 0  # number of the next batch, counted through all epochs
        self._order = (-1, np.arange(0))  # of the epoch last used

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from the position; one iterator at a time. An error in the source or a map comes out here."""
        start = self._position
        positions = itertools.count(start) if self._end is None else iter(range(start, self._end))
        if self._prefetch:
            batches = _run_ahead(self._make_batch, positions, self._prefetch)
        else:
            batches = (self._make_batch(position) for position in positions)
        with contextlib.closing(batches):
            for position, batch in enumerate(batches, start):
                if self._position != position:
                    raise RuntimeError("the loader was moved by restore() or by another iterator; call iter() again.")
                self._position = position + 1
                yield batch

    def state(self) -> dict[str, int]:
        """Position of the next batch not yet handed out, with what it is only valid for."""
        epoch, batch = divmod(self._position, self._num_batches)
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a position that `state()` gave; iterators made before end with a RuntimeError.

        Raises:
            DataError: it is the position of a loader with another order, so the batches would not be the same ones.
        """
        ours = {**self._identity(), "epoch": None, "batch": None}
        if state.keys() != ours.keys():
            raise DataError(f"{self._source.name}: not a state of a loader: {dict(state)}.")
        lines = [
            f"{key} was {state[key]}, is {value}" for key, value in self._identity().items() if int(state[key]) != value
        ]
        if lines:
            raise DataError(
                f"{self._source.name} ({self._source.split}): the saved position is one of another order of batches: "
                f"{'; '.join(lines)}. Give the loader the same source and arguments, or start from the beginning."
            )
        self._position = int(state["epoch"]) * self._num_batches + int(state["batch"])

    def _identity(self):
        return {
            "seed": int(self._seed),
            "shuffle": int(self._is_shuffled),
            "num_records": len(self._source),
            "batch_size": self.batch_size,
            "num_batches": self._num_batches,
        }

    def _make_batch(self, position):
        epoch, batch = divmod(position, self._num_batches)
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        indices = self._order[1][batch * self.batch_size : (batch + 1) * self.batch_size]
        made: Any = self._source.__getitems__(indices)
        for change in self._maps:
            made = change(made, indices)
        return made

    def _order_of(self, epoch):
        """int64[num_records]. Sorted raw words: NumPy promises a bit generator's stream, not `permutation`'s."""
        if not self._is_shuffled:
            return np.arange(len(self._source))
        words = np.random.Philox(key=np.array([self._seed % 2**64, epoch], np.uint64)).random_raw(len(self._source))
        return np.argsort(words, kind="stable")


def _run_ahead(function: Callable[[int], Batch], arguments: Iterable[int], depth: int) -> Iterator[Batch]:
    """`map(function, arguments)` in a thread that is up to `depth` results ahead; it ends when this is closed."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxtune-loader")
    try:
        waiting = deque(executor.submit(function, argument) for argument in itertools.islice(arguments, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(executor.submit(function, argument) for argument in itertools.islice(arguments, 1))
            yield result
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
