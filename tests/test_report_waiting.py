"""Signs of life: none for short work, sparse lines in a log, one line drawn over on a terminal."""

import io
import time

from jaxtune.report.waiting import Waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_short_work_says_nothing():
    stream = io.StringIO()
    with Waiting("working", stream=stream, quiet_seconds=5.0):
        pass
    assert stream.getvalue() == ""


def test_a_log_gets_a_line_and_not_a_stream_of_them():
    stream = io.StringIO()
    with Waiting("working", stream=stream, quiet_seconds=0.05):
        time.sleep(0.4)
    assert stream.getvalue().splitlines() == ["working … 0 s"]


def test_a_terminal_gets_one_line_that_is_removed():
    stream = Terminal()
    with Waiting("working", stream=stream, quiet_seconds=0.05):
        time.sleep(0.3)
    text = stream.getvalue()
    assert "\n" not in text
    assert text.startswith("\rworking … 0 s")
    assert text.endswith("\r" + " " * len("working … 0 s") + "\r")
