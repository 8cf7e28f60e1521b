"""A change of a tied table: what writes the stream and what reads it back asked for one leaf and one gain."""

from typing import NamedTuple

import numpy as np

# Gains are found on this many rows; the table follows from them row by row.
MAX_ROWS = 4096
MAX_ROUNDS = 300
TOLERANCE = 1e-12


class Wishes(NamedTuple):
    """What some rows of the table shall write and read, float64[rows, width] each."""

    table: np.ndarray
    readout: np.ndarray


class Gain(NamedTuple):
    """What the readout is multiplied by.

    Attributes:
        gain: float64[width].
        unit: Length of the table over that of the readout: either wish counts by its own size.
    """

    gain: np.ndarray
    unit: float


def fit_gain(wishes: Wishes, sizes: tuple[float, float], gain: np.ndarray, *, is_centred: bool, keeps: bool) -> Gain:
    """The gain t that minimises `|X C - table|^2 / |table|^2 + |X diag(t) - readout|^2 / |readout|^2` over X and t.

    C takes the mean of each row away where `is_centred`, else it does nothing. Either wish counts by its own size, so
    that large gains do not drown what the table writes. Without a mean to find, each channel is a problem of its own:
    of all `(x, t x)` the one closest to two columns, which the leading eigenvector of their 2 x 2 Gram matrix gives.
    With one, table and gain take turns.

    Args:
        wishes: Of `sample_rows` of the table; what it shall write has no mean where that is never seen.
        sizes: Norms of both wishes over the whole table.
        gain: Where `t` starts; float64[width].
        is_centred: Whether the mean of what the table writes is never seen.
        keeps: Whether `t` stays what it is.
    """
    unit = sizes[0] / sizes[1] if all(sizes) else 1.0
    if keeps:
        return Gain(gain, unit)
    fit = _turn_by_turn if is_centred else _channel_by_channel
    return Gain(fit(wishes.table, unit * wishes.readout, gain * unit) / unit, unit)


def fit_rows(wishes: Wishes, gain: Gain, *, is_centred: bool) -> tuple[np.ndarray, Wishes]:
    """Rows of the table that come closest for a gain, and what of either wish they miss."""
    found = _solve_table(wishes.table, gain.unit * wishes.readout, gain.gain * gain.unit, is_centred)
    written = found - found.mean(axis=1, keepdims=True) if is_centred else found
    return found, Wishes(written - wishes.table, found * gain.gain - wishes.readout)


def sample_rows(num_rows: int) -> slice:
    """Rows that a gain is found on."""
    return slice(None, None, max(1, -(-num_rows // MAX_ROWS)))


def _channel_by_channel(table, readout, gain):
    cross = np.einsum("vw,vw->w", table, readout)
    apart = np.einsum("vw,vw->w", readout, readout) - np.einsum("vw,vw->w", table, table)
    is_told, root = cross != 0, np.abs(apart) + np.hypot(apart, 2 * cross)
    double = np.where(is_told, 2 * cross, 1.0)
    # The slope of the leading eigenvector, written so that nothing cancels.
    return np.where(is_told, np.where(apart > 0, root / double, double / np.where(is_told, root, 1.0)), gain)


def _turn_by_turn(table, readout, gain):
    for _ in range(MAX_ROUNDS):
        found = _solve_table(table, readout, gain, is_centred=True)
        squares = np.einsum("vw,vw->w", found, found)
        new = np.where(squares > 0, np.einsum("vw,vw->w", found, readout) / np.where(squares > 0, squares, 1.0), gain)
        is_settled = np.abs(new - gain).max() <= TOLERANCE * np.abs(gain).max()
        gain = new
        if is_settled:
            break
    return gain


def _solve_table(table, readout, gain, is_centred):
    """The best table for a gain: rows times `(C + diag(t)^2)^-1`, by Sherman and Morrison."""
    shares = 1 / (1 + gain**2)
    found = (table + readout * gain) * shares
    if not is_centred:
        return found
    rest = len(gain) - shares.sum()
    return found + np.outer(found.sum(axis=1), shares) / rest if rest > 0 else found
