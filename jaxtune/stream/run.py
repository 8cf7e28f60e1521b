"""Does a merge: every tensor of the output from the tensors that its job names, in a fixed amount of memory."""

import math
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtune.recipes.jobs import MergeJobs
from jaxtune.stream.checksums import crc32_of_file
from jaxtune.stream.engine import Engine, MergeSpan, group_jobs, is_of_whole_model, merge_on_host
from jaxtune.stream.files import OutputFiles
from jaxtune.stream.forks import Counters, can_fork, map_forked, run_forked
from jaxtune.stream.memory import own_memory
from jaxtune.stream.processes import ALONE, Processes
from jaxtune.stream.writer import PART_SUFFIX, Writer, check_finished, crc32_of_parts


@dataclass(frozen=True)
class Merged:
    """What `run_merge` leaves behind.

    Attributes:
        paths: File name -> where it lies, finished.
        crc32: File name -> CRC-32 of its content.
        num_kept: Files that a former run had finished.
        own_memory_bytes: What this process and those that it forked held beside mapped files as they ended, all added
            up; freed memory stays with them, so that it is about the peak. None where the system does not tell.
    """

    paths: Mapping[str, Path]
    crc32: Mapping[str, int]
    num_kept: int
    own_memory_bytes: int | None


def run_merge(
    jobs: MergeJobs,
    files: OutputFiles,
    folder: Path,
    *,
    num_workers: int | None = None,
    sync: bool = True,
    merge_span: MergeSpan | None = None,
    processes: Processes = ALONE,
    written: Counters | None = None,
) -> Merged:
    """Writes all files of tensors into a folder; those that a former run finished there are checked and kept.

    Args:
        jobs: What to do.
        files: Where it goes.
        folder: Of `checkpoint.resume.keep_work`, or any other.
        num_workers: Forked processes, or threads where nothing can be forked; None: one a core.
        sync: Whether a file is on the disk before it is called finished.
        merge_span: What does the arithmetic of a span: NumPy, block by block (None), or `device.DeviceMerge`.
        processes: This one among those that share the work, each with its own ranges of bytes.
        written: Counts bytes that were written, for `num_workers` processes at least.

    Raises:
        NonFiniteError: NaN or Inf came out of a tensor.
        TreeMismatchError: integer tensors that should be copied differ between the models.
        CheckpointError: a value does not fit the output's dtype.
        OSError: the disk refused.
    """
    num_workers = num_workers or count_cores()
    written = written or Counters(num_workers)
    kept: dict[str, int] = {}
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        found = {name: check_finished(folder, name) for name in files.headers}
        kept = {name: crc for name, crc in found.items() if crc is not None}
    kept = processes.share(kept)
    headers = {name: header for name, header in files.headers.items() if name not in kept}
    by_name = {job.name: job for job in jobs.jobs}
    todo = [by_name[tensor] for header in headers.values() for tensor in header.tensors]
    how = {"sync": sync, "is_first": processes.is_first}
    if merge_span is None and processes.is_alone and num_workers > 1 and can_fork():
        writer = Writer(folder, headers, is_alone=False, **how)
        try:
            held = _run_forks(jobs, todo, writer, folder, headers, num_workers, written)
        finally:
            writer.close()
    else:
        writer = Writer(folder, headers, is_alone=processes.is_alone, **how)
        processes.wait_for("files")
        _run_threads(jobs, todo, writer, num_workers, merge_span or merge_on_host, processes, written)
        held = []
    processes.wait_for("tensors")
    if processes.is_first and not processes.is_alone:
        for name in headers:
            writer.finish(name, crc32_of_file(folder / f"{name}{PART_SUFFIX}"))
    held = [*held, own_memory()]
    paths = {name: folder / name for name in files.headers}
    return Merged(paths, {**kept, **writer.crc32}, len(kept), None if None in held else sum(held))


def _run_threads(jobs, todo, writer, num_workers, merge_span, processes, written):
    """This process's share, by threads."""
    with ThreadPoolExecutor(num_workers) as pool:
        engine = Engine(jobs, writer, pool.map, merge_span, _Share(processes, todo), written.of(0))
        queue = _Queue(pool, num_workers)
        try:
            for some in group_jobs(todo):
                for task in engine.tasks(some):
                    queue.submit(task)
            queue.drain()
            if not processes.is_alone:
                writer.sync()
        except BaseException:
            queue.cancel()
            raise
        finally:
            writer.close()


def _run_forks(jobs, todo, writer, folder, headers, count, written):
    """All of it, by processes with a share each; a file gets its name when all have done their share of it.

    What a method must know of the whole model is found before, by all of them together.

    Returns:
        What each of them held beside mapped files.
    """
    groups = list(group_jobs(todo))
    engine = Engine(jobs, None, map_forked(count), merge_on_host, _Share(ALONE, todo), written.of(0))
    known = {some[0].name: engine.prepare(some) for some in groups if is_of_whole_model(some[0])}
    file_of = {tensor: name for name, header in headers.items() for tensor in header.tensors}

    def work(index, say):
        own = Writer(folder, headers, sync=writer.is_synced, is_first=False, is_alone=False)
        share = _Share(Processes(index, count), todo)
        engine = Engine(jobs, own, map, merge_on_host, share, written.of(index), known)
        left = Counter(file_of[job.name] for job in todo)
        try:
            for some in groups:
                for task in engine.tasks(some):
                    task()
                left.subtract(file_of[job.name] for job in some)
                for name in {file_of[job.name] for job in some}:
                    if not left[name]:
                        own.sync(name)  # the others are at work meanwhile
                        say((name, own.parts[name]))
        finally:
            own.close()
        return own_memory()

    waiting = dict.fromkeys(headers, count)
    parts: dict[str, list] = {name: [] for name in headers}

    def hear(message):
        name, some = message
        parts[name] += some
        waiting[name] -= 1
        if not waiting[name]:
            writer.finish(name, crc32_of_parts(headers[name], parts[name]))

    for name, header in headers.items():
        if not header.tensors:
            writer.finish(name, crc32_of_parts(header, []))
    return run_forked(count, work, hear) if todo else []


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Queue:
    """Tasks of a pool, a few ahead of the workers, so that nothing piles up; the first error ends it."""

    def __init__(self, pool, num_workers):
        self._pool, self._limit = pool, 4 * num_workers
        self._waiting: set[Future] = set()

    def submit(self, task) -> None:
        while len(self._waiting) >= self._limit:
            self._collect()
        self._waiting.add(self._pool.submit(task))

    def drain(self) -> None:
        while self._waiting:
            self._collect()

    def cancel(self) -> None:
        for future in self._waiting:
            future.cancel()

    def _collect(self):
        done, self._waiting = wait(self._waiting, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()


class _Share:
    """Of the bytes of all jobs, laid end to end, the range that is this process's; a span goes by its first byte."""

    def __init__(self, processes, jobs):
        places = np.cumsum([0, *(math.prod(job.shape) * job.out_dtype.itemsize for job in jobs)]).tolist()
        self._start_of = {job.name: place for job, place in zip(jobs, places, strict=False)}
        self._low, self._high = (places[-1] * n // processes.count for n in (processes.index, processes.index + 1))

    def touches(self, job):
        start = self._start_of[job.name]
        return start < self._high and start + math.prod(job.shape) * job.out_dtype.itemsize > self._low

    def has(self, job, low):
        return self._low <= self._start_of[job.name] + low * job.out_dtype.itemsize < self._high
