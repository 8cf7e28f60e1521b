"""Does a merge: every tensor of the output from the tensors that its job names, in a fixed amount of memory."""

import functools
import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint.rounding import round_to_stored
from jaxtune.errors import NonFiniteError, TreeMismatchError
from jaxtune.merge.method import Method
from jaxtune.merge.registry import METHODS
from jaxtune.merge.view import Combine
from jaxtune.recipes.jobs import MergeJobs, TensorJob
from jaxtune.stream.checksums import crc32_of_file
from jaxtune.stream.files import OutputFile, OutputFiles
from jaxtune.stream.tensors import TensorReader
from jaxtune.stream.values import is_finite, narrow_into
from jaxtune.stream.view import StoredLeaf, StreamView
from jaxtune.tree import flatten

BLOCK = 1 << 17  # elements that are merged in one go: a few arrays of them fit into a core's cache
SPAN = 1 << 20  # elements of one task, and of one write
DONE_SUFFIX = ".done"


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
) -> Merged:
    """Writes all files of tensors into a folder; those that a former run finished there are checked and kept.

    Args:
        jobs: What to do.
        files: Where it goes.
        folder: Of `checkpoint.resume.keep_work`, or any other.
        num_workers: Threads; None: one a core.
        sync: Whether a file is on the disk before it is called finished.

    Raises:
        NonFiniteError: NaN or Inf came out of a tensor.
        TreeMismatchError: integer tensors that should be copied differ between the models.
        CheckpointError: a value does not fit the output's dtype.
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_workers = num_workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    by_name = {job.name: job for job in jobs.jobs}
    with ThreadPoolExecutor(num_workers) as pool:
        kept = {name: crc for name in files.headers if (crc := _check_kept(folder, name, pool)) is not None}
        crc32 = dict(kept)
        open_jobs = _group_jobs([by_name[t] for f, h in files.headers.items() if f not in kept for t in h.tensors])
        writer = _Writer(folder, {name: header for name, header in files.headers.items() if name not in kept}, sync)
        queue = _Queue(pool, num_workers)
        try:
            with writer:
                for some in open_jobs:
                    for task in _tasks(jobs, some, writer, pool):
                        queue.submit(task)
                queue.drain()
        except BaseException:
            queue.cancel()
            raise
        for name in writer.finished:
            crc32[name] = crc32_of_file(folder / name, pool.map)
            (folder / f"{name}{DONE_SUFFIX}").write_text(json.dumps({"crc32": crc32[name]}))
    return Merged({name: folder / name for name in files.headers}, crc32, len(kept))


def _check_kept(folder, name, pool):
    """The CRC-32 of a file that a former run finished; None where there is none, or it is another by now."""
    record = folder / f"{name}{DONE_SUFFIX}"
    if not (record.exists() and (folder / name).exists()):
        (folder / name).unlink(missing_ok=True)
        return None
    said = json.loads(record.read_text())["crc32"]
    if crc32_of_file(folder / name, pool.map) == said:
        return said
    record.unlink()
    (folder / name).unlink()
    return None


class _Writer:
    """Opens files as their first tensor comes, and finishes them as their last one does."""

    def __init__(self, folder, headers, sync):
        self._folder, self._headers, self._sync = folder, headers, sync
        self._file_of = {tensor: name for name, header in headers.items() for tensor in header.tensors}
        self._open: dict[str, OutputFile] = {}
        self._lock = threading.Lock()
        self.finished: list[str] = []

    def __enter__(self):
        for name, header in self._headers.items():
            if not any(info.stop > info.start for info in header.tensors.values()):
                self._finish(name, self._file(name))  # nothing to wait for
        return self

    def __exit__(self, *_):
        for file in self._open.values():
            file.close(sync=False)

    def write(self, tensor: str, low: int, values: np.ndarray) -> None:
        name = self._file_of[tensor]
        if self._file(name).write(tensor, low, values):
            self._finish(name, self._open[name])

    def dtype_of(self, tensor: str) -> np.dtype:
        return self._headers[self._file_of[tensor]].tensors[tensor].dtype

    def _file(self, name):
        with self._lock:
            if name not in self._open:
                part = self._folder / f"{name}.part"
                part.unlink(missing_ok=True)
                self._open[name] = OutputFile(part, self._headers[name])
            return self._open[name]

    def _finish(self, name, file):
        file.close(sync=self._sync)
        (self._folder / f"{name}.part").rename(self._folder / name)
        with self._lock:
            del self._open[name]
            self.finished.append(name)


class _Queue:
    """Tasks of a pool, a few ahead of the workers, so that nothing piles up; the first error ends it."""

    def __init__(self, pool, num_workers):
        self._pool, self._limit = pool, 4 * num_workers
        self._waiting: set[Future] = set()

    def submit(self, task) -> None:
        while len(self._waiting) >= self._limit:
            self._collect(FIRST_COMPLETED)
        self._waiting.add(self._pool.submit(task))

    def drain(self) -> None:
        while self._waiting:
            self._collect(FIRST_COMPLETED)

    def cancel(self) -> None:
        for future in self._waiting:
            future.cancel()

    def _collect(self, when):
        done, self._waiting = wait(self._waiting, return_when=when)
        for future in done:
            future.result()


def _group_jobs(jobs: Sequence[TensorJob]) -> Iterator[list[TensorJob]]:
    """Jobs one by one; those whose method looks at the whole model at once, together, where their turn first comes."""
    whole: dict[Any, list[TensorJob]] = {}
    for job in jobs:
        if _is_whole_model(job):
            whole.setdefault(_key_of(job), []).append(job)
    for job in jobs:
        if not _is_whole_model(job):
            yield [job]
        elif whole[_key_of(job)]:
            some, whole[_key_of(job)] = whole[_key_of(job)], []
            yield some


def _is_whole_model(job):
    return job.method in METHODS and job.options.get(METHODS[job.method].scope_option) == "model"


def _key_of(job):
    return job.method, repr(sorted(job.options.items())), tuple(source.model for source in job.sources)


def _tasks(jobs: MergeJobs, some: Sequence[TensorJob], writer: _Writer, pool: ThreadPoolExecutor) -> Iterator:
    """Everything that is left to do for some jobs, once the numbers about their leaves are known."""
    if some[0].method == "copy":
        for job in some:
            yield from _copies(jobs, job, writer)
        return
    method = METHODS[some[0].method]
    leaves = [store_leaf(jobs, job, method) for job in some]
    view = StreamView(leaves, pool.map)
    combine = method.prepare(view, some[0].options)
    for job, leaf, start in zip(some, leaves, view.starts, strict=True):
        spans = list(leaf.split(SPAN))
        left = itertools.count(len(spans) - 1, -1)
        for low, high in spans:
            yield functools.partial(_merge_span, job, leaf, combine, start, low, high, writer, left)


def store_leaf(jobs: MergeJobs, job: TensorJob, method: Method) -> StoredLeaf:
    """Readers of what a job is made from."""

    def reader(source):
        leaf = flatten(jobs.models[source.model].params)[source.name]
        return TensorReader(source.name, leaf, job.shape, dtype=job.dtype, rows=source.rows, filler=source.filler)

    base = None if job.base is None else reader(job.base)
    return StoredLeaf(job.name, [reader(s) for s in job.sources], base, unit=method.unit, seed=jobs.seed)


def _merge_span(job, leaf, combine: Combine, start, low, high, writer, left):
    """Merges one span of a leaf, block by block, and writes it."""
    dtype = writer.dtype_of(job.name)
    merged = np.empty(high - low, dtype)
    for first, last in _blocks(leaf, low, high):
        values = np.asarray(combine(leaf.elements(first, last, start=start))).reshape(-1)
        if not narrow_into(job.name, values, merged[first - low : last - low]):
            raise _non_finite(job, leaf, first, last)
    writer.write(job.name, low, merged)
    if next(left) == 0:
        leaf.release()


def _blocks(leaf, low, high):
    if leaf.unit == "leaf":
        return [(low, high)]
    step = BLOCK if leaf.unit == "element" else max(1, BLOCK // leaf.row_length) * leaf.row_length
    return [(first, min(first + step, high)) for first in range(low, high, step)]


def _non_finite(job, leaf, first, last):
    """Which of the inputs holds NaN or Inf, or that none does."""
    guilty = [
        reader_name
        for reader_name, reader in zip(
            [*(f"model {n}" for n in range(len(leaf.models))), *(["the base"] if leaf.base else [])],
            leaf.readers,
            strict=True,
        )
        if not is_finite(reader.read_stored(first, last))
    ]
    where = f"tensor {job.name!r}, elements {first} to {last}"
    if guilty:
        return NonFiniteError(f"{where}: {' and '.join(guilty)} hold NaN or Inf. Use an earlier checkpoint.")
    return NonFiniteError(
        f"{where}: {job.method} makes NaN or Inf of finite numbers; weights that sum to zero do so where they are "
        "normalised. Change the weights, or set normalize: false."
    )


def _copies(jobs, job, writer):
    """One source as it is, which all others must equal."""
    readers = [
        TensorReader(s.name, flatten(jobs.models[s.model].params)[s.name], job.shape, rows=s.rows, filler=s.filler)
        for s in (*(() if job.base is None else (job.base,)), *job.sources)
    ]

    def copy(low, high):
        first = readers[0].read_stored(low, high)
        for other in readers[1:]:
            if not np.array_equal(first, other.read_stored(low, high)):
                raise TreeMismatchError(
                    f"tensor {job.name!r} ({first.dtype}) is copied and not merged, and the models differ in it "
                    f"between elements {low} and {high}. Make them equal, or leave one model out."
                )
        dtype = writer.dtype_of(job.name)
        writer.write(job.name, low, first if first.dtype == dtype else round_to_stored(job.name, first, dtype))

    for low in range(0, math_prod(job.shape), SPAN):
        yield functools.partial(copy, low, min(low + SPAN, math_prod(job.shape)))


def math_prod(shape):
    return int(np.prod(shape, dtype=np.int64))
