"""Does a merge: every tensor of the output from the tensors that its job names, in a fixed amount of memory."""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint.rounding import round_to_stored
from jaxtune.errors import NonFiniteError, TreeMismatchError
from jaxtune.merge.arrays import RUN
from jaxtune.merge.options import check_options
from jaxtune.merge.post_steps import POST_STEPS, Place
from jaxtune.merge.registry import METHODS
from jaxtune.merge.view import Combine
from jaxtune.recipes.jobs import MergeJobs, TensorJob
from jaxtune.stream.files import OutputFiles
from jaxtune.stream.inputs import Inputs
from jaxtune.stream.leaves import Leaf, SteppedLeaf, split
from jaxtune.stream.processes import ALONE, Processes
from jaxtune.stream.values import is_finite, narrow_into
from jaxtune.stream.view import StreamView
from jaxtune.stream.writer import Writer, check_finished, record_finished

BLOCK = RUN  # elements that are merged in one go: a few arrays of them fit into a core's cache
SPAN = 1 << 20  # elements of one task, and of one write

# (leaf, combine, place of the leaf's first element, low, high, out) -> whether all is finite; fills `out`.
MergeSpan = Callable[[Leaf, Combine, int, int, int, np.ndarray], bool]


@dataclass(frozen=True)
class Merged:
    """What `run_merge` leaves behind.

    Attributes:
        paths: File name -> where it lies, finished.
        crc32: File name -> CRC-32 of its content.
        num_kept: Files that a former run had finished.
    """

    paths: Mapping[str, Path]
    crc32: Mapping[str, int]
    num_kept: int


def run_merge(
    jobs: MergeJobs,
    files: OutputFiles,
    folder: Path,
    *,
    num_workers: int | None = None,
    sync: bool = True,
    merge_span: MergeSpan | None = None,
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Merged:
    """Writes all files of tensors into a folder; those that a former run finished there are checked and kept.

    Args:
        jobs: What to do.
        files: Where it goes.
        folder: Of `checkpoint.resume.keep_work`, or any other.
        num_workers: Threads; None: one a core.
        sync: Whether a file is on the disk before it is called finished.
        merge_span: What does the arithmetic of a span: NumPy, block by block (None), or `device.DeviceMerge`.
        processes: This one among those that share the work, each with its own ranges of bytes.
        advance: Called with the number of bytes that were written.

    Raises:
        NonFiniteError: NaN or Inf came out of a tensor.
        TreeMismatchError: integer tensors that should be copied differ between the models.
        CheckpointError: a value does not fit the output's dtype.
        OSError: the disk refused.
    """
    num_workers = num_workers or count_cores()
    by_name = {job.name: job for job in jobs.jobs}
    with ThreadPoolExecutor(num_workers) as pool:
        kept: dict[str, int] = {}
        if processes.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            found = {name: check_finished(folder, name, pool.map) for name in files.headers}
            kept = {name: crc for name, crc in found.items() if crc is not None}
        kept = processes.share(kept)
        headers = {name: header for name, header in files.headers.items() if name not in kept}
        writer = Writer(folder, headers, sync=sync, is_first=processes.is_first, is_alone=processes.is_alone)
        processes.wait_for("files")
        todo = [by_name[tensor] for header in headers.values() for tensor in header.tensors]
        engine = _Engine(jobs, writer, pool, merge_span or merge_on_host, _Share(processes, todo), advance)
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
        processes.wait_for("tensors")
        crc32 = dict(kept)
        if processes.is_first:
            writer.finish_all()
            crc32 |= {name: record_finished(folder, name, pool.map) for name in headers}
    return Merged({name: folder / name for name in files.headers}, crc32, len(kept))


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def group_jobs(jobs: Sequence[TensorJob]) -> Iterator[list[TensorJob]]:
    """Jobs one by one; those whose method looks at the whole model at once, together, where their turn first comes."""
    whole: dict[Any, list[TensorJob]] = {}
    for job in jobs:
        if _is_of_whole_model(job):
            whole.setdefault(_key_of(job), []).append(job)
    for job in jobs:
        if not _is_of_whole_model(job):
            yield [job]
        elif some := whole.pop(_key_of(job), None):
            yield some


def merge_on_host(leaf: Leaf, combine: Combine, start: int, low: int, high: int, out: np.ndarray) -> bool:
    """A span in NumPy, block by block, so that what is between two operations stays in the cache."""
    for first, last in split(leaf, BLOCK, low, high):
        values = np.asarray(combine(leaf.elements(first, last, start=start))).reshape(-1)
        if not narrow_into(leaf.name, values, out[first - low : last - low]):
            return False
    return True


class _Engine:
    """What turns jobs into tasks of a pool."""

    def __init__(self, jobs, writer, pool, merge_span, share, advance):
        self._jobs, self._inputs, self._writer, self._pool = jobs, Inputs(jobs), writer, pool
        self._merge_span, self._share, self._advance = merge_span, share, advance

    def tasks(self, some: Sequence[TensorJob]) -> Iterable[Callable[[], None]]:
        """All that is to do for some jobs, once the numbers about their leaves are known."""
        if not any(map(self._share.touches, some)):
            return
        if some[0].method == "copy":
            for job in some:
                yield from self._copies(job)
            return
        for job, leaf, combine, start in self._prepare(some):
            length = getattr(self._merge_span, "span", SPAN)
            spans = [span for span in split(leaf, length) if self._share.has(job, span[0])]
            left = itertools.count(len(spans) - 1, -1)
            for low, high in spans:
                yield functools.partial(self._merge, job, leaf, combine, start, low, high, left)

    def _prepare(self, some):
        """(job, leaf, combine, place of its first element), the numbers known."""
        leaves = [self._inputs.open_leaf(job) for job in some]
        view = StreamView(leaves, self._pool.map)
        combine = METHODS[some[0].method].prepare(view, some[0].options)
        for job, leaf, start in zip(some, leaves, view.starts, strict=True):
            chosen = combine
            for name, options in job.post:
                step, base = POST_STEPS[name], self._inputs.open_tensor(job, job.base)
                leaf = SteppedLeaf(leaf, chosen, base, unit=step.unit_of(options))
                place = {"place": Place(job.layer, job.num_layers or 0)} if "place" in step.options else {}
                full = check_options(step, {**options, **place}, 1, has_base=True, name=name)
                chosen = step.prepare(StreamView([leaf], self._pool.map), full)
            yield job, leaf, chosen, start

    def _merge(self, job, leaf, combine, start, low, high, left):
        out = np.empty(high - low, self._writer.dtype_of(job.name))
        merge_span = self._merge_span if leaf.extra_shape is None else merge_on_host  # devices take weights alone
        if not merge_span(leaf, combine, start, low, high, out):
            raise _non_finite(self._jobs, job, leaf, low, high)
        self._writer.write(job.name, low, out)
        self._advance(out.nbytes)
        if next(left) == 0:
            leaf.release()

    def _copies(self, job):
        """One source as it is, which all others must equal."""
        sources = (*(() if job.base is None else (job.base,)), *job.sources)
        readers = [self._inputs.open_tensor(job, source).as_stored() for source in sources]
        size, dtype = math.prod(job.shape), self._writer.dtype_of(job.name)

        def copy(low, high):
            first = readers[0].read_stored(low, high)
            for source, other in zip(sources[1:], readers[1:], strict=True):
                if not np.array_equal(first, other.read_stored(low, high)):
                    raise TreeMismatchError(
                        f"tensor {job.name!r} ({first.dtype}) is copied and not merged, and differs between "
                        f"{self._jobs.models[sources[0].model].path} and {self._jobs.models[source.model].path}. "
                        "Make them equal, or leave one model out."
                    )
            self._writer.write(job.name, low, round_to_stored(job.name, first, dtype))
            self._advance(first.nbytes)

        spans = [(low, min(low + SPAN, size)) for low in range(0, size, SPAN)]
        yield from (functools.partial(copy, *span) for span in spans if self._share.has(job, span[0]))


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


def _is_of_whole_model(job):
    return job.method in METHODS and job.options.get(METHODS[job.method].scope_option) == "model"


def _key_of(job):
    return job.method, repr(sorted(job.options.items())), tuple(source.model for source in job.sources)


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


def _non_finite(jobs, job, leaf, low, high):
    """Which of the inputs holds NaN or Inf, or that none does."""
    sources = (*job.sources, *(() if job.base is None else (job.base,)))
    guilty = [
        str(jobs.models[source.model].path)
        for source, reader in zip(sources, leaf.readers, strict=True)
        if not is_finite(reader.read_stored(low, high))
    ]
    where = f"tensor {job.name!r}, elements {low} to {high}"
    if guilty:
        return NonFiniteError(f"{where}: NaN or Inf in {', '.join(guilty)}. Use an earlier checkpoint.")
    return NonFiniteError(
        f"{where}: {job.method!r} makes NaN or Inf of finite numbers. Weights that sum to zero do so where they are "
        "normalised: change them, or set normalize: false."
    )
