"""Signs of life on stderr while a stage of a command works: nothing for short ones."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from jaxtune.stream.forks import WAITING

QUIET_SECONDS = 2.0
REDRAW_SECONDS = 0.5  # on a terminal
LINE_SECONDS = 30.0  # between two lines of a log


class Waiting:
    """While entered, says from the third second on what runs and for how long.

    On a terminal one line is drawn over and removed at the end; in a log a line comes every half minute.

    Args:
        words: What runs, for instance "jaxtune transport: aligning"; a function where it changes.
        stream: Where to write; standard error unless told.
        quiet_seconds: How long to keep silent.
    """

    def __init__(
        self, words: str | Callable[[], str], *, stream: TextIO | None = None, quiet_seconds: float = QUIET_SECONDS
    ):
        self._words, self._quiet = words if callable(words) else lambda: words, quiet_seconds
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name=WAITING, daemon=True)

    def __enter__(self) -> "Waiting":
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _work(self):
        if self._done.wait(self._quiet):
            return
        length = 0
        while True:
            text = f"{self._words()} … {time.monotonic() - self._began:.0f} s"
            if self._is_terminal:
                self._write("\r" + text.ljust(length))
                length = len(text)
            else:
                self._write(text + "\n")
            if self._done.wait(REDRAW_SECONDS if self._is_terminal else LINE_SECONDS):
                break
        if self._is_terminal:
            self._write("\r" + " " * length + "\r")

    def _write(self, text):
        self._stream.write(text)
        self._stream.flush()
