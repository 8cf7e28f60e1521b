"""Optimisers and schedules against a NumPy loop and their defining points."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.train.optimizer import decayed_leaves, make_optimizer, make_schedule

PARAMS = {
    "attn": {"q": {"kernel": jnp.full((4, 2, 3), 0.5), "bias": jnp.full((2, 3), 0.5)}},
    "norm": {"scale": jnp.full((4,), 0.5)},
}
GRADIENTS = [
    {
        "attn": {"q": {"kernel": jnp.full((4, 2, 3), g), "bias": jnp.full((2, 3), -g)}},
        "norm": {"scale": jnp.full((4,), 2 * g)},
    }
    for g in (0.3, -0.1, 0.7)
]


def run(optimizer):
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw_in_numpy(value, gradients, *, rate, decay, beta1=0.9, beta2=0.999):
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        direction = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
        value = value - rate * (direction + decay * value)
    return value


def test_adamw_equals_a_numpy_loop_and_decays_matrices_only():
    params = run(make_optimizer(0.1, weight_decay=0.2, clip_norm=None))
    gradients = np.array([0.3, -0.1, 0.7])
    for leaf, signed, decay in (
        (params["attn"]["q"]["kernel"], gradients, 0.2),
        (params["attn"]["q"]["bias"], -gradients, 0.0),
        (params["norm"]["scale"], 2 * gradients, 0.0),
    ):
        expected = adamw_in_numpy(0.5, signed, rate=0.1, decay=decay)
        np.testing.assert_allclose(leaf, np.full(leaf.shape, expected), rtol=1e-5)  # float32 against float64


def test_sgd_equals_a_numpy_loop():
    params = run(make_optimizer(0.1, name="sgd", momentum=0.8, weight_decay=0.2, clip_norm=None))
    value, trace = 0.5, 0.0
    for g in (0.3, -0.1, 0.7):
        trace = g + 0.8 * trace
        value -= 0.1 * ((g + 0.8 * trace) + 0.2 * value)
    np.testing.assert_allclose(params["attn"]["q"]["kernel"], np.full((4, 2, 3), value), rtol=1e-6)


def test_clipping_shortens_long_gradients_and_no_others():
    def move(clip_norm, gradient):
        optimizer = make_optimizer(1.0, name="sgd", momentum=0.0, clip_norm=clip_norm)
        params = {"w": jnp.zeros(2)}
        updates, _ = optimizer.update({"w": jnp.array(gradient)}, optimizer.init(params), params)
        return -np.asarray(updates["w"])

    np.testing.assert_allclose(move(1.0, [3.0, 4.0]), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(move(10.0, [3.0, 4.0]), [3.0, 4.0])


def test_biases_with_head_axes_are_not_matrices():
    assert decayed_leaves(PARAMS) == {"attn": {"q": {"kernel": True, "bias": False}}, "norm": {"scale": False}}


def test_cosine_passes_through_its_defining_points():
    rate = make_schedule(0.4, 110, num_warmup_steps=10, final_fraction=0.1)
    found = [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(found, [0.0, 0.2, 0.4, 0.22, 0.04], atol=1e-7)


def test_linear_and_constant():
    linear = make_schedule(0.4, 20, schedule="linear")
    constant = make_schedule(0.4, 20, num_warmup_steps=4, schedule="constant")
    np.testing.assert_allclose([linear(0), linear(10), linear(20)], [0.4, 0.2, 0.0], atol=1e-7)
    np.testing.assert_allclose([constant(2), constant(4), constant(20)], [0.2, 0.4, 0.4], atol=1e-7)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"num_warmup_steps": 20}, "num_warmup_steps"),
        ({"final_fraction": 1.5}, "final_fraction"),
    ],
)
def test_schedule_refuses(options, word):
    with pytest.raises(ConfigError, match=word):
        make_schedule(**{"learning_rate": 0.1, "num_steps": 20, **options})


@pytest.mark.parametrize("options", [{"weight_decay": -1.0}, {"clip_norm": 0.0}, {"beta2": 1.0}])
def test_optimizer_refuses(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_optimizer(0.1, **options)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownNameError, match="Did you mean 'adamw'"):
        make_optimizer(0.1, name="adam")
    with pytest.raises(UnknownNameError, match="constant, cosine, linear"):
        make_schedule(0.1, 10, schedule="step")
