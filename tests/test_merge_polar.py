"""Polar factors and truncated factorisations: SVDs are the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.merge.factors import top_factors
from jaxtune.merge.polar import SMALLEST, newton_schulz, plan_steps, polar


def draw_with_spectrum(values, shape, seed=0):
    """A matrix with these singular values, and its polar factor."""
    random, count = np.random.default_rng(seed), len(values)
    left, _ = np.linalg.qr(random.standard_normal((shape[0], count)))
    right, _ = np.linalg.qr(random.standard_normal((shape[1], count)))
    return left * values @ right.T, left @ right.T


@pytest.mark.parametrize("smallest", SMALLEST.values())
def test_planned_polynomials_bring_every_singular_value_to_one(smallest):
    values = np.geomspace(smallest, 1, 10_001)
    for a, b, c in plan_steps(smallest):
        values = a * values + b * values**3 + c * values**5
    np.testing.assert_allclose(values, 1, rtol=4e-16)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (5, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_newton_schulz_is_as_exact_as_the_arithmetic(shape, condition):
    matrix, factor = draw_with_spectrum(np.geomspace(1, 1 / condition, min(shape)), shape)
    # A few machine epsilons times the condition number is what an SVD promises, too.
    np.testing.assert_allclose(newton_schulz(np, matrix), factor, atol=2e-15 * condition)
    single = np.asarray(newton_schulz(jnp, jnp.asarray(matrix, jnp.float32)))
    np.testing.assert_allclose(single, factor, atol=2e-6 * max(condition / 4, 1))
    # Orthonormal to the machine epsilon, whatever the condition.
    gram = single.T @ single if shape[0] > shape[1] else single @ single.T
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=3e-6)


def test_newton_schulz_does_not_depend_on_the_scale():
    matrix, factor = draw_with_spectrum(np.linspace(1, 2, 10), (12, 10))
    for scale in (1e-15, 1e15):
        found = np.asarray(newton_schulz(jnp, jnp.asarray(matrix * scale, jnp.float32)))
        np.testing.assert_allclose(found, factor, atol=2e-6)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_the_host_switches_to_an_svd_where_a_gram_matrix_would_lose_digits(shape, condition):
    matrix, factor = draw_with_spectrum(np.geomspace(1, 1 / condition, min(shape)), shape)
    np.testing.assert_allclose(polar(np, matrix), factor, atol=max(1e-8, 1e-15 * condition))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_a_factor_from_a_gram_matrix_is_orthonormal(shape):
    matrix, _ = draw_with_spectrum(np.geomspace(1, 1 / 5e4, 40), shape)
    found = polar(np, matrix)
    gram = found.T @ found if shape[0] > shape[1] else found @ found.T
    np.testing.assert_allclose(gram, np.eye(40), atol=1e-11)  # 2e-7 before the last step


def test_of_a_matrix_without_full_rank_the_partial_isometry_comes_out():
    matrix, factor = draw_with_spectrum(np.array([3.0, 2.0, 1.0]), (8, 6))
    np.testing.assert_allclose(polar(np, matrix), factor, atol=1e-14)
    for dtype in (np.float32, np.float64):
        assert not newton_schulz(np, np.zeros((4, 3), dtype)).any()
        padded = np.zeros((9, 7), dtype)
        padded[:8, :6] = draw_with_spectrum(np.linspace(1, 2, 6), (8, 6))[0]
        found = newton_schulz(np, padded)
        assert not found[8].any()
        assert not found[:, 6].any()
        np.testing.assert_allclose(found.T @ found, np.diag([1.0] * 6 + [0.0]), atol=10 * np.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e8])
@pytest.mark.parametrize("count", [5, 30, None])
def test_top_factors_are_those_of_an_svd(shape, condition, count):
    matrix, _ = draw_with_spectrum(np.geomspace(1, 1 / condition, min(shape)), shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    found = top_factors(np, matrix, count)
    np.testing.assert_allclose(found[1], values[:count], rtol=1e-7)
    for vectors, expected in ((found[0], left[:, :count]), (found[2], right[:count].T)):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-7)
        np.testing.assert_allclose(np.abs(np.sum(vectors * expected, axis=0)), 1, atol=1e-7)  # up to signs
    np.testing.assert_allclose(found[0] * found[1] @ found[2].T, left[:, :count] * values[:count] @ right[:count],
                               atol=1e-12)  # fmt: skip


def test_top_factors_on_a_device():
    matrix, _ = draw_with_spectrum(np.geomspace(1, 1e-3, 30), (50, 30))
    left, values, right = (np.asarray(part) for part in top_factors(jnp, jnp.asarray(matrix, jnp.float32), 20))
    expected = np.linalg.svd(matrix)
    np.testing.assert_allclose(values, expected[1][:20], atol=1e-6)
    np.testing.assert_allclose(left * values @ right.T, expected[0][:, :20] * expected[1][:20] @ expected[2][:20],
                               atol=2e-6)  # fmt: skip


def test_zero_directions_have_zero_vectors():
    matrix, _ = draw_with_spectrum(np.array([2.0, 1.0]), (6, 5))
    for xp, given in ((np, matrix), (jnp, jnp.zeros((6, 5)).at[:2, :2].set(jnp.array([[2.0, 0], [0, 1]])))):
        left, values, right = (np.asarray(part) for part in top_factors(xp, given))
        assert not values[2:].any()
        assert not left[:, 2:].any()
        assert not right[:, 2:].any()
