"""Leaves that are made when they are read: how a model that does not fit into memory goes through the same code.

A `LazyLeaf` knows shape and dtype, and makes its array each time it is asked for; nothing is kept. Trees of lazy
leaves map to trees of lazy leaves, so a task vector of three memory-mapped checkpoints is a recipe until the file is
written, and the peak is a few leaves and not a few models.
"""

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxtune.types import Leaf


class LazyLeaf:
    """An array that is made anew each time it is read; `np.asarray` reads it.

    Attributes:
        shape, dtype: Of the array.
    """

    __slots__ = ("_make", "dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: Any, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._make = tuple(shape), np.dtype(dtype), make

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> "LazyLeaf":
        """The same with its axes in reverse, as lazy as before."""
        return LazyLeaf(self.shape[::-1], self.dtype, lambda: self.read().T)

    def read(self) -> np.ndarray:
        """Makes the array; the caller owns it."""
        array = np.asarray(self._make())
        if array.shape != self.shape or array.dtype != self.dtype:
            raise AssertionError(f"a lazy {self.dtype}{list(self.shape)} became {array.dtype}{list(array.shape)}")
        return array

    def astype(self, dtype: Any, copy: bool = True) -> "LazyLeaf":
        """The same values in another dtype, as lazy as before."""
        return LazyLeaf(self.shape, dtype, lambda: self.read().astype(dtype, copy=copy))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self):
        return f"LazyLeaf({self.dtype}{list(self.shape)})"


class ReadOnUse(Mapping):
    """A flat tree whose lazy leaves become arrays as they are looked up, and are gone when the caller drops them."""

    def __init__(self, leaves: Mapping[str, Leaf]):
        self._leaves = leaves

    def __getitem__(self, path: str) -> Leaf:
        return read(self._leaves[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


def is_lazy(leaf: Leaf) -> bool:
    """Whether a leaf is made when it is read."""
    return isinstance(leaf, LazyLeaf)


def read(leaf: Leaf) -> Leaf:
    """The array of a lazy leaf; any other leaf as it is."""
    return leaf.read() if isinstance(leaf, LazyLeaf) else leaf


def defer(array: np.ndarray) -> LazyLeaf:
    """A view of a mapped file as a lazy leaf: each read is a copy, after which the file's pages are given back."""
    return defer_made(array.shape, array.dtype, lambda: array, [array])


def defer_made(
    shape: tuple[int, ...], dtype: Any, make: Callable[[], np.ndarray], arrays: Iterable[np.ndarray]
) -> LazyLeaf:
    """The same for what `make` makes of several views of mapped files."""

    def copy_and_release():
        made = np.array(make())
        for array in arrays:
            _release(array)
        return made

    return LazyLeaf(shape, dtype, copy_and_release)


def _release(array):
    """Takes the pages behind a view of a read-only mapped file out of this process; they come back when touched."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if not isinstance(mapped, mmap.mmap) or not hasattr(mapped, "madvise") or not array.size:
        return
    origin = np.frombuffer(mapped, np.uint8, count=1).ctypes.data
    low, high = np.lib.array_utils.byte_bounds(array)
    start = (low - origin) // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, high - origin - start)
