"""Evaluation against a loop over single examples in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from sources import RecordSource

from jaxtune.errors import ConfigError, DataError, NonFiniteError
from jaxtune.evaluate.classifier import calibration_error, evaluate_classifier, score_batch
from jaxtune.models import mlp, registry
from jaxtune.models.readout import DEFAULT_SCALE, class_embeddings

CONFIG = mlp.Config(image_shape=(3, 3, 1), widths=(6,), num_outputs=7)
NUM_EXAMPLES = 23


@pytest.fixture
def source():
    random = np.random.default_rng(0)
    images = random.normal(size=(NUM_EXAMPLES, 3, 3, 1)).astype(np.float32)
    return RecordSource(images, random.integers(0, 7, NUM_EXAMPLES).astype(np.int32))


@pytest.fixture
def params(key):
    return registry.init(key, CONFIG)


def metrics_in_numpy(params, source, embeddings=None, top_k=2):
    """float64, one example at a time, sorting instead of counting."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hits, top_hits, losses, confidences = [], [], [], []
    for image, label in zip(source.images.astype(np.float64), source.labels, strict=True):
        hidden = np.maximum(image.ravel() @ params["layer_0"]["kernel"] + params["layer_0"]["bias"], 0)
        logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
        if embeddings is not None:
            logits = DEFAULT_SCALE * embeddings @ (logits / np.linalg.norm(logits))
        probabilities = np.exp(logits) / np.sum(np.exp(logits))
        order = np.argsort(-logits)
        hits.append(order[0] == label)
        top_hits.append(label in order[:top_k])
        losses.append(-np.log(probabilities[label]))
        confidences.append(probabilities.max())
    gap = 0.0
    for low in range(15):
        inside = [i for i, c in enumerate(confidences) if low / 15 < c <= (low + 1) / 15]
        if inside:
            share = len(inside) / len(hits)
            gap += share * abs(np.mean([confidences[i] for i in inside]) - np.mean([hits[i] for i in inside]))
    return np.mean(hits), np.mean(top_hits), np.mean(losses), gap


@pytest.mark.parametrize("num_classes", [None, 4])
def test_metrics_equal_an_independent_loop(params, source, num_classes):
    embeddings = None
    if num_classes:
        embeddings = class_embeddings([f"class {i}" for i in range(num_classes)], CONFIG.num_outputs)
        source.labels = source.labels % num_classes
    found = evaluate_classifier(CONFIG, params, source, embeddings=embeddings, batch_size=8, top_k=2)
    expected = metrics_in_numpy(params, source, embeddings)
    assert 0.0 < expected[0] < 1.0
    assert expected[0] < expected[1] < 1.0
    assert found.accuracy == expected[0]
    assert found.top_k_accuracy == expected[1]
    # float32 forward pass against float64.
    np.testing.assert_allclose([found.loss, found.calibration_error], expected[2:], rtol=1e-5)
    assert (found.num_examples, found.top_k) == (NUM_EXAMPLES, 2)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 22, 23, 24, 1000])
def test_the_batch_size_changes_nothing(params, source, batch_size):
    expected = dataclasses.asdict(evaluate_classifier(CONFIG, params, source, batch_size=23))
    found = dataclasses.asdict(evaluate_classifier(CONFIG, params, source, batch_size=batch_size))
    # A product of another shape may sum in another order.
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-6)


def test_one_shape_compiles(params, source):
    score_batch.clear_cache()
    evaluate_classifier(CONFIG, params, source, batch_size=8)
    assert score_batch._cache_size() == 1


def test_even_batches_run_on_both_devices(params, source, monkeypatch):
    seen = []

    def spy(config, params, batch, embeddings):
        seen.append(len(batch["image"].sharding.device_set))
        return score_batch(config, params, batch, embeddings)

    monkeypatch.setattr("jaxtune.evaluate.classifier.score_batch", spy)
    evaluate_classifier(CONFIG, params, source, batch_size=12)
    evaluate_classifier(CONFIG, params, source, batch_size=23)
    assert seen == [2, 2, 1]


def test_a_label_that_ties_counts_by_index(params, source):
    constant = jax.tree.map(np.zeros_like, params)
    found = evaluate_classifier(CONFIG, constant, source, top_k=3)
    assert found.accuracy == np.mean(source.labels == 0)
    assert found.top_k_accuracy == np.mean(source.labels < 3)
    np.testing.assert_allclose(found.loss, np.log(7), rtol=1e-6)


def test_many_models_are_scored_at_once(params, source):
    batch = source.__getitems__(np.arange(8))
    other = registry.init(jax.random.key(1), CONFIG)
    stack = jax.tree.map(lambda a, b: np.stack([a, b]), params, other)
    together = jax.vmap(lambda p: score_batch(CONFIG, p, batch))(stack)
    for index, one in enumerate((params, other)):
        np.testing.assert_allclose(together["loss"][index], score_batch(CONFIG, one, batch)["loss"], rtol=1e-5)


def test_calibration_error_of_planted_confidences():
    # Bin of 0.9: confident 0.9, right half of the time. Bin of 0.2: 0.2 and never right. Shares 1/2 each.
    confidence = np.array([0.9, 0.9, 0.2, 0.2])
    is_correct = np.array([True, False, False, False])
    np.testing.assert_allclose(calibration_error(confidence, is_correct), 0.5 * 0.4 + 0.5 * 0.2)
    # The two lowest bins are two: their gaps of 0.05 and -0.9 must not cancel.
    np.testing.assert_allclose(calibration_error(np.array([0.05, 0.1]), np.array([False, True])), 0.475)
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0


def test_what_cannot_be_evaluated_is_refused(params, source):
    with pytest.raises(DataError, match="empty"):
        evaluate_classifier(CONFIG, params, RecordSource(source.images[:0], source.labels[:0]))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        evaluate_classifier(CONFIG, params, source, batch_size=0)
    source.labels[5] = 7
    with pytest.raises(DataError, match="example 5 has a label"):
        evaluate_classifier(CONFIG, params, source)
    source.labels[5] = 0
    params["head"]["bias"] = params["head"]["bias"].at[0].set(np.nan)
    with pytest.raises(NonFiniteError, match="first for example 0"):
        evaluate_classifier(CONFIG, params, source)
