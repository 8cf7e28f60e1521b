"""What a merge will take, from its jobs alone: bytes, memory, time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.lazy import is_lazy
from jaxtune.merge.arrays import compute_dtype
from jaxtune.merge.long import RUN as LONG_RUN
from jaxtune.merge.registry import METHODS
from jaxtune.recipes.jobs import MergeJobs, TensorJob
from jaxtune.stream.engine import BLOCK, SPAN
from jaxtune.stream.files import OutputFiles
from jaxtune.stream.leaves import MOST_REMEMBERED
from jaxtune.stream.order import MAX_KEPT
from jaxtune.stream.run import count_cores

RUNTIME_BYTES = 90 * 2**20  # Python, NumPy and what forked processes change of it
# What else a worker holds: its copy of the interpreter's pages, and freed blocks; with it plans lie above what
# benchmarks/merge.py measures (ties 260 MiB, della 299, of two workers).
WORKER_BYTES = 45 * 2**20
# Arrays of a run that a method holds beside the models and the base: what it computes, and temporaries.
WORKING_ARRAYS = {"element": 8, "row": 10, "leaf": 6}
# Nanoseconds an element and a model on one core, out of the figures of benchmarks/merge.py (two models, the start of
# 0.3 s and the disk's 0.3 s taken off); of methods that are not in them those of the slowest of their unit.
NANOSECONDS = {
    "linear": 1.6, "slerp": 4.5, "task_arithmetic": 1.8, "model_stock": 3.8, "dare_ties": 9.6, "breadcrumbs": 10.2,
    "della": 23.8, "sce": 10.8, "ties": 9.5,
}  # fmt: skip
OF_UNIT = {"element": 10.8, "row": 23.8, "leaf": 23.8}
LONG_SQUARES = 5  # of a long matrix: Gram matrix, its eigenvectors, and what LAPACK works in
NANOSECONDS_A_SIDE = 0.5  # and an element of a matrix: TSV-M of benchmarks/spectral.py, eight models, on a busy core
START_SECONDS, DISK_NANOSECONDS = 0.3, 0.25  # and a byte that has to be on the disk


@dataclass(frozen=True)
class MergePlan:
    """What a merge will take.

    Attributes:
        num_tensors: Of the output.
        num_merged: Of them those that are computed and not copied.
        read_bytes: Of the inputs, each once; methods that know the whole leaf first read it again from the page cache.
        write_bytes: Of the output.
        memory_bytes: Anonymous memory at the peak, at most about.
        num_workers: Processes (or threads) that fit.
        seconds: With warm files, about.
        methods: Name -> number of tensors.
        dtypes: Dtype -> number of tensors of the output.
    """

    num_tensors: int
    num_merged: int
    read_bytes: int
    write_bytes: int
    memory_bytes: int
    num_workers: int
    seconds: float
    methods: Mapping[str, int]
    dtypes: Mapping[str, int]


def plan_merge(
    jobs: MergeJobs, files: OutputFiles, *, memory_bytes: int | None = None, num_workers: int | None = None
) -> MergePlan:
    """Adds up what every job takes.

    Args:
        jobs: Resolved.
        files: Where they go.
        memory_bytes: What may be used; fewer workers are taken where they would need more.
        num_workers: Workers at most; None: one a core.

    Raises:
        ConfigError: even one worker needs more memory.
    """
    num_workers = num_workers or count_cores()
    costs: dict[tuple, tuple[int, float]] = {}  # by all that they depend on: most jobs are as many others are
    needs, where, cost = 0, "", 0.0
    for job in jobs.jobs:
        key = (job.method, job.shape, job.dtype, job.out_dtype, len(job.sources), job.base is None, id(job.options))
        found = costs.get(key)
        if found is None:
            found = costs[key] = (memory_of(job) + WORKER_BYTES, _nanoseconds(job))
        needs, where = max((needs, where), (found[0], job.name))
        cost += found[1]
    stored = [model.layout.tensors for model in jobs.models]
    leaves = [getattr(model, "params", {}) for model in jobs.models]  # of models that are made first: none yet
    are_lazy = any(is_lazy(leaf) for own in leaves for leaf in own.values())
    whole = max((_lazy_bytes(leaves, job) for job in jobs.jobs), default=0) if are_lazy else 0
    if memory_bytes is not None:
        fits = (memory_bytes - RUNTIME_BYTES) // max(needs + whole, 1)
        if fits < 1:
            enough = f"{(RUNTIME_BYTES + whole + needs >> 20) + 1} MiB"
            raise ConfigError(
                f"a memory of {memory_bytes >> 20} MiB is too little: tensor {where!r} takes {enough}. Allow as much."
            )
        num_workers = min(num_workers, int(fits))
    methods: dict[str, int] = {}
    dtypes: dict[np.dtype, int] = {}
    read = 0
    for job in jobs.jobs:
        methods[job.method] = methods.get(job.method, 0) + 1
        dtypes[job.out_dtype] = dtypes.get(job.out_dtype, 0) + 1
        for source in _sources(job):
            read += _stored_bytes(stored[source.model].get(source.name))
    return MergePlan(
        num_tensors=len(jobs.jobs),
        num_merged=len(jobs.jobs) - methods.get("copy", 0),
        read_bytes=read,
        write_bytes=files.num_bytes,
        memory_bytes=RUNTIME_BYTES + num_workers * (needs + whole),
        num_workers=num_workers,
        seconds=START_SECONDS + (cost / num_workers + files.num_bytes * DISK_NANOSECONDS) * 1e-9,
        methods=methods,
        dtypes={str(dtype): count for dtype, count in dtypes.items()},
    )


def memory_of(job: TensorJob) -> int:
    """Bytes that one worker holds while it works on a job."""
    if job.method == "copy":
        return SPAN * job.out_dtype.itemsize
    method = METHODS[job.method]
    unit, size = method.unit_of(job.options, job.shape), math.prod(job.shape)
    wide = compute_dtype(job.out_dtype if job.dtype is None else job.dtype).itemsize
    run = {"element": BLOCK, "row": max(BLOCK, job.shape[-1] if job.shape else 1), "leaf": size}[unit]
    arrays = len(job.sources) + (job.base is not None) + WORKING_ARRAYS[unit]
    span = size if unit == "leaf" else min(SPAN, size)
    kept = min(MAX_KEPT, size) * (wide + 8) if "density" in job.options else 0
    if method.by_rows and unit == "row":  # what it knows of the whole, and runs of its passes
        kept += 8 * (min(job.shape) ** 2 * (LONG_SQUARES + len(job.sources)) + LONG_RUN * (len(job.sources) + 3))
    kept += min(MOST_REMEMBERED, size * len(job.sources)) // 8  # masks
    return min(run, max(size, 1)) * wide * arrays + span * job.out_dtype.itemsize + kept


def _lazy_bytes(leaves, job):
    """Bytes of the leaves of a job that are made as a whole: of adapters, of torch files that are not mapped."""
    own = (leaves[source.model].get(source.name) for source in _sources(job))
    return sum(leaf.nbytes for leaf in own if leaf is not None and is_lazy(leaf))


def _sources(job):
    return (*job.sources, *(() if job.base is None else (job.base,)))


def _stored_bytes(info):
    return 0 if info is None else math.prod(info.shape) * info.dtype.itemsize


def _nanoseconds(job):
    work = math.prod(job.shape) * len(job.sources)
    if job.method == "copy":
        return 0.0
    unit = METHODS[job.method].unit_of(job.options, job.shape)
    nanoseconds = work * NANOSECONDS.get(job.method, OF_UNIT[unit])
    if METHODS[job.method].unit == "leaf" and len(job.shape) == 2:
        nanoseconds += work * min(job.shape) * NANOSECONDS_A_SIDE
    return nanoseconds
