"""What is measured on one pair of bases and one task: every way to use n examples, beside what needs none."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.samples.ways import WAYS, Given
from jaxtune.data import DataSource, take_few, take_sample
from jaxtune.evaluate.classifier import evaluate_classifier
from jaxtune.evaluate.sweep import evaluate_scales
from jaxtune.models.readout import class_embeddings
from jaxtune.sample import Sample
from jaxtune.sampling import make_sample
from jaxtune.symmetry import Spec
from jaxtune.transport.prepared import Prepared
from jaxtune.tree import task_vector
from jaxtune.types import Params

EVAL_BATCH = 250
# Of the way from the new base to a result: what is gained against what is lost of the support on each part of it.
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Bases:
    """One pair: old base, its fine-tune on the task, new base, and the new base fine-tuned on the whole task."""

    source: Params
    finetuned: Params
    target: Params
    ceiling: Params


def measure_without(config: Any, bases: Bases, test: DataSource, support: DataSource) -> list[dict[str, Any]]:
    """Rows of the ends of the scale: the new base, its own fine-tune, and the old one's."""
    ends = {"base": bases.target, "ceiling": bases.ceiling}
    return [
        {"way": name, "size": 0, "accuracy": score(config, params, test), "support": score(config, params, support)}
        for name, params in ends.items()
    ]


def measure_sample(
    config: Any,
    bases: Bases,
    ways: Mapping[str, Mapping[str, Any]],
    train: DataSource,
    test: DataSource,
    support: DataSource,
    keep: Sample,
    *,
    size: int | str,
    draw: int,
    key: jax.Array,
    pair_key: jax.Array,
    known: dict[str, Any],
    aligned: dict[str, Prepared],
) -> list[dict[str, Any]]:
    """One row a way, of the same examples for all.

    Args:
        config: Of the family.
        bases: The pair.
        ways: Name -> {"way": of `WAYS`, "options": ..., "start": a data-free transport or another way}.
        train: What examples are drawn from.
        test: Test records of the task; nothing is chosen by them.
        support: Test records of the pre-training task.
        keep: Train records of it without labels, for ways that are to keep it.
        size: Number of examples, "2 a class", or 0 for what needs none.
        draw: Seed of the draw.
        key: Of the methods that look at examples.
        pair_key: Of those that need none.
        known: What data-free ways made of this task, kept for all sizes.
        aligned: What they found between the bases, kept for all tasks.
    """
    sample = None
    if size:
        part = _draw(train, size, draw)
        sample = make_sample(config, part)
    given = Given(
        config, bases.source, bases.finetuned, bases.target, sample, keep, key, pair_key, known, aligned, ways
    )
    rows = []
    for name, way in ways.items():
        if (size == 0) != WAYS[way["way"]].is_free:
            continue
        began = time.perf_counter()
        result = given.make(name)
        row = {"way": name, "size": size, "seconds": round(time.perf_counter() - began, 3)}
        if callable(result):  # a rule of prediction rather than a network
            rows.append({**row, "accuracy": score_rule(result, test)})
            continue
        rows.append({**row, **_score_way(config, bases.target, result, test, support)})
    return rows


def score(config: Any, params: Params, source: DataSource) -> float:
    """Accuracy."""
    embeddings = class_embeddings(source.class_names, config.num_outputs)
    return evaluate_classifier(config, params, source, embeddings=embeddings, batch_size=EVAL_BATCH).accuracy


def score_rule(predict: Any, source: DataSource) -> float:
    """Accuracy of a function from a batch to logits."""
    right = 0
    for start in range(0, len(source), EVAL_BATCH):
        batch = source.__getitems__(np.arange(start, min(start + EVAL_BATCH, len(source))))
        right += int(np.sum(np.argmax(np.asarray(predict(batch)), axis=-1) == batch["label"]))
    return right / len(source)


def _draw(train, size, draw):
    if isinstance(size, str):
        return take_few(train, int(size.split()[0]), seed=draw)
    return take_sample(train, size, seed=draw)


def _score_way(config, target, result, test, support) -> dict[str, Any]:
    """Accuracy on task and support, of the result and of points on the way to it from the new base."""
    prepared = Prepared(task_vector(target, jax.tree.map(np.asarray, result)), Spec({}, {}))
    curves = {}
    for name, source in (("task", test), ("support", support)):
        embeddings = class_embeddings(source.class_names, config.num_outputs)
        metrics = evaluate_scales(config, prepared, target, source, SHARES, embeddings=embeddings)
        curves[name] = [one.accuracy for one in metrics]
    return {"accuracy": curves["task"][-1], "support": curves["support"][-1], "curve": curves}
