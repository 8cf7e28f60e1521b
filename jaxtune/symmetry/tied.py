"""A change of a tied table: what writes the stream and what reads it back asked for one leaf and one gain."""

from typing import NamedTuple

import numpy as np

# Gains are found on this many rows; the table follows from them row by row.
MAX_ROWS = 4096
MAX_ROUNDS = 300
TOLERANCE = 1e-12


class Untied(NamedTuple):
    """The table and the gain that come closest to two wishes.

    Attributes:
        table, gain: As they shall be.
        lost_table, lost_readout: Norm of what is missing of either wish.
    """

    table: np.ndarray
    gain: np.ndarray
    lost_table: float
    lost_readout: float


def tie_again(table: np.ndarray, readout: np.ndarray, gain: np.ndarray, *, is_centred: bool, keep_gain: bool) -> Untied:
    """Minimises `|X C - table|^2 / |table|^2 + |X diag(t) - readout|^2 / |readout|^2`.

    C takes the mean of each row away where `is_centred`, else it does nothing. Either wish counts by its own size, so
    that large gains do not drown what the table writes. Without a mean to find, each channel is a problem of its own:
    of all `(x, t x)` the one closest to two columns, which the leading eigenvector of their 2 x 2 Gram matrix gives.
    With one, table and gain take turns.

    Args:
        table, readout: What the table shall write and read, float[vocab, width] each.
        gain: Where `t` starts; float[width].
        is_centred: Whether the mean of what the table writes is never seen; `table` has then none.
        keep_gain: Whether `t` stays what it is.
    """
    sizes = float(np.linalg.norm(table)), float(np.linalg.norm(readout))
    unit = sizes[0] / sizes[1] if all(sizes) else 1.0
    scaled = gain * unit
    if not keep_gain:
        rows = slice(None, None, -(-len(table) // MAX_ROWS))
        scaled = (_turn_by_turn if is_centred else _channel_by_channel)(table[rows], unit * readout[rows], scaled)
        gain = scaled / unit
    found = _solve_table(table, unit * readout, scaled, is_centred)
    written = found - found.mean(axis=1, keepdims=True) if is_centred else found
    return Untied(found, gain, float(np.linalg.norm(written - table)), float(np.linalg.norm(found * gain - readout)))


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
