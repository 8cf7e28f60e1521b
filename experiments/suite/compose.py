"""Methods that learn on a few examples of every task how to combine the experts."""

from collections.abc import Mapping
from typing import Any

from experiments.suite.experts import Task
from jaxtune.compose.registry import compose
from jaxtune.sampling import make_sample
from jaxtune.types import Params


def compose_experts(
    row: Mapping[str, Any],
    config: Any,
    base: Params,
    experts: Mapping[str, Params],
    tasks: Mapping[str, Task],
    *,
    num_samples: int,
    seed: int,
) -> Params:
    """The model that `jaxtune.compose` makes of the experts and of `num_samples` train records of every task.

    Args:
        row: "method", "options" and "is_labelled": whether the method may see the labels.
        config: Of the family.
        base, experts: As trained; experts in the order of the tasks.
        tasks: Whose train records are drawn.
        num_samples: A task.
        seed: Of the draw and of the method.
    """
    samples = [make_sample(config, task.train, num_examples=num_samples, seed=seed) for task in tasks.values()]
    if not row["is_labelled"]:
        samples = [sample.without_labels() for sample in samples]
    return compose(row["method"], base, list(experts.values()), samples, seed=seed, **row["options"]).params
