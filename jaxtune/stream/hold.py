"""A merge whose tensors stay in memory: the very values that a file would hold, for models that are to be tried."""

import math

import numpy as np

from jaxtune.recipes.jobs import MergeJobs
from jaxtune.stream.engine import Engine, group_jobs, merge_on_host


def merge_in_memory(jobs: MergeJobs) -> dict[str, np.ndarray]:
    """Every tensor of the output by its stored name, in its stored dtype.

    Args:
        jobs: Whose models are all made.

    Raises:
        JaxtuneError: as `stream.run.run_merge`.
    """
    writer = _Holder(jobs)
    engine = Engine(jobs, writer, map, merge_on_host, _All(), lambda _: None)
    for some in group_jobs(jobs.jobs):
        for task in engine.tasks(some):
            task()
    return {job.name: writer.flat[job.name].reshape(job.shape) for job in jobs.jobs}


class _Holder:
    """Takes spans as `writer.Writer` does, and keeps them."""

    def __init__(self, jobs):
        self.flat = {job.name: np.empty(math.prod(job.shape), job.out_dtype) for job in jobs.jobs}

    def dtype_of(self, name):
        return self.flat[name].dtype

    def write(self, name, low, values):
        self.flat[name][low : low + values.size] = values.reshape(-1)


class _All:
    """The share of a process that is alone."""

    def touches(self, job):
        return True

    def has(self, job, low):
        return True
