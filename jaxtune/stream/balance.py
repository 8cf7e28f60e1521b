"""The strength of LiNeS for several tasks, read off the models in a pass of its own before the merge."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxtune.recipes.jobs import MergeJobs
from jaxtune.recipes.steps import is_balanced
from jaxtune.stream.engine import BLOCK, Engine, group_jobs, is_of_whole_model, merge_on_host
from jaxtune.stream.forks import can_fork, map_forked
from jaxtune.stream.inputs import Inputs
from jaxtune.stream.leaves import split


def balance_steps(jobs: MergeJobs, *, num_workers: int = 1) -> tuple[MergeJobs, dict[str, float]]:
    """The jobs with a number where a step's strength is "balanced": `‖Σ τ_t‖₁ / (T ‖τ_merged‖₁)` over all tensors.

    Args:
        jobs: With all models made.
        num_workers: Forked processes that share the reading; the number does not depend on them.

    Returns:
        And the numbers that were found, by the step's place: "lines 1".

    Reference:
        Wang et al. 2024, arXiv:2410.17146; `merge.post_steps.balance_norms` is the same in memory.
    """
    found: dict[str, float] = {}
    while True:
        asked = {
            at for job in jobs.jobs for at, (name, options) in enumerate(job.post) if is_balanced(name, options)
        }  # fmt: skip
        if not asked:
            return jobs, found
        at = min(asked)  # steps before it are known by now
        alpha = _find_alpha(jobs, at, num_workers)
        found[f"lines {at + 1}"] = alpha
        jobs = dataclasses.replace(jobs, jobs=tuple(_with_alpha(job, at, alpha) for job in jobs.jobs))


def _with_alpha(job, at, alpha):
    post = tuple(
        (name, {**options, "alpha": alpha} if n == at and is_balanced(name, options) else options)
        for n, (name, options) in enumerate(job.post)
    )
    return dataclasses.replace(job, post=post)


def _find_alpha(jobs: MergeJobs, at: int, num_workers: int) -> float:
    before = [dataclasses.replace(job, post=job.post[:at]) for job in jobs.jobs if len(job.post) > at]
    before = [job for job in before if job.method != "copy" and job.base is not None]
    inputs, engine = Inputs(jobs), Engine(jobs, None, map, merge_on_host, None, None)
    groups = list(group_jobs(before))
    # Where a method looks at the whole model there is one group, and what it has to know is known to all alike.
    known = {some[0].name: engine.prepare(some) for some in groups if is_of_whole_model(some[0])}

    def add_up(some) -> list[tuple[float, float]]:
        return [_lengths(inputs, *one) for one in known.get(some[0].name) or engine.prepare(some)]

    map_groups: Any = map_forked(num_workers) if can_fork() else map
    pairs = [pair for part in map_groups(add_up, groups) for pair in part]
    above, below = (math.fsum(one) for one in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return 1.0 if below == 0 else above / below


def _lengths(inputs, job, leaf, combine, start):
    """(`‖Σ τ_t‖₁ / T`, `‖τ_merged‖₁`) of one tensor."""
    readers = [inputs.open_tensor(job, source) for source in job.sources]
    base = inputs.open_tensor(job, job.base)
    above, below = [], []
    for low, high in split(leaf, BLOCK):
        start_values = base.read(low, high, np.float64)
        total = sum(reader.read(low, high, np.float64) for reader in readers) - len(readers) * start_values
        merged = np.asarray(combine(leaf.elements(low, high, start=start)), np.float64).reshape(-1)
        above.append(float(np.abs(total).sum()) / len(readers))
        below.append(float(np.abs(merged - start_values).sum()))
    for reader in (*readers, base):
        reader.release()
    leaf.release()
    return math.fsum(above), math.fsum(below)
