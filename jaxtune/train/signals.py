"""Ctrl-C and termination as a wish that the loop can honour between two steps."""

import signal
import threading
from types import TracebackType


class StopSignals:
    """While entered, the first SIGINT or SIGTERM sets `received`; a second one acts as it always does.

    A step owns donated buffers: an exception raised inside it would lose the state that should be saved.
    Outside the main thread, where Python allows no handlers, signals keep their usual effect.

    Attributes:
        received: Number of the signal that came, or None.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _handle(self, number, frame):
        self.received = number
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
