"""Work shared out to processes that are forked for it: NumPy's operations on blocks that fit into a cache are so short
that threads of one interpreter wait for each other more than they work.

A fork has everything that its parent has, so that closures and mapped files need no pickling; only results do.
"""

import contextlib
import ctypes
import mmap
import os
import pickle
import selectors
import signal
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxtune.errors import ConfigError

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
SLOT = 8  # bytes of a counter
WAITING = "jaxtune waiting"  # name of a thread of `report.waiting`


def can_fork() -> bool:
    """Whether a fork is safe: on Linux, without JAX, and without threads, which a fork would lose.

    Those that only say now and then that work goes on ("jaxtune waiting") may be lost.
    """
    others = [one for one in threading.enumerate() if one is not threading.main_thread() and one.name != WAITING]
    return sys.platform == "linux" and "jax" not in sys.modules and not others


class Counters:
    """One number a process that its parent can see while it grows."""

    def __init__(self, count: int):
        self._count, self._memory = count, mmap.mmap(-1, max(count, 1) * SLOT)

    def of(self, index: int) -> Callable[[int], None]:
        """What adds a number to the counter of a process."""

        def add(number):
            (before,) = struct.unpack_from("q", self._memory, index * SLOT)
            struct.pack_into("q", self._memory, index * SLOT, before + number)

        return add

    def total(self) -> int:
        """Sum over all processes."""
        return sum(struct.unpack_from("q", self._memory, n * SLOT)[0] for n in range(self._count))


def run_forked(count: int, work: Callable[..., Any], hear: Callable[[Any], None] | None = None) -> list[Any]:
    """`[work(0), …, work(count - 1)]`, each in a process of its own.

    Whatever `work` raises is raised here, and the other processes are stopped; so they are by an interrupt, and by the
    end of this process, however it comes.

    Args:
        count: How many processes.
        work: Its result is pickled. With `hear` it is called with a second argument, a function that says something.
        hear: Called here with what they say meanwhile, in the order of each.
    """
    children: dict[int, tuple[int, int]] = {}  # pipe -> (process, index)
    parts: dict[int, bytearray] = {}
    results: dict[int, Any] = {}
    try:
        for index in range(count):
            reader, process = _fork(index, work, hear is not None)
            children[reader], parts[reader] = (process, index), bytearray()
        with selectors.DefaultSelector() as waiting:
            for reader in children:
                waiting.register(reader, selectors.EVENT_READ)
            while waiting.get_map():
                for key, _ in waiting.select():
                    data = os.read(key.fd, 1 << 20)
                    parts[key.fd] += data
                    for kind, value in _take_messages(parts[key.fd]):
                        if kind == "error":
                            raise value
                        if kind == "done":
                            results[children[key.fd][1]] = value
                        else:
                            hear(value)
                    if not data:
                        waiting.unregister(key.fd)
                        if children[key.fd][1] not in results:
                            raise ConfigError(
                                "a process of this merge was killed, most likely for want of memory. "
                                "Allow fewer threads."
                            )
    finally:
        for reader, (process, _) in children.items():
            os.close(reader)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # those that are done are only waiting to be asked
            os.waitpid(process, 0)
    return [results[index] for index in range(count)]


def map_forked(count: int) -> Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]:
    """A `map` over `count` processes, each with every `count`-th item; where one would do, without any."""

    def map_items(function, items):
        items = list(items)
        if len(items) < 2 or count < 2:
            return [function(item) for item in items]
        shares = run_forked(count, lambda index: [function(item) for item in items[index::count]])
        return [shares[n % count][n // count] for n in range(len(items))]

    return map_items


def _fork(index, work, speaks):
    reader, writer = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        os.close(writer)
        return reader, process
    code = 1
    try:  # nothing of the parent's may run here: no handlers, no cleaning up, no buffers flushed twice
        os.close(reader)
        _die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and stops this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with os.fdopen(writer, "wb") as pipe:
            try:
                say = (lambda value: _send(pipe, "said", value),) if speaks else ()
                _send(pipe, "done", work(index, *say))
            except BaseException as error:
                _send(pipe, "error", _picklable(error))
        code = 0
    finally:
        os._exit(code)


def _die_with(parent):
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _send(pipe, kind, value):
    content = pickle.dumps((kind, value))
    pipe.write(struct.pack("q", len(content)) + content)
    pipe.flush()


def _take_messages(buffer):
    """Takes the whole messages off the beginning of what came through a pipe."""
    while len(buffer) >= SLOT:
        (length,) = struct.unpack_from("q", buffer)
        if len(buffer) < SLOT + length:
            return
        content = bytes(buffer[SLOT : SLOT + length])
        del buffer[: SLOT + length]
        yield pickle.loads(content)


def _picklable(error):
    """An error as it is, where it comes through a pickle; else its words."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever a class of its own may do there; the words must arrive
        return RuntimeError(f"{type(error).__name__}: {error}")
