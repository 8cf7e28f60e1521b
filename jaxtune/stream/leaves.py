"""What a tensor of the output is made of: stored tensors of several models, and what a post-step adds to them."""

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from jaxtune.merge.aligned import copy_aligned
from jaxtune.merge.arrays import RUN, compute_dtype
from jaxtune.merge.random_bits import make_stream
from jaxtune.merge.view import Combine, Elements, MadeOnUse
from jaxtune.stream.tensors import TensorReader

MOST_REMEMBERED = 1 << 28  # bits of masks a leaf
GRAINS = ("element", "row", "leaf")  # from the finest: what can be merged by itself


class StoredElements(Elements):
    """Elements of which the base, like each model, is read when it is asked for."""

    def __init__(self, *, dtype: np.dtype, **fields):
        super().__init__(**fields)
        object.__setattr__(self, "_dtype", dtype)

    @property
    def dtype(self):
        """As `Elements.dtype`; nothing is read for it."""
        return self._dtype

    def own_base(self):
        """As `Elements.own_base`."""
        return self._read_base() if self._base is None else copy_aligned(self._base, self._dtype)

    @property
    def base(self):
        """As `Elements.base`."""
        if self._base is None and self._read_base is not None:
            object.__setattr__(self, "_base", self._read_base())
        return self._base

    @base.setter
    def base(self, read):
        object.__setattr__(self, "_base", None)
        object.__setattr__(self, "_read_base", read)


class StoredLeaf:
    """One leaf of several models in their files.

    Args:
        name: Of the tensor of the output.
        models: Their readers.
        base: That of the base, or None.
        unit: As `Method.unit`.
        seed: Of random bits.
        extras: What the method needs beside each model, or None.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[TensorReader],
        base: TensorReader | None,
        *,
        unit: str,
        seed: int = 0,
        extras: Sequence[np.ndarray] | None = None,
    ):
        self.name, self.models, self.base, self.unit, self.seed = name, tuple(models), base, unit, seed
        self.readers = (*self.models, *(() if base is None else (base,)))
        self.num_models, self.has_base = len(self.models), base is not None
        self.extra_shape = None if extras is None else tuple(extras[0].shape)
        self._extras = extras
        self.shape, self.size = self.models[0].shape, self.models[0].size
        self.dtype = functools.reduce(np.promote_types, [compute_dtype(reader.dtype) for reader in self.readers])
        self.streams = tuple(make_stream(seed, model, name) for model in range(len(self.models)))
        self.grain, self.row_length = unit, _row_length(self.shape, unit)
        # Masks that a method needs in two passes, a bit each.
        self._memos = {} if self.size * self.num_models <= MOST_REMEMBERED else None

    def elements(self, low: int, high: int, *, start: int = 0) -> Elements:
        """Elements `low` to `high`, whole rows where the unit has them; each model is read when it is asked for."""
        shape = shape_of_run(self, low, high)

        def read(reader):
            return reader.read(low, high, self.dtype).reshape(shape)

        return StoredElements(
            dtype=self.dtype,
            xp=np,
            models=MadeOnUse(len(self.models), lambda model: read(self.models[model])),
            base=None if self.base is None else lambda: read(self.base),
            start=start + low,
            streams=self.streams,
            extras=self._read_extras(low, high, shape),
            memo=None if self._memos is None else self._memos.setdefault((low, high), {}),
        )

    def release(self) -> None:
        """Forgets what was read as a whole."""
        for reader in self.readers:
            reader.release()
        self._memos = None

    def _read_extras(self, low, high, shape):
        if self._extras is None:
            return None
        if self.unit == "leaf":  # of any shape
            return tuple(np.asarray(extra, self.dtype) for extra in self._extras)
        return tuple(np.asarray(extra.reshape(-1)[low:high], self.dtype).reshape(shape) for extra in self._extras)


class SteppedLeaf:
    """A merged leaf as the one model of a post-step, beside the base.

    Args:
        before: The leaf that was merged.
        combine: What the method, or the step before, makes of it.
        base: Reader of the base.
        unit: As the step has it.
    """

    num_models, has_base, extra_shape = 1, True, None

    def __init__(self, before: "StoredLeaf | SteppedLeaf", combine: Combine, base: TensorReader, *, unit: str):
        self.name, self.shape, self.size, self.unit = before.name, before.shape, before.size, unit
        self.readers, self.streams, self.seed = before.readers, before.streams, before.seed
        self.dtype = np.promote_types(before.dtype, compute_dtype(base.dtype))
        self.grain = max(before.grain, unit, key=GRAINS.index)
        self.row_length = _row_length(self.shape, self.grain)
        self.before, self.combine, self.base = before, combine, base

    def elements(self, low: int, high: int, *, start: int = 0) -> Elements:
        """As `StoredLeaf.elements`; the run is merged when it is asked for."""
        shape = shape_of_run(self, low, high)

        def merge(_):
            merged = self.combine(self.before.elements(low, high, start=start))
            return merged.astype(self.dtype, copy=False).reshape(shape)

        base = self.base.read(low, high, self.dtype).reshape(shape)
        return Elements(xp=np, models=MadeOnUse(1, merge), base=base, start=start + low, streams=self.streams[:1])

    def release(self) -> None:
        """Forgets what was read as a whole."""
        self.base.release()
        self.before.release()


Leaf = StoredLeaf | SteppedLeaf


def split(leaf: Leaf, length: int, low: int = 0, high: int | None = None) -> Iterable[tuple[int, int]]:
    """Runs of about `length` elements, of whole rows, or the whole leaf, as its grain has it.

    Long ones are made of those of `RUN`, so that masks which were kept in one pass are found in the next.
    """
    high = leaf.size if high is None else high
    if leaf.grain == "leaf":
        step = leaf.size
    elif leaf.grain == "element":
        step = length
    else:
        times = max(1, length // RUN)
        step = max(1, length // times // max(1, leaf.row_length)) * leaf.row_length * times
    return [(first, min(first + step, high)) for first in range(low, high, max(1, step))]


def shape_of_run(leaf: Leaf, low: int, high: int) -> tuple[int, ...]:
    """Shape of the arrays of a run, see `Elements`."""
    if leaf.unit == "leaf":
        return leaf.shape
    return (high - low,) if leaf.unit == "element" else (-1, leaf.shape[-1] if leaf.shape else 1)


def _row_length(shape, grain):
    """Rows of a stored matrix run along its inputs, and lie one after another."""
    return shape[-1] if grain == "row" and shape else math.prod(shape)
