"""A polish of few examples: which rates it takes, who judges it, and that it works where nothing can be held out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_params

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models import mlp, registry
from jaxtune.polish import polish_transport
from jaxtune.sample import Sample
from jaxtune.sampling import Forward
from jaxtune.teach.distill import teach_sample
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


def test_several_rates_of_the_callers_still_need_examples_to_choose_by():
    with pytest.raises(ConfigError, match="to choose among 2 learning rates, examples must be held out"):
        polish(4, learning_rate=(1e-3, 1e-2))
