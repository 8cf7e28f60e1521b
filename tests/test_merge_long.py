"""Spectral methods on long matrices, read in passes: against singular value decompositions of the whole."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtune import checkpoint
from jaxtune.merge import long, method
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS
from jaxtune.merging import merge_recipe
from jaxtune.tree import flatten, unflatten

ROWS, COLUMNS = 300, 24
CASES = [("iso_c", {}), ("iso_c", {"lambda": 0.7}), ("tsv_m", {}), ("tsv_m", {"rank_share": 0.2, "lambda": 1.3})]


@pytest.fixture
def all_are_long(monkeypatch):
    """Small matrices count as long, and are read in runs of a few rows."""
    monkeypatch.setattr(method, "LONG", 100)
    monkeypatch.setattr(long, "RUN", 40 * COLUMNS)


def draw(count=3, *, kind="full", dtype=np.float64):
    draw = np.random.default_rng(0)
    base = draw.standard_normal((ROWS, COLUMNS))
    deltas = []
    for _ in range(count):
        delta = 0.1 * draw.standard_normal((ROWS, COLUMNS))
        if kind == "low rank":
            delta = draw.standard_normal((ROWS, 3)) @ draw.standard_normal((3, COLUMNS))
        elif kind == "few rows":
            delta[10:] = 0
        elif kind == "steep":
            left, right = (np.linalg.qr(draw.standard_normal((n, COLUMNS)))[0] for n in (ROWS, COLUMNS))
            delta = left * np.logspace(0, -6, COLUMNS) @ right.T
        deltas.append(delta)
    return base.astype(dtype), [(base + delta).astype(dtype) for delta in deltas]


def merge(name, base, models, *, input_axis=-1, **options):
    return merge_trees(
        METHODS[name], [{"x": one} for one in models], {"x": base}, input_axis=input_axis, **options
    )["x"]  # fmt: skip


def iso_c_by_svd(base, models, scale=1.0):
    left, values, right = np.linalg.svd(sum(models) - len(models) * base, full_matrices=False)
    is_there = values > 1e-12 * values[0]
    return base + scale * values.mean() * left[:, is_there] @ right[is_there]


@pytest.mark.parametrize("kind", ["full", "low rank", "few rows", "steep"])
@pytest.mark.parametrize("count", [1, 3])
def test_iso_c_is_that_of_an_svd(count, kind, all_are_long):
    base, models = draw(count, kind=kind)
    # Of differences of numbers of size 1 a singular value of 1e-6 has ten digits.
    np.testing.assert_allclose(merge("iso_c", base, models), iso_c_by_svd(base, models), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "low rank", "few rows", "steep"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_long_way_is_the_short_way(name, options, kind, monkeypatch):
    base, models = draw(kind=kind)
    expected = merge(name, base, models, **options)
    monkeypatch.setattr(method, "LONG", 100)
    monkeypatch.setattr(long, "RUN", 40 * COLUMNS)
    found = merge(name, base, models, **options)
    assert np.abs(found - expected).max() > 0  # it was another way
    np.testing.assert_allclose(found, expected, atol=1e-8)
    ours = merge(name, base.T, [model.T for model in models], input_axis=0, **options)
    np.testing.assert_allclose(ours.T, expected, atol=1e-8)


@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
def test_equal_models_are_the_base(name, all_are_long):
    base, _ = draw()
    np.testing.assert_array_equal(merge(name, base, [base, base]), base)


@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
def test_jax_takes_the_matrix_whole(name, all_are_long):
    base, models = draw(dtype=np.float32)
    expected = merge(name, base, models)
    found = merge(name, jnp.asarray(base), [jnp.asarray(model) for model in models])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    turned = merge(name, jnp.asarray(base).T, [jnp.asarray(model).T for model in models], input_axis=0)
    np.testing.assert_allclose(turned.T, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
def test_files_give_the_bytes_of_arrays_and_of_any_number_of_workers(name, dtype, tmp_path, all_are_long):
    base, models = draw(dtype=dtype)
    for n, tree in enumerate([base, *models]):
        checkpoint.save(tmp_path / f"m{n}", unflatten({"embed.weight": tree}), config={"model_type": "made_up"})
    recipe = {
        "merge_method": name,
        "base_model": str(tmp_path / "m0"),
        "models": [{"model": str(tmp_path / f"m{n}")} for n in (1, 2, 3)],
    }
    found = []
    for workers in (1, 2):
        merge_recipe(recipe, tmp_path / f"out{workers}", num_workers=workers)
        found.append(flatten(checkpoint.load(tmp_path / f"out{workers}").params)["embed.weight"])
    expected = merge(name, base, models)
    for leaf in found:
        np.testing.assert_array_equal(np.asarray(leaf, np.float64), np.asarray(expected, np.float64))
