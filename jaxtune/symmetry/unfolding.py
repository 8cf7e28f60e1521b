"""Each leaf of a change by itself, from a change of folded weights: the way back of `symmetry.folding`."""

from collections.abc import Mapping

import numpy as np

from jaxtune.lazy import read
from jaxtune.symmetry.folding import Network, Places, along, parts_of, read_constant, write_constant
from jaxtune.symmetry.form import Form
from jaxtune.symmetry.tied import Gain, Wishes, fit_gain, fit_rows, sample_rows
from jaxtune.tree import is_float
from jaxtune.types import Leaf

# A gain below this share of the norm's median gain would blow up what is divided by it.
GAIN_FLOOR = 0.05


class Unfolding:
    """The change of a network's own leaves that a change of its folded ones asks for, leaf by leaf.

    Computed in float64, a large leaf part by part, and rounded to `dtype`.
    """

    def __init__(self, form: Form, change: Mapping[str, Leaf], leaves: Mapping[str, Leaf], dtype: type):
        """
        Args:
            form: Of the network.
            change: Flat difference of two folded trees.
            leaves: Flat tree of the network that takes the change.
            dtype: Of the result.
        """
        self._form, self._places, self._dtype = form, Places(form), dtype
        self._change, self._own = change, Network(leaves)
        self._hidden = {attention.k_bias for attention in form.attentions}  # no output can see them
        self._tied_gain: Gain | None = None

    def dtype_of(self, path: str) -> np.dtype:
        """Dtype of a leaf of the result, without making it."""
        stored = self._own.leaves[path]
        return np.dtype(self._dtype if is_float(stored) else stored.dtype)

    def leaf(self, path: str) -> np.ndarray:
        """The change of one leaf."""
        tie, stored = self._form.tie, self._own.leaves[path]
        if not is_float(stored):
            return np.zeros(stored.shape, stored.dtype)
        if path in self._places.entries:
            return self._diagonal(path)[0].astype(self._dtype)
        if tie is not None and path == tie.table:
            return self._table()
        if tie is not None and path == tie.scale:
            return (self._gain_of_readout().gain - self._gain_before_readout()).astype(self._dtype)
        if path in self._places.keeps_offset:
            return self._offset(path).astype(self._dtype)
        return self._divided(path)

    def lost(self) -> dict[str, float]:
        """Share of the folded change (in norm) that the network's own form cannot hold, by leaf; reads only those."""
        lost = {path: self._diagonal(path)[1] for path in self._places.entries}
        if self._form.tie is not None:
            lost |= self._lost_of_tie()
        for path in (*self._places.reads, *self._places.branches):
            is_tied = self._form.tie is not None and path == self._form.tie.readout
            if not is_tied and any((divisor != gain).any() for gain, divisor, _ in self._factors(path)):
                lost[path] = self._lost_of_gains(path)
        return lost

    def _changed(self, path):
        return np.asarray(read(self._change[path]))

    def _diagonal(self, path):
        """(the diagonal that comes closest, row by row, to a wanted matrix; the share that it misses)."""
        wanted = np.asarray(self._changed(path), np.float64)
        centring = np.eye(len(wanted)) - (1 / len(wanted) if self._form.is_centred else 0.0)
        found = np.sum(centring * wanted, axis=1) / np.sum(centring**2, axis=1)
        sizes = (float(np.linalg.norm(some)) for some in (wanted - found[:, None] * centring, wanted))
        return found, _share(*sizes)

    def _offset(self, path):
        """Of an offset that stays: divided by its gain when folded, and the gain before a tied readout changes."""
        norm = self._places.keeps_offset[path]
        gain, new_gain = self._own.gain(norm), self._own.gain(norm)
        if self._form.tie is not None and norm.scale == self._form.tie.scale:
            new_gain = new_gain + self.leaf(norm.scale)
        return new_gain * self._changed(path) + self._own.vector(path) * ((new_gain - gain) / gain)

    def _divided(self, path):
        """Of a leaf with gains before or behind it, of which it takes what they do not do."""
        wish, factors = self._wish(path), self._factors(path)
        result = np.empty(wish.shape, self._dtype)
        for part in parts_of(wish.shape, {axis for _, _, axis in factors}):
            piece = np.array(wish[part], np.float64, order="C")
            for _, divisor, axis in factors:
                piece /= along(divisor, piece, axis)
            result[part] = piece
        return result

    def _lost_of_gains(self, path):
        """Share of a wish that lies behind gains near zero."""
        wish, factors = self._wish(path), self._factors(path)
        squares = np.zeros(2)
        for part in parts_of(wish.shape, {axis for _, _, axis in factors}):
            wanted = np.array(wish[part], np.float64, order="C")
            kept = wanted
            for gain, divisor, axis in factors:
                kept = kept * along(gain / divisor, kept, axis)
            squares += np.sum((wanted - kept) ** 2), np.sum(wanted**2)
        return _share(*np.sqrt(squares))

    def _wish(self, path):
        """What a leaf shall change by, gains included."""
        shape = self._own.leaves[path].shape
        wish = self._changed(path) if path in self._change else np.zeros(shape, self._dtype)
        if path in self._places.takes_offset and path not in self._hidden:
            norm, reader = self._places.takes_offset[path]
            return wish - read_constant(self._own.vector(norm.bias), self._kernel(reader.kernel), reader.axis)
        if path in self._places.attentions:
            attention = self._places.attentions[path]
            seen = self._own.vector(attention.v_bias)
            if attention.v_bias in self._places.takes_offset:
                norm, reader = self._places.takes_offset[attention.v_bias]
                seen = seen + read_constant(self._own.vector(norm.bias), self._own[reader.kernel], reader.axis)
            return wish - write_constant(seen, self._changed(attention.out_kernel))
        return wish

    def _kernel(self, path):
        """The change of a reader's kernel; of a tied readout, that of its table."""
        tie = self._form.tie
        return self.leaf(tie.table).T if tie is not None and path == tie.readout else self.leaf(path)

    def _factors(self, path):
        """(gain, what to divide by instead, axis) of each gain that lies in a folded leaf."""
        gains = []
        if path in self._places.reads:
            norm, reader = self._places.reads[path]
            gains.append((self._own.gain(norm), reader.axis))
        if path in self._places.branches:
            gains.append((self._own.vector(self._places.branches[path]), len(self._own.leaves[path].shape) - 1))
        return [(gain, _divisor(gain), axis) for gain, axis in gains]

    def _gain_before_readout(self):
        tie = self._form.tie
        if tie.scale is None:
            return np.ones(self._own.leaves[tie.table].shape[1])
        return self._own.gain(self._norm_before_readout())

    def _norm_before_readout(self):
        return next(norm for norm in self._form.norms if norm.scale == self._form.tie.scale)

    def _wishes_of_tie(self):
        """Function: rows of the tied table -> (the rows, what they shall write and read)."""
        tie, gain = self._form.tie, self._gain_before_readout()
        table, written, readout = self._own[tie.table], self._changed(tie.table), self._changed(tie.readout)

        def wishes(rows):
            own = np.asarray(table[rows], np.float64)
            centred = own - own.mean(axis=1, keepdims=True) if self._form.is_centred else own
            return own, Wishes(centred + written[rows], own * gain + readout[:, rows].T)

        return wishes

    def _rows_of_table(self):
        shape = self._own.leaves[self._form.tie.table].shape
        return [part[0] if part else slice(None) for part in parts_of(shape, {1})]

    def _gain_of_readout(self):
        if self._tied_gain is None:
            wishes, squares, tie = self._wishes_of_tie(), np.zeros(2), self._form.tie
            for rows in self._rows_of_table():
                squares += [np.sum(wish**2) for wish in wishes(rows)[1]]
            self._tied_gain = fit_gain(
                wishes(sample_rows(self._own.leaves[tie.table].shape[0]))[1],
                tuple(np.sqrt(squares)),
                self._gain_before_readout(),
                is_centred=self._form.is_centred,
                # Other readers of the same norm would feel its gain.
                keeps=tie.scale is None or len(self._norm_before_readout().readers) > 1,
            )
        return self._tied_gain

    def _table(self):
        gain, wishes = self._gain_of_readout(), self._wishes_of_tie()
        result = np.empty(self._own.leaves[self._form.tie.table].shape, self._dtype)
        for rows in self._rows_of_table():
            own, wanted = wishes(rows)
            result[rows] = fit_rows(wanted, gain, is_centred=self._form.is_centred)[0] - own
        return result

    def _lost_of_tie(self):
        tie, gain, wishes = self._form.tie, self._gain_of_readout(), self._wishes_of_tie()
        missing = np.zeros(2)
        for rows in self._rows_of_table():
            missed = fit_rows(wishes(rows)[1], gain, is_centred=self._form.is_centred)[1]
            missing += [np.sum(some**2) for some in missed]
        paths = tie.table, tie.readout
        wanted = (float(np.linalg.norm(self._changed(path))) for path in paths)
        return {path: _share(*sizes) for path, *sizes in zip(paths, np.sqrt(missing), wanted, strict=True)}


def _divisor(gain):
    """A gain to divide by: away from zero, and infinite where it is zero, as nothing behind a dead gain matters."""
    floor = GAIN_FLOOR * np.median(np.abs(gain))
    divisor = np.where(np.abs(gain) < floor, np.where(gain < 0, -floor, floor), gain)
    return np.where(gain == 0, np.inf, divisor)


def _share(missing: float, wanted: float) -> float:
    return float(missing) / float(wanted) if wanted else 0.0
