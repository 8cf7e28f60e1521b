"""How well one model does on every task of a suite, beside what the experts do."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.suite.experts import Task
from jaxtune.data import DataSource
from jaxtune.evaluate.classifier import evaluate_classifier
from jaxtune.evaluate.sweep import evaluate_scales
from jaxtune.evaluate.tasks import normalise_tasks
from jaxtune.models.readout import class_embeddings
from jaxtune.symmetry import Spec
from jaxtune.transport.prepared import Prepared
from jaxtune.tree import apply_task_vector, task_vector
from jaxtune.types import Params

EVAL_BATCH = 250


def score_tasks(config: Any, params: Params, tasks: Mapping[str, Task], *, split: str) -> dict[str, float]:
    """Task -> accuracy on its validation or test records."""
    return {name: _accuracy(config, params, getattr(task, split)) for name, task in tasks.items()}


def normalise(accuracies: Mapping[str, float], ceilings: Mapping[str, float]) -> dict[str, float]:
    """Mean accuracy, mean of the shares of the experts' accuracies, and share of the means."""
    found = normalise_tasks(accuracies, ceilings)
    return {
        "accuracy": found.mean,
        "mean_of_ratios": found.mean_of_ratios,
        "ratio_of_means": found.ratio_of_means,
    }


def choose_scale(
    config: Any, base: Params, merged: Params, tasks: Mapping[str, Task], scales: Sequence[float]
) -> tuple[float, Params, dict[float, float]]:
    """The scale of `merged - base` with the best mean accuracy on validation records; the smallest of equals.

    Returns:
        (scale, base + scale * (merged - base), scale -> mean validation accuracy).
    """
    vector = task_vector(base, merged)
    prepared = Prepared(vector, Spec({}, {}))
    table = []
    for task in tasks.values():
        metrics = evaluate_scales(
            config,
            prepared,
            base,
            task.validation,
            scales,
            embeddings=class_embeddings(task.validation.class_names, config.num_outputs),
        )
        table.append([one.accuracy for one in metrics])
    means = np.mean(table, axis=0)
    best = int(np.argmax(means))
    curve = {float(scale): float(mean) for scale, mean in zip(scales, means, strict=True)}
    return float(scales[best]), apply_task_vector(base, vector, scales[best]), curve


def _accuracy(config, params, source: DataSource):
    embeddings = class_embeddings(source.class_names, config.num_outputs)
    return evaluate_classifier(config, params, source, embeddings=embeddings, batch_size=EVAL_BATCH).accuracy
