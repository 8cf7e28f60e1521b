"""Random numbers of records: the published generator, and nothing but (seed, name, index) counts."""

import math

import numpy as np
import pytest

from jaxtune.data.record_random import _mix, record_bits, record_normal, record_uniform

INDICES = np.array([0, 1, 7, 2**40])


def test_the_generator_is_splitmix64():
    # First outputs of SplitMix64 from seed 1234567, as in the test data of its many ports.
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * i) % 2**64 for i in range(1, 4)], np.uint64)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_record_does_not_depend_on_its_batch():
    whole = record_bits(3, "a", INDICES, 5)
    np.testing.assert_array_equal(whole[::-1], record_bits(3, "a", INDICES[::-1], 5))
    np.testing.assert_array_equal(whole[2:3, :2], record_bits(3, "a", INDICES[2:3], 2))


@pytest.mark.parametrize(("seed", "name"), [(4, "a"), (-3, "a"), (3 + 2**63, "a"), (3, "b")])
def test_another_seed_or_name_is_another_stream(seed, name):
    ours, theirs = record_bits(3, "a", np.arange(200), 50), record_bits(seed, name, np.arange(200), 50)
    assert not np.intersect1d(ours, theirs).size


def test_uniform_is_uniform_and_uncorrelated():
    numbers = record_uniform(0, "u", np.arange(4000), 5)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, 20, (0, 1))[0]
    # Chi-square with 19 degrees of freedom: 50 is beyond the 99.98th percentile.
    assert ((counts - 1000) ** 2 / 1000).sum() < 50
    across = np.corrcoef(np.concatenate([numbers[:-1], numbers[1:]], axis=1).T)
    # 4,000 pairs: standard deviation 0.016 of a correlation, so 5 of them.
    assert np.abs(across - np.eye(10)).max() < 0.08


def test_normal_has_mean_zero_and_variance_one():
    numbers = record_normal(0, "n", np.arange(1000), 100)
    assert numbers.dtype == np.float32
    # 100,000 numbers: standard errors 0.0032 of the mean and 0.0037 of the variance (kurtosis 2.7), five of them.
    assert abs(numbers.mean(dtype=np.float64)) < 0.016
    assert abs(numbers.var(dtype=np.float64) - 1) < 0.019
    assert 3 < np.abs(numbers).max() < 3.47
    word = int(record_bits(0, "n", [5], 3)[0, 2])
    total = sum((word >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
    expected = (total - 2 * 65535) / math.sqrt(4 * (65536**2 - 1) / 12)
    np.testing.assert_allclose(numbers[5, 2], expected, rtol=1e-6)  # float32
