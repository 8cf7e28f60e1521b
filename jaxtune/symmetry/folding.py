"""Each folded leaf by itself, from the few leaves of the network that lie in it.

A kernel needs the gain of the norm that it reads, a bias the norm's offset and its kernel, an output bias what its
attention's value bias writes. So a network that does not fit into memory is folded as it is read.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxtune.errors import SpecError
from jaxtune.lazy import read
from jaxtune.symmetry.form import Form
from jaxtune.tree import is_float
from jaxtune.types import Leaf

# Of a leaf that is in float64 at any time, where it can be cut.
PART_VALUES = 1 << 22


class Places:
    """What a form says about each leaf: by path, where `Form` lists it by layer.

    Attributes:
        reads: Kernel -> (norm, reader).
        takes_offset: Bias of a reader -> (norm, reader), where the norm's offset moves into it.
        keeps_offset: Offset that stays -> its norm.
        branches: Leaf that writes behind a branch gain -> the gain.
        attentions: Output bias -> its attention.
        entries: Gain of an entry norm -> the norm.
        centred: Leaves that write the stream, where its mean is never seen.
    """

    def __init__(self, form: Form):
        pairs = [(norm, reader) for norm in form.norms for reader in norm.readers]
        self.reads = {reader.kernel: (norm, reader) for norm, reader in pairs}
        self.takes_offset = {
            reader.bias: (norm, reader) for norm, reader in pairs if norm.bias is not None and not norm.keeps_offset
        }
        self.keeps_offset = {norm.bias: norm for norm in form.norms if norm.keeps_offset}
        self.branches = {path: branch.scale for branch in form.gains for path in branch.writers}
        self.attentions = {attention.out_bias: attention for attention in form.attentions}
        self.entries = {entry.scale: entry for entry in form.entries}
        written = {*form.writers, *(path for entry in form.entries for path in (entry.scale, entry.bias))}
        self.centred = frozenset(written) if form.is_centred else frozenset()


class Network:
    """Leaves of one network, read one at a time, and what its norms multiply by."""

    def __init__(self, leaves: Mapping[str, Leaf]):
        self.leaves = leaves

    def __getitem__(self, path: str) -> np.ndarray:
        return np.asarray(read(self.leaves[path]))

    def vector(self, path: str) -> np.ndarray:
        """A small leaf in float64."""
        return np.asarray(self[path], np.float64)

    def gain(self, norm) -> np.ndarray:
        """What a norm or an entry norm multiplies by, in float64."""
        return 1.0 + self.vector(norm.scale) if norm.counts_from_one else self.vector(norm.scale)


class Folding:
    """The folded leaves of one network, each made from what lies in it when it is asked for.

    All is computed in float64, a large leaf part by part, and rounded to `dtype`.
    """

    def __init__(self, form: Form, leaves: Mapping[str, Leaf], dtype: type):
        self._form, self._places, self._own, self._dtype = form, Places(form), Network(leaves), dtype

    def check_gains(self) -> None:
        """Raises `SpecError` where an offset that stays would be divided by a gain of zero."""
        for norm in self._places.keeps_offset.values():
            if (np.abs(self._own.gain(norm)) < np.finfo(np.float32).tiny).any():
                raise SpecError(f"{norm.scale}: a gain of zero before {norm.readers[0].kernel}, which has no bias.")

    def paths(self) -> list[str]:
        """Of all folded leaves."""
        readouts = [self._form.tie.readout] if self._form.tie is not None else []
        return [path for path in self._own.leaves if path not in self._form.dropped] + readouts

    def kind_of(self, path: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of a folded leaf, without making it."""
        is_readout = self._is_readout(path)
        stored = self._own.leaves[self._form.tie.table if is_readout else path]
        shape = tuple(stored.shape[::-1] if is_readout else stored.shape)
        if path in self._places.entries:
            shape *= 2
        return shape, np.dtype(self._dtype if is_float(stored) else stored.dtype)

    def leaf(self, path: str) -> np.ndarray:
        """The folded leaf."""
        return self._make(path, is_centred=path in self._places.centred)

    def _make(self, path, *, is_centred):
        places = self._places
        own = self._stored(path)
        if not is_float(own):
            return own
        if path in places.entries:
            own, kept = np.diag(self._own.gain(places.entries[path])), {1}
        else:
            kept = {own.ndim - 1} if path in places.branches or is_centred else set()
        norm, reader = places.reads.get(path, (None, None))
        gain = branch = None
        if norm is not None:
            gain = along(self._own.gain(norm), own, reader.axis)
            kept |= {reader.axis}
        if path in places.branches:
            branch = along(self._own.vector(places.branches[path]), own, own.ndim - 1)
        drops_mean = norm is not None and self._drops_mean(norm, path)
        before, after = self._read_into(path), self._written_into(path)
        result = np.empty(own.shape, self._dtype)
        for part in parts_of(own.shape, kept):
            piece = np.array(own[part], np.float64, order="C")
            if before is not None:
                piece += before
            if path in places.keeps_offset:
                piece /= self._own.gain(places.keeps_offset[path])
            if gain is not None:
                piece *= gain
            if drops_mean:
                piece -= piece.mean(axis=reader.axis, keepdims=True)
            if branch is not None:
                piece *= branch
            if after is not None:
                piece += after
            if is_centred:
                piece -= piece.mean(axis=-1, keepdims=True)
            result[part] = piece
        return result

    def _drops_mean(self, norm, kernel):
        """What is read has mean zero, so the mean row of a reader is never seen.

        A tied one keeps it: it is all that is left of the mean of the table's rows.
        """
        return self._form.is_centred and not norm.keeps_offset and not self._is_readout(kernel)

    def _read_into(self, path):
        """What a reader's bias takes of its norm's offset; None for other leaves."""
        if path not in self._places.takes_offset:
            return None
        norm, reader = self._places.takes_offset[path]
        return read_constant(self._own.vector(norm.bias), self._stored(reader.kernel), reader.axis)

    def _written_into(self, path):
        """What an output bias takes of its attention's value bias; None for other leaves."""
        if path not in self._places.attentions:
            return None
        attention = self._places.attentions[path]
        values, kernel = (self._make(leaf, is_centred=False) for leaf in (attention.v_bias, attention.out_kernel))
        return write_constant(values, kernel)

    def _stored(self, path):
        """A leaf of the network; of a tied readout, the table as a reader sees it."""
        return self._own[self._form.tie.table].T if self._is_readout(path) else self._own[path]

    def _is_readout(self, path):
        return self._form.tie is not None and path == self._form.tie.readout


def parts_of(shape: tuple[int, ...], kept: set[int]) -> Iterator[tuple[slice, ...]]:
    """Indices that cut an array along its longest axis but those of `kept`; one that takes it whole where it is small.

    The cuts depend on the shape alone, so that results do not depend on who asks.
    """
    size, free = math.prod(shape), [axis for axis in range(len(shape)) if axis not in kept]
    if size <= PART_VALUES or not free:
        yield ()
        return
    axis = max(free, key=lambda axis: shape[axis])
    step = max(1, PART_VALUES * shape[axis] // size)
    for start in range(0, shape[axis], step):
        yield (slice(None),) * axis + (slice(start, start + step),)


def along(vector: np.ndarray, kernel: Leaf, axis: int) -> np.ndarray:
    """A vector over one axis of a kernel, ready to multiply it."""
    return vector.reshape([-1 if position == axis else 1 for position in range(kernel.ndim)])


def read_constant(vector: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    """What a kernel makes of a constant stream, in float64."""
    moved = np.moveaxis(kernel, axis, 0)
    result = np.empty(moved.shape[1:])
    for part in parts_of(moved.shape, {0}):
        result[part[1:]] = np.tensordot(vector, np.array(moved[part], np.float64, order="C"), axes=1)
    return result


def write_constant(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """What an output kernel [heads, (queries,) units, width] makes of constant values [heads, units], in float64."""
    values, kernel = (np.array(leaf, np.float64, order="C") for leaf in (values, kernel))
    if kernel.ndim == 4:
        return np.einsum("gu,gquw->w", values, kernel)
    return np.tensordot(values, kernel, axes=2)
