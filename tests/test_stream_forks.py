"""Work in forked processes: results in order, errors as they were, nobody left behind.

In processes of their own: pytest has loaded JAX, beside which nothing is forked.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jaxtune.stream.forks import can_fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux alone")


def run_script(text):
    script = "from jaxtune.stream.forks import Counters, can_fork, map_forked, run_forked\n" + textwrap.dedent(text)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_beside_jax_nothing_is_forked():
    assert not can_fork()


def test_results_come_in_order_and_counters_are_seen():
    done = run_script("""
        assert can_fork()
        counters = Counters(3)
        def work(index):
            counters.of(index)(10 * (index + 1))
            return index * index
        assert run_forked(3, work) == [0, 1, 4]
        assert counters.total() == 60
        assert map_forked(2)(lambda n: n + 1, range(7)) == list(range(1, 8))
        assert map_forked(4)(lambda n: n + 1, [1]) == [2]
    """)
    assert done.returncode == 0, done.stderr


def test_an_error_comes_back_as_it_was_and_the_others_are_stopped():
    done = run_script("""
        import time
        from jaxtune.errors import NonFiniteError
        def work(index):
            if index:
                time.sleep(50)
            raise NonFiniteError("tensor 'a'")
        began = time.monotonic()
        try:
            run_forked(2, work)
        except NonFiniteError as error:
            assert str(error) == "tensor 'a'"
        assert time.monotonic() - began < 20
    """)
    assert done.returncode == 0, done.stderr


def test_a_killed_process_is_told():
    done = run_script("""
        import os, signal
        run_forked(2, lambda index: os.kill(os.getpid(), signal.SIGKILL) if index else None)
    """)
    assert "was killed" in done.stderr


def test_forks_end_with_the_process_that_made_them(tmp_path):
    script = f"""
import os, time
from jaxtune.stream.forks import run_forked
def work(index):
    open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
    time.sleep(50)
run_forked(2, work)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not any(is_running(int(path.name)) for path in tmp_path.iterdir()):
            return
        time.sleep(0.1)
    raise AssertionError("forks outlived their parent")


def is_running(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
