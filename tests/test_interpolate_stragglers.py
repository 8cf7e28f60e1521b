"""Sharpness of layers against a loop, a grid and a planted straggler; pruning; ranks."""

import linear_task as task
import numpy as np
import pytest
import scipy.stats

from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.interpolate.pruning import prune_layers
from jaxtune.interpolate.stragglers import (
    find_stragglers,
    layers_of,
    measure_layer_barriers,
    measure_sharpness,
    rank_correlation,
)
from jaxtune.sample import Sample
from jaxtune.tree import flatten

FIRST, SECOND = task.draw_params(seed=1), task.draw_params(seed=2)
SAMPLE = task.draw_sample(50)
SLICES = {"head/bias": slice(0, 3), "head/kernel": slice(3, None)}


def by_leaf(path):
    return path


def ascend_in_numpy(vector, part, radius, num_steps):
    """The climb of one layer, step by step."""
    start, limit = task.loss_of(vector, SAMPLE)[0], radius * np.linalg.norm(vector[part])
    change, best = np.zeros_like(vector), 0.0
    for _ in range(num_steps):
        slope = np.zeros_like(vector)
        slope[part] = task.loss_of(vector + change, SAMPLE)[1][part]
        change = change + limit * slope / np.linalg.norm(slope)
        change = change * min(1.0, limit / np.linalg.norm(change))
        best = max(best, task.loss_of(vector + change, SAMPLE)[0] - start)
    return best


def test_sharpness_is_that_of_a_loop():
    found = measure_sharpness(FIRST, SECOND, SAMPLE, radius=0.2, weights=[0, 0.3, 1], layer_of=by_leaf, num_steps=3)
    assert found.layers == ("head/bias", "head/kernel")
    for n, weight in enumerate((0, 0.3, 1)):
        vector = (1 - weight) * task.to_vector(FIRST) + weight * task.to_vector(SECOND)
        assert found.losses[n] == pytest.approx(task.loss_of(vector, SAMPLE)[0], rel=1e-5)
        for m, name in enumerate(found.layers):
            assert found.values[n, m] == pytest.approx(ascend_in_numpy(vector, SLICES[name], 0.2, 3), rel=1e-3)
        assert found.whole[n] == pytest.approx(ascend_in_numpy(vector, slice(None), 0.2, 3), rel=1e-3)
    assert found.peaks == dict(zip(found.layers, found.values.max(axis=0), strict=True))


def test_the_ascent_comes_near_the_true_maximum_on_the_ball():
    found = measure_sharpness(FIRST, SECOND, SAMPLE, radius=0.5, weights=[0.5], layer_of=by_leaf, num_steps=5)
    vector = 0.5 * (task.to_vector(FIRST) + task.to_vector(SECOND))
    draw = np.random.default_rng(0).normal(size=(3000, 3))  # points all over the sphere of the bias
    draw *= 0.5 * np.linalg.norm(vector[:3]) / np.linalg.norm(draw, axis=1, keepdims=True)
    highest = max(task.loss_of(np.concatenate([vector[:3] + d, vector[3:]]), SAMPLE)[0] for d in draw)
    highest -= task.loss_of(vector, SAMPLE)[0]
    # 3,000 points lie two to three degrees apart, and so up to some thousandths below the maximum.
    assert 0.98 * highest < found.values[0, 0] < 1.005 * highest


def test_batches_are_averaged_and_padding_counts_nowhere():
    halves = [SAMPLE.take(np.arange(32)), SAMPLE.take(np.arange(32, 50))]
    found = measure_sharpness(FIRST, SECOND, SAMPLE, weights=[0.0], layer_of=by_leaf, batch_size=32)
    parts = [measure_sharpness(FIRST, SECOND, half, weights=[0.0], layer_of=by_leaf).values for half in halves]
    np.testing.assert_allclose(found.values, 0.64 * parts[0] + 0.36 * parts[1], rtol=1e-5)


def deep(params, batch):
    """Two layers in a row, and one that nothing depends on."""
    hidden = np.float32(1) * batch["image"] @ params["block_0"]["kernel"]
    return hidden @ params["block_1"]["kernel"] + 0 * params["idle"]["kernel"][:1]


def deep_models():
    draw = np.random.default_rng(3)
    first = {
        "block_0": {"kernel": np.eye(4, dtype=np.float32)},
        "block_1": {"kernel": draw.normal(size=(4, 3)).astype(np.float32)},
        "idle": {"kernel": draw.normal(size=(2, 3)).astype(np.float32)},
    }
    # A planted straggler: block_0 turns by half a circle, so that half-way it says nothing; block_1 hardly moves.
    kernel = first["block_1"]["kernel"] + np.float32(0.01)
    second = {
        "block_0": {"kernel": -np.eye(4, dtype=np.float32)},
        "block_1": {"kernel": -kernel},
        "idle": first["idle"],
    }
    sample = task.draw_sample(40)
    label = np.argmax(sample.batch["image"] @ first["block_1"]["kernel"], axis=1).astype(np.int32)
    return first, second, Sample("deep", {**sample.batch, "label": label}, deep)


def test_layer_barriers_move_one_layer_alone():
    first, second, sample = deep_models()
    found = measure_layer_barriers(first, second, sample, num_points=5)
    losses = []
    for weight in np.linspace(0, 1, 5):
        kernel = (1 - 2 * weight) * np.eye(4) @ second["block_1"]["kernel"]
        logits = sample.batch["image"] @ kernel
        losses.append((np.log(np.exp(logits).sum(1)) - logits[np.arange(40), sample.batch["label"]]).mean())
    np.testing.assert_allclose(found["block_0"].losses, losses, rtol=1e-5)
    assert found["idle"].height == pytest.approx(0, abs=1e-6)
    worst, peaks = find_stragglers(first, second, sample, count=2, criterion="barrier", num_points=5)
    assert set(worst) <= {"block_0", "block_1", "idle"}
    assert peaks == {name: barrier.height for name, barrier in found.items()}


def test_stragglers_are_the_sharpest_layers():
    first, second, sample = deep_models()
    (worst,), peaks = find_stragglers(first, second, sample, weights=[0.0, 1.0])
    assert peaks["idle"] == 0
    assert worst == max(peaks, key=peaks.get)
    with pytest.raises(ConfigError, match="count is 4; there are 3 layers, block_0, block_1, idle"):
        find_stragglers(first, second, sample, count=4, weights=[0.0])
    with pytest.raises(UnknownNameError, match=r"criterion of stragglers 'sharp'.*Did you mean 'sharpness'"):
        find_stragglers(first, second, sample, criterion="sharp")
    assert list(layers_of(first, lambda path: "" if "idle" in path else "all")) == ["all"]


@pytest.mark.parametrize("source", ["weights", "difference"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
def test_pruning_takes_the_smallest_of_the_named_layers(source, sparsity):
    first, second, _ = deep_models()
    pruned = prune_layers(first, second, ["block_1"], sparsity=sparsity, source=source)
    for before, after in zip((first, second), pruned, strict=True):
        for layer in ("block_0", "idle"):
            np.testing.assert_array_equal(after[layer]["kernel"], before[layer]["kernel"])
    ours, theirs = first["block_1"]["kernel"], second["block_1"]["kernel"]
    count = int(sparsity * 12)
    if source == "weights":
        for before, after in ((ours, pruned[0]), (theirs, pruned[1])):
            expected = before.copy()
            expected.reshape(-1)[np.argsort(np.abs(before).ravel(), kind="stable")[:count]] = 0
            np.testing.assert_array_equal(after["block_1"]["kernel"], expected)
    else:
        np.testing.assert_array_equal(pruned[0]["block_1"]["kernel"], ours)
        expected = theirs.copy()
        smallest = np.argsort(np.abs(theirs - ours).ravel(), kind="stable")[:count]
        expected.reshape(-1)[smallest] = ours.reshape(-1)[smallest]
        np.testing.assert_array_equal(pruned[1]["block_1"]["kernel"], expected)


def test_vectors_of_a_layer_are_never_pruned():
    pruned, _ = prune_layers(FIRST, SECOND, ["head"], sparsity=0.5)
    np.testing.assert_array_equal(pruned["head"]["bias"], FIRST["head"]["bias"])
    assert (flatten(pruned)["head/kernel"] == 0).sum() == 6


def test_ranks_correlate_as_scipy_says():
    draw = np.random.default_rng(0)
    for _ in range(5):
        first, second = draw.integers(0, 4, 9), draw.normal(size=9)
        assert rank_correlation(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ConfigError, match="got 1 and 1"):
        rank_correlation([1], [2])


def test_refusals():
    with pytest.raises(DataError, match="planes: a loss needs labelled"):
        measure_sharpness(FIRST, SECOND, SAMPLE.without_labels())
    with pytest.raises(ConfigError, match="radius is 0 "):
        measure_sharpness(FIRST, SECOND, SAMPLE, radius=0)
    with pytest.raises(ConfigError, match=r"sparsity is 1\.0"):
        prune_layers(FIRST, SECOND, ["head"], sparsity=1.0)
    with pytest.raises(ConfigError, match="layer head/bias has no matrix whose entries could be pruned"):
        prune_layers(FIRST, SECOND, ["head/bias"], layer_of=by_leaf)
    with pytest.raises(UnknownNameError, match="layer 'block_9'"):
        prune_layers(FIRST, SECOND, ["block_9"])
    with pytest.raises(UnknownNameError, match=r"source of pruning 'weight'\. Did you mean 'weights'"):
        prune_layers(FIRST, SECOND, ["head"], source="weight")
