"""Every merge method: its laws, its tree, and the same answer in NumPy and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.method import REQUIRED
from jaxtune.merge.registry import METHODS
from jaxtune.tree import flatten, map_leaves, unflatten

# Values of options without a default.
GIVEN = {"t": 0.3, "decay": 0.6, "task": 1}


def draw_trees(count, dtype=np.float32, seed=0):
    draw = np.random.default_rng(seed)
    shapes = {"a/kernel": (12, 20), "a/bias": (20,), "b/scale": (1,), "c": (), "d/conv": (3, 3, 4, 6)}
    base = {path: draw.standard_normal(shape).astype(dtype) for path, shape in shapes.items()}
    trees = [
        unflatten({path: (leaf + 0.1 * draw.standard_normal(leaf.shape)).astype(dtype) for path, leaf in base.items()})
        for _ in range(count)
    ]
    return unflatten(base), trees


def call(name, models, base, **options):
    method = METHODS[name]
    if method.data == "fishers":
        fishers = [draw_trees(1, seed=9 + n)[0] for n, _ in enumerate(models)]
        options["extras"] = [map_leaves(lambda _, leaf: np.square(leaf), tree) for tree in fishers]
    if method.data == "grams":
        rows = np.random.default_rng(9).standard_normal((len(models), 30, 12)).astype(np.float32)
        options["extras"] = [{"a": {"kernel": x.T @ x}} for x in rows]
    given = {option: GIVEN[option] for option, value in method.options.items() if value is REQUIRED}
    return merge_trees(method, models, None if method.base == "none" else base, **given, **options)


def count_of(name):
    least, most = METHODS[name].num_models
    return min(max(least, 3), most or 3)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_tree_of_the_base_in_its_dtypes(name):
    base, models = draw_trees(count_of(name))
    merged = call(name, models, base)
    assert flatten(merged).keys() == flatten(base).keys()
    for path, leaf in flatten(merged).items():
        assert leaf.shape == flatten(base)[path].shape, path
        assert leaf.dtype == np.float32, path
        assert np.isfinite(leaf).all(), path


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_under_jit(name):
    base, models = draw_trees(count_of(name))
    expected = call(name, models, base)
    found = jax.jit(lambda models, base: call(name, models, base))(*map_to_jax(models, base))
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(np.asarray(leaf), flatten(expected)[path], rtol=2e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", METHODS)
def test_models_that_are_the_base_merge_to_the_base(name):
    base, _ = draw_trees(1)
    merged = call(name, [base] * count_of(name), base)
    for path, leaf in flatten(merged).items():
        np.testing.assert_allclose(leaf, flatten(base)[path], rtol=3e-7, err_msg=path)


def map_to_jax(models, base):
    def to_jax(tree):
        return map_leaves(lambda _, leaf: jnp.asarray(leaf), tree)

    return [to_jax(model) for model in models], to_jax(base)
