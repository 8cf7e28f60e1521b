"""A sweep of scales in one program against the same evaluations one by one."""

import dataclasses

import numpy as np
import pytest
from small_models import CONFIGS, random_params
from sources import RecordSource

from jaxtune import tree
from jaxtune.errors import ConfigError, NonFiniteError, TreeMismatchError
from jaxtune.evaluate import evaluate_classifier, evaluate_scales
from jaxtune.models import registry
from jaxtune.transport.prepared import Prepared, apply_transport

SCALES = (0.0, 1.0, -0.5, 0.3, 1.0)
NUM_EXAMPLES = 11


def setting(name, dtype=np.float32):
    config = dataclasses.replace(CONFIGS[name], depth=8) if name == "resnet" else CONFIGS[name]
    target, vector = (random_params(config, seed=seed, dtype=dtype) for seed in (0, 1))
    draw = np.random.default_rng(2)
    shape = config.image_shape if name == "mlp" else (8, 8, 3)
    images = draw.normal(size=(NUM_EXAMPLES, *shape)).astype(np.float32)
    source = RecordSource(images, draw.integers(0, 5, NUM_EXAMPLES).astype(np.int32))
    return config, Prepared(vector, registry.symmetry_of(config)), target, source


@pytest.mark.parametrize(
    ("name", "at_a_time"), [("mlp", None), ("mlp", 2), ("mlp", 5), ("resnet", None), ("resnet", 2), ("vit", None)]
)
def test_a_sweep_equals_its_evaluations_one_by_one(name, at_a_time):
    """The resnet also holds its running variances, which a negative scale would push below zero."""
    config, prepared, target, source = setting(name)
    swept = evaluate_scales(config, prepared, target, source, SCALES, batch_size=4, top_k=2, at_a_time=at_a_time)
    assert len(swept) == len(SCALES)
    for scale, found in zip(SCALES, swept, strict=True):
        model = apply_transport(prepared, target, scale)
        expected = evaluate_classifier(config, model, source, batch_size=4, top_k=2)
        assert found.num_examples == expected.num_examples == NUM_EXAMPLES
        for field in dataclasses.fields(expected):
            wanted = getattr(expected, field.name)
            assert getattr(found, field.name) == pytest.approx(wanted, rel=1e-3, abs=1e-4), (scale, field.name)
    assert swept[1].loss == pytest.approx(swept[4].loss, rel=1e-5)
    assert len({round(metrics.loss, 2) for metrics in swept}) == 4


def test_embeddings_read_the_outputs_out_at_every_scale():
    config, prepared, target, source = setting("vit")
    embeddings = np.random.default_rng(3).normal(size=(6, config.num_outputs)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    swept = evaluate_scales(config, prepared, target, source, [0.5], embeddings=embeddings)
    model = apply_transport(prepared, target, 0.5)
    expected = evaluate_classifier(config, model, source, embeddings=embeddings)
    assert swept[0].loss == pytest.approx(expected.loss, rel=1e-4)


def test_bad_sweeps_are_refused_at_the_door():
    config, prepared, target, source = setting("mlp")
    for scales in ([], [1.0, np.nan], 1.0):
        with pytest.raises(ConfigError, match="at least one finite number"):
            evaluate_scales(config, prepared, target, source, scales)
    with pytest.raises(ConfigError, match="at_a_time is 0"):
        evaluate_scales(config, prepared, target, source, [1.0], at_a_time=0)
    with pytest.raises(ConfigError, match="both must be at least 1"):
        evaluate_scales(config, prepared, target, source, [1.0], batch_size=0)
    less = dataclasses.replace(prepared, task_vector=tree.select(prepared.task_vector, exclude="head/.*"))
    with pytest.raises(TreeMismatchError, match="head/kernel"):
        evaluate_scales(config, less, target, source, [1.0])
    burst = dataclasses.replace(prepared, task_vector=tree.map_leaves(lambda _, x: x * np.nan, prepared.task_vector))
    with pytest.raises(NonFiniteError, match="first for example 0"):
        evaluate_scales(config, burst, target, source, [1.0])
