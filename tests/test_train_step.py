"""One step against a NumPy model and finite differences, on one device and on two."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models.readout import DEFAULT_SCALE, class_embeddings
from jaxtune.train.optimizer import make_optimizer
from jaxtune.train.step import (
    create_state,
    cross_entropy,
    join_trainable,
    make_mesh,
    make_train_step,
    split_trainable,
)

NUM_EXAMPLES, NUM_INPUTS, NUM_OUTPUTS, NUM_CLASSES = 8, 5, 4, 3
KEY = jax.random.key(3)
PLAIN_SGD = make_optimizer(1.0, name="sgd", momentum=0.0, clip_norm=None)  # update = -gradient


@pytest.fixture
def params():
    random = np.random.default_rng(0)
    return {
        "dense": {"kernel": random.normal(size=(NUM_INPUTS, NUM_OUTPUTS)).astype(np.float32)},
        "norm": {"mean": np.zeros(NUM_INPUTS, np.float32)},
    }


@pytest.fixture
def batch():
    random = np.random.default_rng(1)
    return {
        "image": random.normal(size=(NUM_EXAMPLES, NUM_INPUTS)).astype(np.float32),
        "label": random.integers(0, NUM_CLASSES, NUM_EXAMPLES).astype(np.int32),
    }


def is_trainable(path):
    return not path.endswith("/mean")


def forward(params, frozen, batch, key):
    """tanh(x W) scaled by `frozen`; keeps a running mean of x, as batch norm would."""
    x = batch["image"]
    mean = 0.9 * params["norm"]["mean"] + 0.1 * jnp.mean(x, axis=0)
    outputs = jnp.tanh(x @ params["dense"]["kernel"]) * frozen["gain"]
    return outputs, {**params, "norm": {"mean": mean}}


FROZEN = {"gain": jnp.float32(1.5)}


def loss_in_numpy(kernel, batch, embeddings, smoothing):
    """float64, example by example."""
    total = 0.0
    for x, label in zip(batch["image"].astype(np.float64), batch["label"], strict=True):
        features = 1.5 * np.tanh(x @ kernel)
        if embeddings is None:
            logits = features
        else:
            logits = DEFAULT_SCALE * embeddings.astype(np.float64) @ (features / np.linalg.norm(features))
        logp = logits - np.log(np.sum(np.exp(logits)))
        target = np.full(len(logits), smoothing / len(logits))
        target[label] += 1 - smoothing
        total -= target @ logp
    return total / len(batch["label"])


def make(params, num_devices=1, optimizer=PLAIN_SGD, forward=forward, **options):
    mesh = make_mesh(NUM_EXAMPLES, jax.local_devices()[:num_devices])
    step = make_train_step(forward, optimizer, mesh, KEY, is_trainable=is_trainable, **options)
    return step, create_state(params, optimizer, mesh, is_trainable=is_trainable)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("has_read_out", [False, True])
def test_the_gradient_equals_finite_differences(params, batch, has_read_out, smoothing):
    embeddings = class_embeddings(["cat", "dog", "cow"], NUM_OUTPUTS) if has_read_out else None
    step, state = make(params, embeddings=embeddings, label_smoothing=smoothing)
    state, metrics = step(state, FROZEN, batch)
    found = params["dense"]["kernel"] - np.asarray(state.params["dense"]["kernel"])

    kernel = params["dense"]["kernel"].astype(np.float64)
    expected = np.zeros_like(kernel)
    for index in np.ndindex(*kernel.shape):
        nudge = np.zeros_like(kernel)
        nudge[index] = 1e-5
        above = loss_in_numpy(kernel + nudge, batch, embeddings, smoothing)
        below = loss_in_numpy(kernel - nudge, batch, embeddings, smoothing)
        expected[index] = (above - below) / 2e-5
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * (DEFAULT_SCALE if has_read_out else 1))
    np.testing.assert_allclose(metrics["loss"], loss_in_numpy(kernel, batch, embeddings, smoothing), rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(expected), rtol=1e-3)


def test_accuracy_counts_the_most_probable_class(params, batch):
    step, state = make(params)
    logits = np.tanh(batch["image"] @ params["dense"]["kernel"])
    _, metrics = step(state, FROZEN, batch)
    assert float(metrics["accuracy"]) == np.mean(logits.argmax(axis=1) == batch["label"])


def test_statistics_move_by_the_forward_pass_and_the_optimiser_never_sees_them(params, batch):
    optimizer = make_optimizer(0.1, weight_decay=0.5)
    step, state = make(params, optimizer=optimizer)
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert sizes == {(), (NUM_INPUTS, NUM_OUTPUTS)}
    state, _ = step(state, FROZEN, batch)
    np.testing.assert_allclose(state.params["norm"]["mean"], 0.1 * batch["image"].mean(axis=0), rtol=1e-5, atol=1e-7)


def test_two_devices_take_the_step_of_one(params, batch):
    optimizer = make_optimizer(0.1)
    (one, state_one), (two, state_two) = (make(params, n, optimizer) for n in (1, 2))
    for _ in range(3):
        state_one, metrics_one = one(state_one, FROZEN, batch)
        state_two, metrics_two = two(state_two, FROZEN, batch)
    assert len(state_two.params["dense"]["kernel"].sharding.device_set) == 2
    # The sum over the batch is taken in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6),
        (state_one, metrics_one),
        (state_two, metrics_two),
    )


@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_callers_parameters_outlive_the_donated_state(params, batch, num_devices):
    ours = jax.tree.map(jnp.asarray, params)
    step, state = make(ours, num_devices)
    next_state, _ = step(state, FROZEN, batch)
    assert state.params["dense"]["kernel"].is_deleted()
    np.testing.assert_array_equal(ours["dense"]["kernel"], params["dense"]["kernel"])
    assert int(next_state.step) == 1


def test_every_step_runs_the_same_program(params, batch):
    traces = []

    def counted(*arguments):
        traces.append(1)
        return forward(*arguments)

    step, state = make(params, 2, make_optimizer(lambda count: 0.1 / (1 + count)), counted)
    for _ in range(3):
        state, _ = step(state, FROZEN, batch)
    assert len(traces) == 1


def test_random_bits_are_a_function_of_the_step(params, batch):
    def noisy(params, frozen, batch, key):
        outputs, params = forward(params, frozen, batch, key)
        return outputs + jax.random.normal(key, outputs.shape), params

    def run():
        step, state = make(params, optimizer=optax.set_to_zero(), forward=noisy)
        losses = []
        for _ in range(3):
            state, metrics = step(state, FROZEN, batch)
            losses.append(float(metrics["loss"]))
        return losses

    losses = run()
    assert len(set(losses)) == 3
    assert run() == losses


def test_cross_entropy_of_extreme_logits_is_finite():
    logits = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    assert float(cross_entropy(logits[:1], jnp.array([0]))) == 0.0
    np.testing.assert_allclose(cross_entropy(logits[1:], jnp.array([2])), np.log(3), rtol=1e-6)
    assert np.isfinite(cross_entropy(logits, jnp.array([1, 1]), 0.1))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="batch_size 7 cannot be shared equally by 2 devices; 8 would do"):
        make_mesh(7)
    assert make_mesh(8).shape == {"data": 2}


def test_label_smoothing_is_a_share(params):
    with pytest.raises(ConfigError, match="label_smoothing"):
        make(params, label_smoothing=1.0)


def test_trainable_parts_join_to_the_whole(params):
    moving, still = split_trainable(params, is_trainable)
    assert list(tree.flatten(still)) == ["norm/mean"]
    jax.tree.map(np.testing.assert_array_equal, join_trainable(moving, still), params)
