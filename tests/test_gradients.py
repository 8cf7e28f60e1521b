"""Gradients of single examples: sums equal those of a plain loop, and memory grows with the chunk alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tree
from jaxtune.data import ArraySource
from jaxtune.errors import ConfigError, DataError
from jaxtune.gradients import (
    ExampleGradients,
    LabelLoss,
    SummedGradient,
    TeacherLoss,
    add_chunk,
    fold_chunks,
    predict,
    sum_signs,
    with_teacher,
)
from jaxtune.models import mlp, registry
from jaxtune.sample import example_losses
from jaxtune.sampling import make_sample

CONFIG = mlp.Config(image_shape=(3, 3, 1), widths=(7, 6), num_outputs=4, activation="tanh")


@pytest.fixture(scope="module")
def params():
    return registry.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def sample():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (11, 3, 3, 1), dtype=np.uint8)
    labels = draw.integers(0, 4, 11).astype(np.int32)
    return make_sample(CONFIG, ArraySource("dots", "train", images, labels, ("a", "b", "c", "d")))


def loop_gradients(params, sample):
    """One gradient an example, by nothing but `jax.grad`."""

    def loss(params, image, label):
        logits = registry.apply(CONFIG, params, {"image": image[None]})[0]
        return -jax.nn.log_softmax(logits)[label]

    pairs = zip(sample.batch["image"], sample.batch["label"], strict=True)
    return [tree.flatten(jax.grad(loss)(params, image, label)) for image, label in pairs]


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 50])
def test_votes_are_those_of_a_loop_over_examples(params, sample, chunk_size):
    votes = fold_chunks(ExampleGradients(LabelLoss(sample.forward), sum_signs), params, sample, chunk_size=chunk_size)
    gradients = loop_gradients(params, sample)
    for path, vote in votes.items():
        expected = sum(np.sign(-np.asarray(one[path])).astype(int) for one in gradients)
        # A gradient of rounding size may have either sign in another order of sums.
        clear = np.min([np.abs(one[path]) for one in gradients], axis=0) > 1e-7
        assert vote.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(vote)[clear], expected[clear], err_msg=path)
        assert np.mean(clear | (expected == 0)) > 0.8


def test_the_summed_gradient_is_the_sum(params, sample):
    total = fold_chunks(SummedGradient(LabelLoss(sample.forward)), params, sample, chunk_size=4)
    gradients = loop_gradients(params, sample)
    for path, leaf in total.items():
        np.testing.assert_allclose(leaf, sum(one[path] for one in gradients), atol=1e-5, err_msg=path)


def test_some_leaves_alone(params, sample):
    total = fold_chunks(SummedGradient(LabelLoss(sample.forward)), params, sample)
    path = next(iter(total))
    part = fold_chunks(SummedGradient(LabelLoss(sample.forward)), params, sample, paths=[path])
    assert list(part) == [path]
    np.testing.assert_allclose(part[path], total[path], rtol=1e-6)


def test_a_teacher_that_agrees_leaves_no_gradient(params, sample):
    taught = with_teacher(sample.without_labels(), params, chunk_size=4)
    total = fold_chunks(SummedGradient(TeacherLoss(sample.forward)), params, taught)
    assert max(float(jnp.abs(leaf).max()) for leaf in total.values()) < 1e-5
    other = registry.init(jax.random.key(1), CONFIG)
    total = fold_chunks(SummedGradient(TeacherLoss(sample.forward)), other, taught)
    assert max(float(jnp.abs(leaf).max()) for leaf in total.values()) > 1e-2


def test_predictions_are_the_networks(params, sample):
    expected = registry.apply(CONFIG, params, {"image": sample.batch["image"]})
    np.testing.assert_allclose(predict(sample, params, chunk_size=3), expected, atol=1e-6)
    logits = jnp.asarray(predict(sample, params))
    np.testing.assert_allclose(
        LabelLoss(sample.forward)(params, sample.batch), example_losses(logits, sample.batch), atol=1e-6
    )


def test_memory_grows_with_the_chunk_and_never_with_the_sample(params, sample):
    """Of the compiled program: what lies beside arguments and results."""
    kernel = ExampleGradients(LabelLoss(sample.forward), sum_signs)
    moving = tree.flatten(params)
    size = sum(leaf.nbytes for leaf in moving.values())

    def temporary(chunk_size):
        chunk = next(sample.chunks(chunk_size))
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), moving)
        memory = add_chunk.lower(kernel, moving, {}, None, total, chunk).compile().memory_analysis()
        return memory.temp_size_in_bytes, memory.output_size_in_bytes

    (one, out), (eight, out_of_eight) = temporary(1), temporary(8)
    assert out == out_of_eight <= size + 1024
    assert eight <= 8 * (one + size)
    many = sample.take(np.arange(1000) % 11)
    chunk = next(many.chunks(8))
    assert {name: values.shape[0] for name, values in chunk.items()} == dict.fromkeys(chunk, 8)


def test_nothing_to_fold_is_refused(params, sample):
    kernel = SummedGradient(LabelLoss(sample.forward))
    with pytest.raises(DataError, match="no examples"):
        fold_chunks(kernel, params, sample.take([]))
    with pytest.raises(ConfigError, match="at least 1"):
        fold_chunks(kernel, params, sample, chunk_size=0)
    with pytest.raises(DataError, match="NaN"):
        predict(sample, tree.map_leaves(lambda _, x: x * jnp.nan, params))
