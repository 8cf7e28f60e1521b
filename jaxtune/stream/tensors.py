"""Stored tensors as runs of elements in the dtype of the arithmetic."""

import math
import threading
from typing import Any

import numpy as np

from jaxtune.checkpoint.rounding import round_to_stored
from jaxtune.lazy import is_lazy
from jaxtune.merge.aligned import copy_aligned


class TensorReader:
    """One stored tensor, read a run at a time.

    Args:
        name: For messages.
        leaf: An array, mapped from its file, or a `LazyLeaf`, which is made whole when first read and kept until
            `release`.
        shape: Of the output, which differs from the leaf's in the first axis where there are `rows`.
        dtype: To which stored values are rounded first; None: taken as they are.
        rows: Row of the leaf for each of the output; -1 where it has none.
        filler: Row that stands there: float[...], or one a missing row.
    """

    def __init__(
        self,
        name: str,
        leaf: Any,
        shape: tuple[int, ...],
        *,
        dtype: np.dtype | None = None,
        rows: np.ndarray | None = None,
        filler: np.ndarray | None = None,
    ):
        self.shape, self.size = tuple(shape), math.prod(shape)
        self.stored_dtype = np.dtype(leaf.dtype)
        self._name, self._leaf, self._dtype, self._rows, self._filler = name, leaf, dtype, rows, filler
        self._made, self._lock = None, threading.Lock()
        # Mapped files are of a class of their own, of which every slice takes a microsecond more.
        is_flat = rows is None and isinstance(leaf, np.ndarray) and leaf.flags.c_contiguous
        self._flat = np.asarray(leaf).reshape(-1) if is_flat else None

    @property
    def dtype(self) -> np.dtype:
        """Of the values: as stored, or as the recipe's `dtype` rounds them."""
        return self.stored_dtype if self._dtype is None else np.dtype(self._dtype)

    def as_stored(self) -> "TensorReader":
        """The same tensor, not rounded to the recipe's dtype."""
        return TensorReader(self._name, self._leaf, self.shape, rows=self._rows, filler=self._filler)

    def read(self, low: int, high: int, wide: np.dtype) -> np.ndarray:
        """Elements `low` to `high` of the flattened tensor, in `wide`; the caller owns them."""
        return copy_aligned(self.read_rounded(low, high), wide)

    def read_rounded(self, low: int, high: int) -> np.ndarray:
        """The same, in the dtype that the recipe rounds to; possibly a view of the file."""
        stored = self.read_stored(low, high)
        if stored.dtype == self.dtype:
            return stored
        exact = stored.astype(np.float64 if stored.dtype.itemsize > 4 else np.float32)
        return round_to_stored(self._name, exact, self.dtype)

    def read_stored(self, low: int, high: int) -> np.ndarray:
        """The same, in the stored dtype; possibly a view of the file."""
        if self._flat is not None:
            return self._flat[low:high]
        leaf = self._array()
        if self._rows is None:
            return leaf.reshape(-1)[low:high]
        length = math.prod(self.shape[1:])
        first, last = low // length, -(-high // length)
        wanted = self._rows[first:last]
        block = leaf[np.maximum(wanted, 0)].reshape(len(wanted), -1)
        missing = np.flatnonzero(wanted < 0)
        if missing.size:
            filler = np.zeros((), np.float32) if self._filler is None else np.asarray(self._filler)
            if filler.ndim == len(self.shape):  # one a missing row, in their order
                filler = filler[missing + first - _count_present(self._rows, first, missing)]
                filler = filler.reshape(len(missing), -1)
            block[missing] = filler.reshape(filler.shape[0] if filler.ndim == 2 else 1, -1).astype(block.dtype)
        return block.reshape(-1)[low - first * length : high - first * length]

    def release(self) -> None:
        """Forgets a lazy leaf that was made."""
        self._made = None

    def _array(self):
        if not is_lazy(self._leaf):
            return self._leaf
        with self._lock:
            if self._made is None:
                self._made = self._leaf.read()
            return self._made


def _count_present(rows, first, missing):
    """For each missing row of a block that starts at `first`: how many rows before it the leaf does have."""
    present = np.cumsum(rows >= 0)
    return present[first + missing]
