"""Several tasks in one number, and that number beside a reference's."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxtune.errors import ConfigError


@dataclass(frozen=True)
class TaskMeans:
    """Accuracy over tasks, absolute and normalised.

    The two normalised numbers differ where tasks are of unequal difficulty; papers mostly report the first and
    do not always say so.

    Attributes:
        per_task: Task -> accuracy.
        ratios: Task -> accuracy / reference.
        mean: Of the accuracies.
        mean_of_ratios: Of the ratios.
        ratio_of_means: Mean accuracy / mean reference.
    """

    per_task: dict[str, float]
    ratios: dict[str, float]
    mean: float
    mean_of_ratios: float
    ratio_of_means: float


def normalise_tasks(accuracies: Mapping[str, float], references: Mapping[str, float]) -> TaskMeans:
    """Accuracies of one model on every task, beside those of each task's own model.

    Args:
        accuracies: Task -> accuracy.
        references: Task -> accuracy of the model that was fine-tuned for it.

    Raises:
        ConfigError: the tasks differ, there is none, or a reference is not above 0.
    """
    odd = sorted(accuracies.keys() ^ references.keys())
    if odd or not accuracies:
        raise ConfigError(f"accuracies and references are not of the same tasks: {', '.join(odd) or 'there are none'}.")
    low = [name for name, value in references.items() if not value > 0]
    if low:
        raise ConfigError(f"nothing is measured against a reference of {references[low[0]]}: {', '.join(low)}.")
    ratios = {name: value / references[name] for name, value in accuracies.items()}
    ours, theirs = (float(np.mean([values[name] for name in accuracies])) for values in (accuracies, references))
    return TaskMeans(dict(accuracies), ratios, ours, float(np.mean(list(ratios.values()))), ours / theirs)
