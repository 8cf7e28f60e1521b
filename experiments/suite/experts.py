"""One base and a fine-tune of it for every task of a suite, plain or under the stress that merges are sensitive to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.rungs.networks import Networks, Schedule
from jaxtune.data import DataSource
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.tree import apply_task_vector, task_vector
from jaxtune.types import Params

STRESS_FACTOR, STRESS_SMOOTHING = 2.0, 0.3


@dataclass(frozen=True)
class Task:
    """Train to fine-tune on, validation to choose by, test to report on."""

    name: str
    train: DataSource
    validation: DataSource
    test: DataSource


def train_base(
    networks: Networks, config: Any, source: DataSource, schedule: Schedule, *, seed: int
) -> tuple[str, Params]:
    """(name, parameters) of the base of one seed."""
    name = f"base_{seed}"

    def start():
        return registry.init(named_key(jax.random.key(seed), "init"), config)

    return name, networks.train(name, start, source, schedule, seed=seed)


def train_experts(
    networks: Networks, base: tuple[str, Params], tasks: Mapping[str, Task], schedule: Schedule, *, seed: int
) -> dict[str, Params]:
    """Task -> the base fine-tuned on it."""
    name, params = base
    return {
        task.name: networks.train(f"{name}_{task.name}", lambda: params, task.train, schedule, seed=seed)
        for task in tasks.values()
    }


def put_under_stress(
    networks: Networks,
    base: tuple[str, Params],
    experts: Mapping[str, Params],
    tasks: Mapping[str, Task],
    schedule: Schedule,
    *,
    seed: int,
) -> dict[str, Params]:
    """The same experts, the first one's task vector twice as long and the second one fine-tuned on smoothed labels.

    Reference:
        The norms and confidences that differ between experts in DisTaC (arXiv:2508.01148).
    """
    name, params = base
    first, second = list(tasks)[:2]
    longer = apply_task_vector(params, task_vector(params, experts[first]), STRESS_FACTOR)
    smoothed = networks.train(
        f"{name}_{second}_smoothed",
        lambda: params,
        tasks[second].train,
        schedule,
        seed=seed,
        label_smoothing=STRESS_SMOOTHING,
    )
    return {**experts, first: jax.tree.map(np.asarray, longer), second: smoothed}
