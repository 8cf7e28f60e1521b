"""A polish of few examples: which rates it takes, and that it works where nothing can be held out to judge it."""

import jax
import numpy as np
import pytest
from small_models import random_params

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models import mlp, registry
from jaxtune.polish import polish_transport
from jaxtune.sample import Sample
from jaxtune.sampling import Forward
from jaxtune.teach.weights import whole_weights
from jaxtune.transport.prepared import Prepared

CONFIG = mlp.Config(image_shape=(4, 4, 1), widths=(6,), num_outputs=3)
TEACHER, TARGET = (random_params(CONFIG, seed=seed, dtype=np.float32) for seed in (0, 1))
PREPARED = Prepared(tree.task_vector(TARGET, TARGET), registry.symmetry_of(CONFIG))
THIRDS = [rate / 3 for rate in whole_weights(TARGET).rates]


def polish(count, **options):
    images = np.random.default_rng(count).normal(size=(count, 4, 4, 1)).astype(np.float32)
    sample = Sample("dots", {"image": images}, Forward(CONFIG))
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


def test_several_rates_of_the_callers_still_need_examples_to_choose_by():
    with pytest.raises(ConfigError, match="to choose among 2 learning rates, examples must be held out"):
        polish(4, learning_rate=(1e-3, 1e-2))
