"""A polish of few examples: which rates it takes, who judges it, and that it works where nothing can be held out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_params

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.gradients import TeacherLoss
from jaxtune.models import mlp, registry
from jaxtune.polish import TASK_COST, polish_transport
from jaxtune.sample import Sample
from jaxtune.sampling import Forward
from jaxtune.teach.distill import teach_sample, told
from jaxtune.teach.judging import each_loss, find_gain
from jaxtune.teach.weights import whole_weights
from jaxtune.transport.prepared import Prepared

CONFIG = mlp.Config(image_shape=(4, 4, 1), widths=(6,), num_outputs=3)
TEACHER, TARGET = (random_params(CONFIG, seed=seed, dtype=np.float32) for seed in (0, 1))
PREPARED = Prepared(tree.task_vector(TARGET, TARGET), registry.symmetry_of(CONFIG))
THIRDS = [rate / 3 for rate in whole_weights(TARGET).rates]


def images(count, seed):
    return {"image": np.random.default_rng(seed).normal(size=(count, 4, 4, 1)).astype(np.float32)}


def polish(count, seed=0, **options):
    sample = Sample("dots", images(count, seed + count), Forward(CONFIG))
    options = {"polish": "distill", "num_steps": 3} | options
    params, prepared = polish_transport(jax.random.key(0), PREPARED, TARGET, TEACHER, TARGET, sample, **options)
    return params, prepared.info["polish"]


@pytest.mark.parametrize(("count", "options"), [(1, {}), (4, {}), (7, {}), (12, {"held_out": 0.0})])
def test_where_nothing_can_be_held_out_the_middle_rate_takes_all_steps(count, options):
    params, info = polish(count, **options)
    assert info["num_held"] == 0
    assert info["step"] == 3
    assert info["learning_rate"] == pytest.approx(THIRDS[1])
    assert any(np.any(leaf) for leaf in tree.flatten(tree.task_vector(TARGET, params)).values())


def test_of_eight_examples_four_choose_among_three_rates():
    _, info = polish(8)
    assert info["num_held"] == 4
    assert len(info["scores"]) == 3
    assert min(abs(info["learning_rate"] - rate) for rate in THIRDS) < 1e-9


@pytest.mark.parametrize(("count", "num_judges"), [(8, 8), (24, 20), (64, 52), (300, 60)])
def test_fifty_examples_judge_or_as_many_as_there_are(count, num_judges):
    _, info = polish(count)
    assert info["step"] > 0
    assert info["num_judges"] == num_judges


def noise(params, batch):
    """A teacher that tosses a coin for every image: what was seen of one image says nothing of the next."""
    del params
    place = jnp.sum(batch["image"] * 1e4, axis=(1, 2, 3)).astype(jnp.int32) % 3
    return 4.0 * jax.nn.one_hot(place, 3)


def test_what_helps_no_unseen_example_is_left_out():
    verdicts = []
    for seed in range(12):
        params, info = polish(32, seed=1000 * seed, teacher_forward=noise, num_steps=60, rate_factor=3.0)
        verdicts.append(info["verdict"])
        if info["verdict"] == "left out":
            jax.tree.map(np.testing.assert_array_equal, dict(params), dict(TARGET))
    assert verdicts.count("kept") <= 2  # one of twenty where nothing helps


@pytest.mark.parametrize("seed", range(6))
def test_what_helps_is_kept_in_every_draw(seed):
    params, info = polish(64, num_steps=60, rate_factor=3.0, seed=seed)
    assert info["verdict"] == "kept"
    assert info["likeness"][1] - info["likeness"][0] == pytest.approx(info["gain"])
    fresh = images(500, seed=77)
    losses = []
    for network in (TARGET, params):
        loss, told = teach_sample(Sample("fresh", fresh, Forward(CONFIG)), TEACHER, network)
        losses.append(each_loss(loss, told, network))
    gain, error = find_gain(*losses)
    assert gain == pytest.approx(info["gain"], abs=3 * (info["gain_error"] + error))


def test_the_verdict_can_ask_for_more():
    assert polish(64, num_steps=60, rate_factor=3.0, margin=0.9)[1]["verdict"] == "left out"


def other_inputs(count, seed):
    """Far from those of the task, so that what is said of them can change alone."""
    return Sample("old", {"image": images(count, seed)["image"] + 4.0}, Forward(CONFIG))


@pytest.mark.parametrize("num_kept", [8, 64])
def test_what_is_to_be_kept_can_be_reason_enough(num_kept):
    """The task is right already, and the moved network has lost what the base said of its old inputs."""
    sample = Sample("dots", images(32, 1), Forward(CONFIG))
    options = {"polish": "distill", "num_steps": 60, "rate_factor": 3.0}
    lost = random_params(CONFIG, seed=5, dtype=np.float32)
    prepared = Prepared(tree.task_vector(TARGET, lost), registry.symmetry_of(CONFIG))
    how = (jax.random.key(0), prepared, lost, lost, TARGET, sample)  # the start says what the teacher says
    params, alone = polish_transport(*how, **options)
    assert alone.info["polish"]["verdict"] == "left out"
    jax.tree.map(np.testing.assert_array_equal, dict(params), dict(lost))
    params, prepared = polish_transport(*how, **options, keep=other_inputs(num_kept, 2), protect=3.0)
    info = prepared.info["polish"]
    if num_kept < 20:  # too few to hold any out: nothing says that it helps
        assert "kept_gain" not in info
        assert info["verdict"] == "left out"
        return
    assert info["verdict"] == "kept"
    assert info["kept_gain"] > 1.645 * info["kept_gain_error"]
    assert info["gain"] > -TASK_COST
    fresh = other_inputs(400, 3)
    loss, said = TeacherLoss(fresh.forward), told(fresh, TARGET)
    gain, _ = find_gain(*(each_loss(loss, said, network) for network in (lost, params)))
    assert gain == pytest.approx(info["kept_gain"], abs=0.15)


def test_what_costs_the_task_is_not_kept_for_the_rest():
    sample = other_inputs(64, 1)
    prepared = Prepared(tree.task_vector(TARGET, TEACHER), registry.symmetry_of(CONFIG))
    keep = other_inputs(64, 9)  # the task, answered otherwise
    _, prepared = polish_transport(
        jax.random.key(0), prepared, TEACHER, TEACHER, TARGET, sample,
        polish="distill", num_steps=60, rate_factor=3.0, keep=keep, protect=5.0,
    )  # fmt: skip
    info = prepared.info["polish"]
    assert info["kept_gain"] > 0
    assert info["gain"] < -TASK_COST
    assert info["verdict"] == "left out"


def test_several_rates_of_the_callers_still_need_examples_to_choose_by():
    with pytest.raises(ConfigError, match="to choose among 2 learning rates, examples must be held out"):
        polish(4, learning_rate=(1e-3, 1e-2))
