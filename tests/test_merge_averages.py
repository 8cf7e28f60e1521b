"""Averages and interpolation: the numbers of plain arithmetic, rounded once; ends bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from jaxtune.errors import ConfigError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def merge(name, models, base=None, **options):
    """One leaf."""
    base = None if base is None else {"leaf": np.asarray(base)}
    return merge_trees(METHODS[name], [{"leaf": np.asarray(model)} for model in models], base, **options)["leaf"]


def as_bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_weighted_sum_is_the_float64_result_rounded_once(dtype, normalize):
    one, other = np.array([1, -2, 3.5, 0.1]).astype(dtype), np.array([0.3, 7, -1.25, 4e-3]).astype(dtype)
    weight = (0.123456, 0.654321)
    expected = sum(w * leaf.astype(np.float64) for w, leaf in zip(weight, (one, other), strict=True))
    expected = (expected / sum(weight) if normalize else expected).astype(dtype)
    found = merge("linear", [one, other], weight=weight, normalize=normalize)
    assert found.dtype == dtype
    # Weights that are divided beforehand leave float64 itself, which nothing rounds, its last bit.
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=3e-16)


def test_a_sum_that_overflows_float16_does_not_overflow_on_the_way():
    full = np.full(5, 60000, np.float16)
    np.testing.assert_array_equal(merge("linear", [full, full]), full)


def test_weights_that_sum_to_zero_divide_by_zero():
    one, other = np.array([1.0, 3.0, 2.0]), np.array([2.0, 1.0, 2.0])
    np.testing.assert_array_equal(merge("linear", [one, other], weight=(1, -1)), [-np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(merge("linear", [one, other], weight=(1, -1), normalize=False), [-1, 2, 0])
    base = np.zeros(3)
    np.testing.assert_array_equal(
        merge("task_arithmetic", [one, other], base, weight=(1, -1), normalize=True), [-1, 2, 0]
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_average_of_many_is_their_mean(dtype):
    models = np.random.default_rng(0).standard_normal((7, 40)).astype(dtype)
    expected = models.astype(np.float64).mean(axis=0).astype(dtype)
    for name in ("linear", "trajectory"):
        found = merge(name, models).astype(np.float64)
        # Bits of float64 itself depend on the order of the sum; of the others none do.
        np.testing.assert_allclose(found, expected.astype(np.float64), rtol=0, atol=1e-15 * (dtype == np.float64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "option"), [("wise_ft", "alpha"), ("slerp", "t")])
def test_the_ends_of_a_line_are_the_models_bit_for_bit(name, option, dtype):
    base = np.array([1.0, -0.0, 1e-7, np.nan, 5, 0, np.inf]).astype(dtype)
    model = np.array([1e-7, 3.0, -0.0, 2, -0.0, 1, 1]).astype(dtype)
    if name == "slerp":  # of what is not finite there is no angle
        base, model = base[:3], model[:3]
    np.testing.assert_array_equal(as_bits(merge(name, [model], base, **{option: 0.0})), as_bits(base))
    np.testing.assert_array_equal(as_bits(merge(name, [model], base, **{option: 1.0})), as_bits(model))


def test_wise_ft_is_the_line():
    base, model = np.array([1.0, 2.0]), np.array([3.0, -2.0])
    for alpha in (-0.5, 0.25, 0.5, 1.5):
        np.testing.assert_allclose(merge("wise_ft", [model], base, alpha=alpha), base + alpha * (model - base))


def test_ema_is_the_recurrence():
    models = np.random.default_rng(0).standard_normal((6, 9))
    mean = models[0]
    for model in models[1:]:
        mean = 0.9 * mean + (1 - 0.9) * model
    np.testing.assert_allclose(merge("ema", models, decay=0.9), mean, rtol=1e-14)
    np.testing.assert_array_equal(merge("ema", models, decay=0.0), models[-1])
    np.testing.assert_array_equal(merge("ema", models, decay=1.0), models[0])
    np.testing.assert_array_equal(merge("ema", models[:1], decay=0.9), models[0])
    with pytest.raises(ConfigError, match="decay"):
        merge("ema", models, decay=1.5)


def test_a_trajectory_average_may_be_that_of_its_end():
    models = np.random.default_rng(0).standard_normal((6, 9))
    np.testing.assert_allclose(merge("trajectory", models, last=2), models[-2:].mean(axis=0), rtol=1e-15)
    np.testing.assert_array_equal(merge("trajectory", models, last=1), models[-1])
    np.testing.assert_allclose(merge("trajectory", models, last=60), models.mean(axis=0), rtol=1e-15)
    with pytest.raises(ConfigError, match="last"):
        merge("trajectory", models, last=0)


def test_passthrough_gives_the_bits_and_scales():
    model = np.array([1.0, -0.0, np.nan, np.inf], np.float32)
    np.testing.assert_array_equal(as_bits(merge("passthrough", [model])), as_bits(model))
    np.testing.assert_array_equal(merge("passthrough", [model[:2]], scale=0.5), [0.5, 0])
    np.testing.assert_array_equal(merge("passthrough", [model[:2]], scale=0.0), [0, 0])


def test_nearswap_moves_every_element_by_t_at_most():
    base, model = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.05, 2.0, 1.0, 3.0])
    np.testing.assert_allclose(merge("nearswap", [model], base, t=0.1), [0.05, 1.1, 1.9, 3.0], rtol=1e-15)
    np.testing.assert_array_equal(merge("nearswap", [model], base, t=5.0), model)
    np.testing.assert_array_equal(merge("nearswap", [model], base, t=0.0), base)
    np.testing.assert_array_equal(merge("nearswap", [model], base, t=-1.0), base)
    # A difference below 1e-6 counts as 1e-6.
    np.testing.assert_allclose(merge("nearswap", [[5e-7, 1.0]], [0.0, 0.0], t=3e-7), [1.5e-7, 3e-7], rtol=1e-14)
