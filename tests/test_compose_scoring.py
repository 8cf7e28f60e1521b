"""One number for several tasks, where an expert knows nothing of its examples too."""

import dataclasses

import numpy as np
import pytest
from toy_tasks import add, make_base, make_task, make_vectors

from jaxtune.compose.registry import compose
from jaxtune.compose.scoring import mean_score, score, share_of

BASE = make_base()
EXPERTS = [add(BASE, [vector], [1.0]) for vector in make_vectors(2)]


def accuracies(*values):
    return [{"accuracy": value} for value in values]


def test_an_accuracy_counts_beside_the_experts():
    assert mean_score(accuracies(0.5, 0.6)) == pytest.approx(0.55)
    assert mean_score(accuracies(0.4, 0.6), accuracies(0.8, 0.5)) == pytest.approx((0.5 + 1.2) / 2)
    assert mean_score([{"agreement": 0.3}, {"accuracy": 0.5}], accuracies(0.1, 1.0)) == pytest.approx(0.4)


def test_an_expert_without_a_right_answer_does_not_decide_for_all():
    assert share_of(0.5, 0.0) == 0.5
    good, bad = (mean_score(accuracies(*values), accuracies(0.0, 0.9)) for values in ((0.1, 0.9), (0.2, 0.1)))
    assert good == pytest.approx((0.1 + 1) / 2)
    assert bad < good


def test_the_strength_of_lines_is_not_chosen_by_a_task_that_its_expert_does_not_know():
    samples = [make_task(expert, seed=n, name=f"task {n}") for n, expert in enumerate(EXPERTS)]
    classes = samples[0].forward(EXPERTS[0], samples[0].batch).shape[-1]
    wrong = np.int32((samples[0].batch["label"] + 1) % classes)
    samples[0] = dataclasses.replace(samples[0], batch={**samples[0].batch, "label": wrong})
    assert score(EXPERTS[0], samples[0])["accuracy"] == 0
    found = compose("lines", BASE, EXPERTS, samples)
    assert 0 < max(found.info["scores"].values()) <= 2
