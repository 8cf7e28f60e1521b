"""The bar, the lines of a log, and silence."""

import io
import itertools

from jaxtune.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, *, num_steps, seconds_per_step, start=0):
    now = [100.0]
    with Progress(num_steps, "train", start=start, stream=stream, clock=lambda: now[0]) as progress:
        for done in range(start + 1, num_steps + 1):
            now[0] += seconds_per_step
            progress.update(done, {"loss": 1.0 / done})
    return stream.getvalue()


def test_a_short_run_is_silent():
    assert run(io.StringIO(), num_steps=190, seconds_per_step=0.01) == ""
    assert run(Terminal(), num_steps=190, seconds_per_step=0.01) == ""


def test_a_log_gets_a_line_per_half_minute_and_the_last_state():
    lines = run(io.StringIO(), num_steps=100, seconds_per_step=1.0).splitlines()
    assert [line.split()[1] for line in lines] == ["2/100", "32/100", "62/100", "92/100", "100/100"]
    assert lines[1] == "train  32/100  1/s  1:08 left  loss 0.03125"


def test_a_terminal_gets_one_line_drawn_over():
    text = run(Terminal(), num_steps=100, seconds_per_step=1.0)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    frames = text.rstrip("\n").split("\r")[1:]
    assert len(frames) == 100  # 2 ... 100, and the last once more on closing
    assert frames[-1].startswith("[" + "#" * 30 + "]")
    assert frames[48].startswith("[" + "#" * 15 + "." * 15 + "]")
    assert all(len(after) >= len(before.rstrip()) for before, after in itertools.pairwise(frames))


def test_speed_counts_from_where_the_process_began():
    lines = run(io.StringIO(), num_steps=100, seconds_per_step=1.0, start=90).splitlines()
    assert lines[0].split()[1:3] == ["92/100", "1/s"]
