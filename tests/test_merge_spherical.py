"""Methods on the sphere: against scalar formulas, numbers worked out by hand, and invariance under rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import ConfigError
from jaxtune.merge import arrays
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS


def merge(name, models, base=None, *, input_axis=-1, **options):
    """One leaf, as files of torch have it."""
    base = None if base is None else {"leaf": np.asarray(base, np.float64)}
    models = [{"leaf": np.asarray(model, np.float64)} for model in models]
    return merge_trees(METHODS[name], models, base, input_axis=input_axis, **options)["leaf"]


def slerp_by_hand(t, one, other):
    lengths = [math.sqrt(math.fsum(x * x for x in vector)) for vector in (one, other)]
    lengths = [length if length > 1e-8 else 1.0 for length in lengths]
    cosine = math.fsum(x * y for x, y in zip(one, other, strict=True)) / lengths[0] / lengths[1]
    if abs(cosine) > 0.9995:
        return [(1 - t) * x + t * y for x, y in zip(one, other, strict=True)]
    angle = math.acos(cosine)
    a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [a * x + b * y for x, y in zip(one, other, strict=True)]


PAIRS = {
    "orthogonal": ([1.0, 0, 0, 0, 0, 0, 0], [0.0, 2, 0, 0, 0, 0, 0]),
    "parallel": ([1.0, 2, 3, 4, 5, 6, 7], [2.0, 4, 6, 8, 10, 12, 14]),
    "opposite": ([1.0, 2, 3, 4, 5, 6, 7], [-1.0, -2, -3, -4, -5, -6, -7]),
    "zero": ([0.0] * 7, [1.0, 2, 3, 4, 5, 6, 7]),
    "any": ([0.3, -1, 2, 0.1, 0, 1, 3], [1.0, 0.2, -0.4, 2, 3, -1, 1]),
    "zeros": ([0.0] * 7, [0.0] * 7),
}


@pytest.mark.parametrize("run", [5, 1 << 20])
@pytest.mark.parametrize("t", [-0.2, 0.25, 0.5, 0.8, 1.2, 1.0])
@pytest.mark.parametrize("pair", PAIRS)
def test_slerp_is_the_scalar_formula_in_runs_of_any_length(pair, t, run, monkeypatch):
    monkeypatch.setattr(arrays, "RUN", run)
    one, other = PAIRS[pair]
    np.testing.assert_allclose(merge("slerp", [other], one, t=t), slerp_by_hand(t, one, other), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("has_base", [False, True])
def test_nuslerp_of_rows(has_base):
    one, other = np.tile([1.0, 0.0], (4, 1)), np.array([(1.0, 0), (2, 0), (-1, 0), (0, 1)])
    expected = [(1, 0), (1.25, 0), (0.5, 0), (0.92387953, 0.38268343)]
    base = np.random.default_rng(0).standard_normal((4, 2)) if has_base else np.zeros((4, 2))
    models = [base + one, base + other]
    options = dict(weight=(0.75, 0.25), nuslerp_flatten=False)
    upright, turned = (base, base.T) if has_base else (None, None)
    np.testing.assert_allclose(merge("nuslerp", models, upright, **options), base + expected, atol=1e-8)
    # mergekit's "row-wise" takes the columns of a file's matrix, which are the rows of ours.
    columns = [model.T for model in models]
    found = merge("nuslerp", columns, turned, nuslerp_row_wise=True, **options)
    np.testing.assert_allclose(found, (base + expected).T, atol=1e-8)
    found = merge("nuslerp", columns, turned, input_axis=0, **options)
    np.testing.assert_allclose(found, (base + expected).T, atol=1e-8)
    found = merge("nuslerp", models, upright, input_axis=0, nuslerp_row_wise=True, **options)
    np.testing.assert_allclose(found, base + expected, atol=1e-8)


def test_nuslerp_is_slerp_and_one_model_at_its_ends():
    one, other = PAIRS["any"]
    found = merge("nuslerp", [one, other], weight=(3.0, 1.0))
    np.testing.assert_allclose(found, slerp_by_hand(0.25, one, other), rtol=1e-14)
    np.testing.assert_array_equal(merge("nuslerp", [one, other], weight=(1.0, 0.0)), one)
    np.testing.assert_array_equal(merge("nuslerp", [one, other], weight=(0.0, 2.0)), other)


def test_karcher_mean_by_hand():
    np.testing.assert_allclose(merge("karcher", [(1.0, 0), (2.0, 0)]), (1.5, 0), rtol=1e-15)
    np.testing.assert_array_equal(merge("karcher", [(1e-6, 0), (0, 2e-6)]), (0, 0))
    # Of two points the mean is half-way; a zero model shortens it and does not turn it.
    half = 1.5 * math.sqrt(0.5)
    np.testing.assert_allclose(merge("karcher", [(1.0, 0), (0, 2.0)]), (half, half), rtol=1e-14)
    np.testing.assert_allclose(merge("karcher", [(1.0, 0), (0, 2.0), (0, 0)]), np.array((half, half)) * 2 / 3)
    np.testing.assert_allclose(merge("karcher", [(1.0, 0), (-1.0, 0)]), (1.0, 0), rtol=1e-14)
    for seed in range(20):  # opposite but for rounding: no way from one to the other is the shortest
        model = np.random.default_rng(seed).standard_normal(7)
        found = merge("karcher", [model, -3 * model])
        np.testing.assert_allclose(np.linalg.norm(found), 2 * np.linalg.norm(model), rtol=1e-12)
        np.testing.assert_allclose(np.abs(found), 2 * np.abs(model), rtol=1e-6)


def test_the_tangents_at_the_karcher_mean_cancel():
    models = np.random.default_rng(0).standard_normal((4, 12)) + 1
    mean = merge("karcher", models, max_iter=100, tol=1e-12)
    mean = mean / np.linalg.norm(mean)
    units = models / np.linalg.norm(models, axis=1, keepdims=True)
    angles = np.arccos(units @ mean)
    tangents = (angles / np.sin(angles))[:, None] * (units - (units @ mean)[:, None] * mean)
    np.testing.assert_allclose(tangents.sum(axis=0), 0, atol=1e-11)


def test_multislerp_by_hand():
    np.testing.assert_allclose(merge("multislerp", [(1.0, 0), (0, 1.0)]), (0.5**0.5, 0.5**0.5), rtol=1e-7)
    np.testing.assert_array_equal(merge("multislerp", [(3.0, -0.0)]), (3.0, -0.0))
    np.testing.assert_allclose(merge("multislerp", [(1.0, 0), (-1.0, 0)]), (0, 0), atol=1e-15)  # the straight line
    with pytest.raises(ConfigError, match="balance out"):
        merge("multislerp", [(1.0, 0), (-0.5, 0.75**0.5), (-0.5, -(0.75**0.5))])
    base = np.array([2.0, 3.0])
    np.testing.assert_array_equal(merge("multislerp", [base] * 3, base), base)


@pytest.mark.parametrize(("name", "count"), [("karcher", 3), ("multislerp", 3), ("nuslerp", 2), ("model_stock", 3)])
def test_rotated_models_merge_to_the_rotated_model(name, count):
    draw = np.random.default_rng(0)
    models, base = draw.standard_normal((count, 8)) + 1, draw.standard_normal(8)
    rotation = np.linalg.qr(draw.standard_normal((8, 8)))[0]
    base_or_none = None if name == "karcher" else base
    found = merge(name, models @ rotation, None if base_or_none is None else base @ rotation)
    np.testing.assert_allclose(found, merge(name, models, base_or_none) @ rotation, rtol=1e-12, atol=1e-13)


def test_the_geometric_median_of_three_matrices():
    models = [  # sd-mecha's own case, and what it expects
        [[3.0, 4, 1, -2], [2, 1, -4, 3], [-1, 2, 3, 4], [4, -3, 2, 1]],
        [[-1.0, 3, 4, 2], [4, 2, -3, 1], [3, -1, 2, 4], [2, 4, 1, -3]],
        [[-1.0, 3, 2, 0], [3, 0, 2, 1], [-1, 3, 1, 0], [3, 0, -4, 3]],
    ]
    found = merge("geometric_median", models, None)
    expected = [
        [0.4791, 3.3698, 2.2343, -0.1354],
        [2.9323, 0.9739, -1.7289, 1.7395],
        [0.2082, 1.4220, 2.0416, 2.6873],
        [3.0677, 0.0989, -0.2711, 0.4481],
    ]
    np.testing.assert_allclose(found, expected, atol=2e-3)  # it stops where float32 sees its sum fall no more
    pulls = [(found - model) / np.linalg.norm(found - model) for model in map(np.asarray, models)]
    np.testing.assert_allclose(sum(pulls), 0, atol=1e-9)  # where it lies, the models' pulls cancel


def test_the_geometric_median_stays_with_the_many():
    models = [(1.0, 1.0), (1.1, 0.9), (0.9, 1.2), (100.0, -50.0)]
    assert np.abs(merge("geometric_median", models, None) - 1).max() < 0.15
    np.testing.assert_allclose(merge("geometric_median", models, None, weight=(1.0, 0, 0, 0)), models[0])
    heavy = merge("geometric_median", models, None, weight=(1.0, 1.0, 1.0, 4.0))
    np.testing.assert_allclose(heavy, models[3], rtol=1e-6)  # more than half of the weight


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_stays_at_the_base_between_opposite_models(filter_wise):
    found = merge("model_stock", [(3.0, 3.0), (1.0, 3.0)], (2.0, 3.0), filter_wise=filter_wise)
    np.testing.assert_array_equal(found, (2.0, 3.0))


def test_model_stock_by_rows():
    models = [
        [[3.0, 4, 1, -2], [2, 1, -4, 3], [-1, 2, 3, 4], [4, -3, 2, 1]],
        [[-1.0, 3, 4, 2], [4, 2, -3, 1], [3, -1, 2, 4], [2, 4, 1, -3]],
        [[-1.0, 2, 3, 4], [4, -3, 2, 1], [3, 4, 1, -2], [2, 1, -4, 3]],
    ]
    found = merge("model_stock", models, np.zeros((4, 4)), filter_wise=True)
    # Cosines of the rows' pairs: 0.3, 0, 0.9 and 5/6, 0, 1/6: t is 2/3 and 3/5. (sd-mecha leaves out the zeros.)
    expected = [(2 / 9, 2, 16 / 9, 8 / 9), (2, 0, -1, 1)]
    np.testing.assert_allclose(found[:2], expected, rtol=1e-14, atol=1e-15)
    turned = [np.transpose(model) for model in models]
    found = merge("model_stock", turned, np.zeros((4, 4)), input_axis=0, filter_wise=True)
    np.testing.assert_allclose(found.T[:2], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "models", "base", "options"),
    [
        ("slerp", [(1.0, 2)], (1.0, 2), {"t": 0.3}),
        ("slerp", [(1.0, 2)], (0.0, 0), {"t": 0.3}),
        ("nuslerp", [[(1.0, 0)] * 4, [(1.0, 0), (2, 0), (-1, 0), (0, 0)]], None, {"nuslerp_flatten": False}),
        ("nuslerp", [(1.0, 0), (1.0, 0)], (1.0, 0), {}),
        ("karcher", [(1.0, 0), (2.0, 0)], None, {}),
        ("karcher", [(1.0, 0), (0.0, 0), (0, 1.0)], None, {}),
        ("multislerp", [(1.0, 0), (2.0, 0), (3.0, 0)], (1.0, 0), {}),
        ("model_stock", [(3.0, 3), (1, 3)], (2.0, 3), {}),
        ("model_stock", [(3.0, 3), (1, 3)], (2.0, 3), {"filter_wise": True}),
        ("model_stock", [(2.0, 3), (2, 3)], (2.0, 3), {}),
    ],
)
def test_derivatives_are_finite_where_vectors_vanish_or_are_parallel(name, models, base, options):
    def total(models, base):
        base = None if base is None else {"leaf": base}
        models = [{"leaf": model} for model in models]
        return merge_trees(METHODS[name], models, base, input_axis=-1, **options)["leaf"].sum()

    models = [jnp.asarray(model, jnp.float32) for model in models]
    gradients = jax.grad(total)(models, None if base is None else jnp.asarray(base, jnp.float32))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
