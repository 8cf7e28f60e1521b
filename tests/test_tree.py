"""Trees by path, and the arithmetic of task vectors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtune import tree
from jaxtune.errors import NonFiniteError, TreeMismatchError


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    return {
        "block_10": {"kernel": draw.normal(size=(3, 4)).astype(np.float32)},
        "block_2": {"kernel": draw.normal(size=(3, 4)).astype(np.float32), "bias": np.zeros(4, np.float32)},
        "count": np.array(7, np.int32),
    }


def test_flatten_orders_blocks_by_number_and_unflatten_undoes_it(params):
    flat = tree.flatten(params)
    assert list(flat) == ["block_2/bias", "block_2/kernel", "block_10/kernel", "count"]
    back = tree.unflatten(flat)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_path_cannot_be_leaf_and_folder_at_once():
    with pytest.raises(TreeMismatchError, match="a leaf and a folder"):
        tree.unflatten({"a": np.zeros(1), "a/b": np.zeros(1)})
    with pytest.raises(TreeMismatchError, match="non-empty strings"):
        tree.flatten({"a/b": np.zeros(1)})


def test_select_takes_whole_paths(params):
    assert list(tree.flatten(tree.select(params, include=r"block_2/.*"))) == ["block_2/bias", "block_2/kernel"]
    assert list(tree.flatten(tree.select(params, exclude=r".*/kernel"))) == ["block_2/bias", "count"]


def test_a_mismatch_names_every_leaf_with_both_sides(params):
    other = {
        "block_2": {"kernel": np.zeros((3, 5), np.float32), "bias": np.zeros(4, np.float32)},
        "count": params["count"],
    }
    with pytest.raises(TreeMismatchError) as caught:
        tree.check_same({"base": params, "finetuned": other})
    message = str(caught.value)
    assert "differ in 2 leaves" in message
    assert "block_2/kernel: base float32[3, 4], finetuned float32[3, 5]" in message
    assert "block_10/kernel: only in base" in message


def test_dtypes_count_only_on_request_but_kind_always(params):
    half = tree.map_leaves(lambda _, x: x.astype(np.float16) if tree.is_float(x) else x, params)
    tree.check_same({"a": params, "b": half})
    with pytest.raises(TreeMismatchError, match="float16"):
        tree.check_same({"a": params, "b": half}, dtypes=True)
    floats = tree.map_leaves(lambda _, x: x.astype(np.float32), params)
    with pytest.raises(TreeMismatchError, match="count"):
        tree.check_same({"a": params, "b": floats})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_check_finite_counts_bad_values_by_leaf(dtype):
    bad = {"ok": np.ones(3, dtype), "bad": np.array([1, np.nan, np.inf]).astype(dtype)}
    with pytest.raises(NonFiniteError, match=r"bad: 2 of 3 values"):
        tree.check_finite("model", bad)
    tree.check_finite("model", {"ok": bad["ok"]})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("as_jax", [False, True])
def test_one_task_vector_at_scale_one_is_the_finetuned_model(params, dtype, as_jax):
    """Exact wherever the difference is: values within a factor of two of each other (Sterbenz)."""
    if as_jax and dtype == np.float64:
        pytest.skip("float64 is off in jax by default")
    base = tree.map_leaves(lambda _, x: x.astype(dtype) if tree.is_float(x) else x, params)
    finetuned = tree.map_leaves(lambda _, x: (x * x.dtype.type(1.25)) if tree.is_float(x) else x + 1, base)
    if as_jax:
        base, finetuned = jax.tree.map(jnp.asarray, base), jax.tree.map(jnp.asarray, finetuned)
    vector = tree.task_vector(base, finetuned)
    moved = tree.apply_task_vector(base, vector)
    for path, leaf in tree.flatten(moved).items():
        assert leaf.dtype == tree.flatten(base)[path].dtype
        expected = tree.flatten(base)[path] if path == "count" else tree.flatten(finetuned)[path]
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected), err_msg=path)


def test_zero_scale_is_the_base_and_counters_never_move(params):
    vector = tree.task_vector(params, tree.map_leaves(lambda _, x: x + x.dtype.type(1), params))
    assert (vector["count"].dtype, int(vector["count"])) == (np.int32, 0)
    jax.tree.map(np.testing.assert_array_equal, tree.apply_task_vector(params, vector, 0.0), params)


def test_a_sweep_of_scales_is_one_vmap(params):
    base = jax.tree.map(jnp.asarray, params)
    vector = tree.task_vector(base, jax.tree.map(lambda x: x + x.dtype.type(1), base))
    scales = jnp.linspace(0.0, 1.0, 5)
    swept = jax.jit(jax.vmap(tree.apply_task_vector, in_axes=(None, None, 0)))(base, vector, scales)
    for n, scale in enumerate(scales):
        one = tree.apply_task_vector(base, vector, scale)
        jax.tree.map(lambda many, x, n=n: np.testing.assert_allclose(many[n], x, rtol=1e-6), swept, one)


def test_bfloat16_sums_round_once():
    """256 + 1 + 1 in bfloat16 steps stays 256; computed wide and rounded once it is 258."""
    base = {"w": np.array([256.0], ml_dtypes.bfloat16)}
    vector = {"w": np.array([2.0], np.float32)}
    assert float(tree.apply_task_vector(base, vector)["w"][0]) == 258.0
