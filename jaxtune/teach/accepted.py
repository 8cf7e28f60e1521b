"""Inputs for distillation where the task's own are gone: candidates that a filter takes for the task's."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxtune.errors import ConfigError, DataError
from jaxtune.sample import Sample


def accept_inputs(
    candidates: Sample | Iterable[Sample],
    accept: Callable[[Mapping[str, Any]], np.ndarray],
    count: int,
    *,
    max_candidates: int | None = None,
    chunk_size: int = 64,
) -> Sample:
    """The first `count` candidates that a filter accepts.

    Candidates are given, or made as they are asked for (by sampling from the new base, say): nothing is asked for once
    enough are accepted.

    Args:
        candidates: One sample, or samples of the same kind, without end if need be.
        accept: Batch of inputs -> bool[N]; for instance a discriminator that was trained while the task's own data was
            at hand.
        count: Wanted.
        max_candidates: Looked at, at most; needed where there is no end. None: all.
        chunk_size: Candidates that the filter sees at a time; the last chunk of a sample is padded.

    Returns:
        The accepted inputs, in their order, named after the first sample.

    Raises:
        ConfigError: a count below 1.
        DataError: fewer were accepted, and how many of how many: nothing is learned on fewer than were asked for. Or
            the filter's answer is no bool[N].

    Reference:
        Wang et al. 2024, arXiv:2405.17258, section 3.2.
    """
    for name, value in (("count", count), ("max_candidates", max_candidates), ("chunk_size", chunk_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    first, taken, num_seen = None, [], 0
    for sample in [candidates] if isinstance(candidates, Sample) else candidates:
        first = sample if first is None else first
        room = len(sample) if max_candidates is None else min(len(sample), max_candidates - num_seen)
        rows, seen = _accepted(sample.take(np.arange(room)), accept, count - sum(map(len, taken)), chunk_size)
        taken.append(sample.take(rows))
        num_seen += seen
        if sum(map(len, taken)) >= count or num_seen == max_candidates:
            break
    num_accepted = sum(map(len, taken))
    if num_accepted < count:
        name = "no candidates" if first is None else first.name
        raise DataError(
            f"{name}: {num_accepted} of {num_seen} candidates were accepted, {count} are wanted. "
            "Give more, or a filter that is less strict."
        )
    batch = {name: np.concatenate([one.batch[name] for one in taken]) for name in first.batch}
    return replace(first, batch=batch)


def _accepted(sample, accept, wanted, chunk_size):
    """(rows of the first accepted, how many were looked at)."""
    rows, num_seen = [], 0
    for chunk in sample.chunks(chunk_size):
        weight = chunk.pop("weight")
        is_accepted = np.asarray(accept(chunk))
        if is_accepted.shape != weight.shape or is_accepted.dtype != bool:
            raise DataError(
                f"the filter answered {is_accepted.dtype}{list(is_accepted.shape)} to {len(weight)} inputs; "
                "expected one bool each."
            )
        rows += (num_seen + np.flatnonzero(is_accepted & (weight > 0))).tolist()
        num_seen += int(weight.sum())
        if len(rows) >= wanted:
            break
    return rows[:wanted], num_seen
