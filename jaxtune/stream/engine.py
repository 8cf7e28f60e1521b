"""From jobs to tasks: what has to be known of whole leaves, and then their spans, each for itself."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtune.checkpoint.rounding import round_to_stored
from jaxtune.errors import NonFiniteError, TreeMismatchError
from jaxtune.merge.arrays import RUN
from jaxtune.merge.options import check_options
from jaxtune.merge.post_steps import POST_STEPS, Place
from jaxtune.merge.registry import METHODS
from jaxtune.merge.view import Combine
from jaxtune.recipes.jobs import TensorJob
from jaxtune.stream.inputs import Inputs
from jaxtune.stream.leaves import Leaf, SteppedLeaf, split
from jaxtune.stream.values import is_finite, narrow_into
from jaxtune.stream.view import StreamView

BLOCK = RUN  # elements that are merged in one go: a few arrays of them fit into a core's cache
SPAN = 1 << 20  # elements of one task, and of one write

# (leaf, combine, place of the leaf's first element, low, high, out) -> whether all is finite; fills `out`.
MergeSpan = Callable[[Leaf, Combine, int, int, int, np.ndarray], bool]


def group_jobs(jobs: Sequence[TensorJob]) -> Iterator[list[TensorJob]]:
    """Jobs one by one; those whose method looks at the whole model at once, together, where their turn first comes."""
    whole: dict[Any, list[TensorJob]] = {}
    for job in jobs:
        if is_of_whole_model(job):
            whole.setdefault(_key_of(job), []).append(job)
    for job in jobs:
        if not is_of_whole_model(job):
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


class Engine:
    """Turns jobs into tasks, each of which writes one span of a tensor.

    Args:
        jobs: With their models.
        writer: Where spans go.
        map_groups: `map`, possibly of a pool: does the passes over whole leaves.
        merge_span: Does the arithmetic of a span.
        share: What is this process's: `touches(job)`, `has(job, first element of a span)`.
        advance: Told the bytes of every span that is written.
        known: Name of the first of some jobs -> what `prepare` gave for them.
    """

    def __init__(self, jobs, writer, map_groups, merge_span, share, advance, known=None):
        self._jobs, self._inputs, self._writer, self._map = jobs, Inputs(jobs), writer, map_groups
        self._known = known or {}
        self._merge_span, self._share, self._advance = merge_span, share, advance

    def tasks(self, some: Sequence[TensorJob]) -> Iterable[Callable[[], None]]:
        """All that is to do for some jobs, once the numbers about their leaves are known."""
        if not any(map(self._share.touches, some)):
            return
        if some[0].method == "copy":
            for job in some:
                yield from self._copies(job)
            return
        for job, leaf, combine, start in self._known.get(some[0].name) or self.prepare(some):
            length = getattr(self._merge_span, "span", SPAN)
            spans = [span for span in split(leaf, length) if self._share.has(job, span[0])]
            left = itertools.count(len(spans) - 1, -1)
            for low, high in spans:
                yield functools.partial(self._merge, job, leaf, combine, start, low, high, left)

    def prepare(self, some: Sequence[TensorJob]) -> list[tuple[TensorJob, Leaf, Combine, int]]:
        """(job, leaf, combine, place of its first element) of some jobs, the numbers about them known."""
        prepared = []
        leaves = [self._inputs.open_leaf(job) for job in some]
        view = StreamView(leaves, self._map)
        combine = METHODS[some[0].method].prepare(view, some[0].options)
        for job, leaf, start in zip(some, leaves, view.starts, strict=True):
            chosen = combine
            for name, options in job.post:
                step, base = POST_STEPS[name], self._inputs.open_tensor(job, job.base)
                leaf = SteppedLeaf(leaf, chosen, base, unit=step.unit_of(options))
                place = {"place": Place(job.layer, job.num_layers or 0)} if "place" in step.options else {}
                full = check_options(step, {**options, **place}, 1, has_base=True, name=name)
                chosen = step.prepare(StreamView([leaf], self._map), full)
            prepared.append((job, leaf, chosen, start))
        return prepared

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


def is_of_whole_model(job: TensorJob) -> bool:
    """Whether a job's method looks at all leaves at once."""
    return job.method in METHODS and job.options.get(METHODS[job.method].scope_option) == "model"


def _key_of(job):
    return job.method, repr(sorted(job.options.items())), tuple(source.model for source in job.sources)


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
