"""A base comes out again and again: the difference that fine-tuning made is carried from release to release."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.evaluate.line import Line, evaluate_line
from jaxtune.sample import Sample
from jaxtune.tree import MAX_LINES, check_same, describe_leaf, flatten, is_float, unflatten
from jaxtune.types import Params

# (network to start from, number of the release, counted from 0) -> its fine-tune; any trainer.
Tune = Callable[[Params, int], Params]


@dataclass(frozen=True)
class Version:
    """One release and its fine-tune.

    Attributes:
        start: What training began from: the release, with the difference of the release before.
        tuned: What it became.
        lines: Sample's name -> the line from the release before to this one; empty for the first.
        info: "norm" of the difference that was recycled and of the one that came out, and their "cosine"; NaN where
            there is none.
    """

    start: Params
    tuned: Params
    lines: dict[str, Line]
    info: dict[str, float]


def transfer_difference(
    old: Params,
    finetuned: Params,
    new: Params,
    *,
    scale: float = 1.0,
    vocabulary: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """`new + scale (finetuned - old)`, the difference in float64, rounded once to the dtypes of `new`.

    Args:
        old, finetuned, new: Old base, its fine-tune, new base.
        scale: λ.
        vocabulary: Path -> axis of every leaf with one row per token (`models.registry.vocabulary_axes`): these may
            have grown at the end. A token that the new base added keeps its row; one that the fine-tune added gets the
            fine-tune's. Tokens are taken to stand where they stood; `transport.vocabulary` matches others.

    Raises:
        TreeMismatchError: another architecture, or a vocabulary that shrank: names the leaf.

    Reference:
        Lin et al. 2025, arXiv:2503.20110. A shrunken vocabulary is refused; the release does not look.
    """
    old, finetuned, new = _match({"old": old, "finetuned": finetuned, "new": new}, vocabulary or {})
    check_same({"old": old, "finetuned": finetuned})
    check_same({"old": old, "new": new})
    tuned, bases = flatten(finetuned), flatten(old)

    def add(path, leaf):
        if not is_float(leaf):
            return leaf
        difference = np.asarray(tuned[path], np.float64) - np.asarray(bases[path], np.float64)
        return (np.asarray(leaf, np.float64) + scale * difference).astype(leaf.dtype)

    return unflatten({path: add(path, leaf) for path, leaf in flatten(new).items()})


def check_connection(
    old: Params, new: Params, samples: Sequence[Sample], *, vocabulary: Mapping[str, int] | None = None
) -> dict[str, Line]:
    """The line between two releases, 25 points: a difference carries over where no barrier lies between them.

    Args:
        old, new: Releases.
        samples: Labelled examples of what both can do.
        vocabulary: As `transfer_difference`; rows that the old release lacks are zero at its end of the line.

    Returns:
        Sample's name -> line.

    Raises:
        TreeMismatchError: another architecture, or a vocabulary that shrank.
        DataError: a sample without labels.
    """
    old, new = _match({"old": old, "new": new}, vocabulary or {})
    check_same({"old": old, "new": new})
    return {sample.name: evaluate_line(old, new, sample) for sample in samples}


def recycle(
    releases: Sequence[Params],
    tune: Tune,
    *,
    samples: Sequence[Sample] = (),
    scale: float = 1.0,
    vocabulary: Mapping[str, int] | None = None,
    max_barrier: float | None = None,
) -> list[Version]:
    """Fine-tunes every release from where the one before left off.

    `Δ_1 = FT(m_1) - m_1`; then `Δ_i = FT(m_i + λ Δ_{i-1}) - m_i`.

    Args:
        releases: m_1, m_2, ... of one architecture.
        tune: FT. Resuming is its own affair: it is asked for the releases in their order, once each.
        samples: Labelled; before a release is touched, the line to it from the one before is measured on each.
        scale: λ.
        vocabulary: As `transfer_difference`.
        max_barrier: Stops at a release behind a higher barrier, in nats, on any sample; None only reports.

    Raises:
        ConfigError: no release; a barrier above `max_barrier`.
        TreeMismatchError: a release or a fine-tune of another architecture, or with a smaller vocabulary.

    Reference:
        Lin et al. 2025, arXiv:2503.20110, section 5 (recycling-then-fine-tuning).
    """
    if not releases:
        raise ConfigError("there is no release to fine-tune.")
    if max_barrier is not None and not samples:
        raise ConfigError("max_barrier needs samples to measure barriers on.")
    versions: list[Version] = []
    for number, release in enumerate(releases):
        lines: dict[str, Line] = {}
        start = release
        if number:
            lines = check_connection(releases[number - 1], release, samples, vocabulary=vocabulary)
            _check_barriers(lines, number, max_barrier)
            before = releases[number - 1], versions[-1].tuned
            start = transfer_difference(*before, release, scale=scale, vocabulary=vocabulary)
        tuned = tune(start, number)
        given, made = _difference(release, start, vocabulary), _difference(release, tuned, vocabulary)
        norms = math.sqrt(_dot(given, given)), math.sqrt(_dot(made, made))
        cosine = _dot(given, made) / (norms[0] * norms[1]) if norms[0] and norms[1] else math.nan
        info = {"recycled_norm": norms[0], "norm": norms[1], "cosine": cosine}
        versions.append(Version(start, tuned, lines, info))
    return versions


def _check_barriers(lines, number, max_barrier):
    for name, line in lines.items():
        if max_barrier is not None and line.barrier.height > max_barrier:
            raise ConfigError(
                f"release {number}: on {name} a barrier of {line.barrier.height:.3g} nats lies between it and the "
                f"release before, more than max_barrier {max_barrier:g}. A difference will not carry over as it is: "
                "transport it (method auto or full), or fine-tune this release from its own weights."
            )


def _match(trees: Mapping[str, Params], vocabulary: Mapping[str, int]) -> list[dict[str, Any]]:
    """The trees, every vocabulary padded with zeros to the largest; the last one's may not be below the old one's."""
    flats = {name: flatten(params) for name, params in trees.items()}
    *others, (last, newest) = flats.items()
    lines = []
    for path, axis in vocabulary.items():
        for name, flat in others:
            sizes = [one[path].shape[axis] if path in one else 0 for one in (flat, newest)]
            # What a fine-tune added to the old vocabulary may well be missing from the new base.
            allowed = sizes[0] if name != "finetuned" else flats["old"][path].shape[axis] if path in flats["old"] else 0
            if sizes[1] < allowed:
                lines.append(f"  {path}: {name} {describe_leaf(flat[path])}, {last} {describe_leaf(newest[path])}")
    if lines:
        raise TreeMismatchError(
            f"the vocabulary of {last} is smaller than that of the release before:\n"
            + "\n".join(dict.fromkeys(lines[:MAX_LINES]))
            + "\nWhich tokens were dropped is not told by numbers of rows: match the rows by token "
            "(jaxtune transport does, where both tokenizers are there)."
        )
    sizes = {
        path: max(flat[path].shape[axis] for flat in flats.values() if path in flat)
        for path, axis in vocabulary.items()
    }

    def pad(path, leaf):
        if path not in sizes or leaf.shape[vocabulary[path]] == sizes[path]:
            return leaf
        widths = [(0, 0)] * leaf.ndim
        widths[vocabulary[path]] = (0, sizes[path] - leaf.shape[vocabulary[path]])
        return np.pad(np.asarray(leaf), widths)

    return [unflatten({path: pad(path, leaf) for path, leaf in flat.items()}) for flat in flats.values()]


def _difference(release, params, vocabulary):
    release, params = _match({"old": release, "tuned": params}, vocabulary or {})
    check_same({"release": release, "fine-tune": params})
    news = flatten(params)
    return {
        path: np.asarray(news[path], np.float64) - np.asarray(leaf, np.float64)
        for path, leaf in flatten(release).items()
        if is_float(leaf)
    }


def _dot(first, second):
    return math.fsum(float(np.vdot(leaf, second[path])) for path, leaf in first.items())
