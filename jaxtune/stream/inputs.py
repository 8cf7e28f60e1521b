"""The models of a merge as readers of tensors."""

from typing import Any

import numpy as np

from jaxtune.merge.registry import METHODS
from jaxtune.recipes.fills import fill_rows
from jaxtune.recipes.jobs import MergeJobs, Source, TensorJob
from jaxtune.stream.leaves import StoredLeaf
from jaxtune.stream.tensors import TensorReader
from jaxtune.tree import flatten


class Inputs:
    """Opens what jobs name.

    Args:
        jobs: Whose models are all made (`MergeJobs.models`).
    """

    def __init__(self, jobs: MergeJobs):
        self._seed, self._leaves = jobs.seed, [flatten(model.params) for model in jobs.models]

    def open_leaf(self, job: TensorJob) -> StoredLeaf:
        """Readers of what a job is made from."""
        base = None if job.base is None else self.open_tensor(job, job.base)
        models = [self.open_tensor(job, source) for source in job.sources]
        data = [source.data for source in job.sources]
        extras = None if any(one is None for one in data) else data
        unit = METHODS[job.method].unit_of(job.options, job.shape)
        return StoredLeaf(job.name, models, base, unit=unit, seed=self._seed, extras=extras)

    def open_tensor(self, job: TensorJob, source: Source) -> TensorReader:
        """The reader of one of them."""
        filler = source.filler
        if source.fills and filler is None:
            filler = fill_rows(source, self._read_rows)
        leaf = self._leaves[source.model][source.name]
        return TensorReader(source.name, leaf, job.shape, dtype=job.dtype, rows=source.rows, filler=filler)

    def _read_rows(self, model: int, name: str, rows: np.ndarray) -> Any:
        return np.asarray(self._leaves[model][name])[rows]
