"""What the demo measures: every transport and its controls, onto a newer release and onto another seed."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxtune import symmetry
from jaxtune.align.evidence import MatchEvidence, judge_match
from jaxtune.checkpoint import Checkpoint
from jaxtune.data import DataSource, open_source
from jaxtune.evaluate.classifier import Metrics, evaluate_classifier
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.models import registry
from jaxtune.models.readout import class_embeddings
from jaxtune.rng import named_key
from jaxtune.transport.controls import draw_as_long
from jaxtune.transport.prepared import Prepared, apply_transport
from jaxtune.transport.registry import prepare_transport, without_data
from jaxtune.tree import map_leaves, task_vector
from jaxtune.types import Params

TARGETS = {"release": "a newer release of the old base", "other": "a base from another seed"}
NUM_SUPPORT = 1800  # drawn glyphs of the test split: 50 a class
NUM_LINE = 720  # of them on every point of a line
SCALES = tuple(np.linspace(0.0, 1.5, 7).tolist())
WEIGHTS = tuple(np.linspace(0.0, 1.0, 11).tolist())
SWEPT = ("identity", "permutation", "transfusion", "full")


@dataclass
class Row:
    """One model of the table.

    Attributes:
        target: Key of `TARGETS`.
        kind: "base", "method", "control" or "ceiling".
        name: Method or control.
        task: Accuracy on held-out handwritten digits.
        support: Accuracy on held-out drawn glyphs, what the base was trained for.
        recovered: `(task - base) / (ceiling - base)`; None where there is nothing to recover.
        seconds: Of preparing the transport.
    """

    target: str
    kind: str
    name: str
    task: float
    support: float
    recovered: float | None = None
    seconds: float | None = None


@dataclass
class Story:
    """Everything that the demo shows.

    Attributes:
        rows: The table.
        evidence: Target -> evidence under the best permutation.
        chosen: Target -> what `auto` chose.
        sweeps: Target -> method -> accuracy on the validation digits at each of `SCALES`.
        lines: Target -> way of aligning -> loss on drawn glyphs at each of `WEIGHTS`.
        specialist: Accuracies of the old base's fine-tune, which all this is about.
    """

    rows: list[Row] = field(default_factory=list)
    evidence: dict[str, MatchEvidence] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    sweeps: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    lines: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    specialist: dict[str, float] = field(default_factory=dict)


def tell_story(
    models: Mapping[str, Checkpoint], *, seed: int = 0, progress: Callable[[int], None] = lambda num_done: None
) -> Story:
    """Carries the fine-tune to both new bases by every method and measures all of it.

    Args:
        models: As `demo.models.load_embedded` gives.
        seed: Of every random choice.
        progress: Called with the number of stages done, of `num_stages` in all.

    Returns:
        The story; test data is used once per row, sweeps use validation data.
    """
    config = registry.config_from_dict(models["old"].config)
    trees = {name: map_leaves(lambda _, leaf: leaf.astype(np.float32), model.params) for name, model in models.items()}
    symmetry_of = functools.partial(registry.symmetry_of, config)
    digits = {split: open_source("digits", split) for split in ("validation", "test")}
    glyphs = open_source("glyphs", "test", num_records=NUM_SUPPORT)
    measure = functools.partial(_measure, config)
    story = Story()
    tuned = trees["old_tuned"]
    story.specialist = {"task": measure(tuned, digits["test"]).accuracy, "support": measure(tuned, glyphs).accuracy}
    num_done = 0
    for target in TARGETS:
        key = named_key(jax.random.key(seed), target)
        base, ceiling = trees[target], trees[f"{target}_tuned"]

        def row(kind, name, params, seconds=None, target=target):
            task, support = (measure(params, source).accuracy for source in (digits["test"], glyphs))
            story.rows.append(Row(target, kind, name, task, support, seconds=seconds))

        row("base", "the new base alone", base)
        prepared = {}
        for method in without_data():
            began = time.perf_counter()
            prepared[method] = prepare_transport(
                named_key(key, method), symmetry_of, trees["old"], tuned, base, method=method
            )
            seconds = time.perf_counter() - began
            row("method", method, apply_transport(prepared[method], base), seconds)
            num_done += 1
            progress(num_done)
        story.chosen[target] = prepared["auto"].info["chosen"]
        for name, control in _controls(key, symmetry_of(), trees["old"], tuned).items():
            row("control", name, apply_transport(control, base))
        row("ceiling", "the new base fine-tuned itself", ceiling)
        _fill_recovered(story.rows, target)

        aligned = prepared["permutation"]
        story.evidence[target] = judge_match(
            named_key(key, "evidence"), aligned.spec, base, trees["old"], aligned.element
        )
        story.sweeps[target] = {
            method: [
                measure(apply_transport(prepared[method], base, scale), digits["validation"]).accuracy
                for scale in SCALES
            ]
            for method in SWEPT
        }
        story.lines[target] = {
            name: [measure(interpolate_linear(*ends, weight), glyphs, NUM_LINE).loss for weight in WEIGHTS]
            for name, ends in _ends(prepared, trees["old"], base).items()
        }
        num_done += 1
        progress(num_done)
    return story


def num_stages() -> int:
    """One per method, one for evidence, scales and lines; for each new base."""
    return len(TARGETS) * (len(without_data()) + 1)


def _controls(key, spec, source, tuned) -> dict[str, Prepared]:
    """What a method must beat to have carried anything: the same step in a direction that means nothing."""
    vector = task_vector(source, tuned)
    element = symmetry.random(named_key(key, "random element"), spec)
    return {
        "random element of the group": Prepared(symmetry.apply(spec, element, vector), spec),
        "random vector of the same norms": Prepared(draw_as_long(named_key(key, "random vector"), vector), spec),
    }


def _ends(prepared, source, base) -> dict[str, tuple[Params, Params]]:
    """Way of aligning -> the two ends of its line; each end computes what it did before."""
    permuted, full = prepared["permutation"], prepared["full"]
    turned = full.realise(symmetry.apply(full.spec, full.element, full.fold(source)), source)
    return {
        "as they are": (source, base),
        "permutation": (symmetry.apply(permuted.spec, permuted.element, source), base),
        "full": (turned, full.realise(full.fold(base), base)),
    }


def _fill_recovered(rows, target):
    ours = [row for row in rows if row.target == target]
    base, ceiling = (next(row.task for row in ours if row.kind == kind) for kind in ("base", "ceiling"))
    for row in ours:
        row.recovered = (row.task - base) / (ceiling - base) if ceiling != base else None


def _measure(config, params, source: DataSource, limit: int | None = None) -> Metrics:
    source = source if limit is None else _Head(source, limit)
    embeddings = class_embeddings(source.class_names, config.num_outputs)
    return evaluate_classifier(config, params, source, embeddings=embeddings, batch_size=360)


class _Head:
    """The first records of a source."""

    def __init__(self, source: DataSource, limit: int):
        self._source, self._limit = source, limit
        self.class_names = source.class_names

    def __len__(self) -> int:
        return min(self._limit, len(self._source))

    def __getitems__(self, indices) -> dict[str, Any]:
        return self._source.__getitems__(indices)
