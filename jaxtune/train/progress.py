"""Progress of a long loop on stderr: a bar on a terminal, sparse lines in a log, silence for short runs."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

QUIET_SECONDS = 2.0  # a run shorter than this prints nothing
REDRAW_SECONDS = 0.1  # of the bar on a terminal
LINE_SECONDS = 30.0  # between two lines of a log, at least
BAR_WIDTH = 30


class Progress:
    """Shows how far a loop is.

    Use as a context manager; `update` after each piece of work is cheap enough for every step.

    Args:
        total: Number of pieces in the whole run.
        label: What runs, for instance "train".
        start: Pieces done before this process began (a resumed run).
        stream: Where to write; standard error unless told.
        clock: Seconds from any origin; tests pass their own.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._label = total, label
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._began = clock()
        self._shown_at: float | None = None
        self._num_done, self._values = start, {}
        self._first: tuple[int, float] | None = None  # pieces and time of the first update; compilation lies before
        self._bar_length = 0

    def update(self, num_done: int, values: Mapping[str, float] | None = None) -> None:
        """Notes that `num_done` pieces are done; `values` replaces the numbers shown beside them."""
        self._num_done = num_done
        if values:
            self._values = dict(values)
        now = self._clock()
        if self._first is None:
            self._first = (num_done, now)
        if now - self._began < QUIET_SECONDS:
            return
        gap = REDRAW_SECONDS if self._is_terminal else LINE_SECONDS
        if self._shown_at is None or now - self._shown_at >= gap:
            self._show(now)

    def close(self) -> None:
        """Shows the last state, if anything was shown at all, and ends the line of the bar."""
        if self._shown_at is not None:
            self._show(self._clock())
            if self._is_terminal:
                self._stream.write("\n")
                self._stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _show(self, now):
        self._shown_at = now
        words = [self._label, f"{self._num_done}/{self._total}"]
        num_first, time_first = self._first
        if self._num_done > num_first and now > time_first:
            speed = (self._num_done - num_first) / (now - time_first)
            words.append(f"{speed:.3g}/s")
            if self._num_done < self._total:
                words.append(f"{_duration((self._total - self._num_done) / speed)} left")
        words += [f"{name} {value:.4g}" for name, value in self._values.items()]
        if self._is_terminal:
            filled = BAR_WIDTH * self._num_done // max(self._total, 1)
            line = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] " + "  ".join(words)
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be drawn over
            self._stream.write("\r" + line.ljust(self._bar_length))
            self._bar_length = len(line)
        else:
            self._stream.write("  ".join(words) + "\n")
        self._stream.flush()


def _duration(seconds):
    """`75` -> "1:15", `3700` -> "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
