"""What holds for whole families of merge methods: one task vector, none, any order, one rounding."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
RANDOM = {"dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5}, "della": {"density": 0.5}}
# Options with which a method does something, for each that does not care about the order of its models. (With weights
# like 0.5, 0.2 and 0.3 votes of coarse numbers are drawn, and rounding elects.)
SYMMETRIC = {
    "linear": {"weight": (0.5, 0.2, 0.3)},
    "task_arithmetic": {"weight": (0.5, 0.2, -0.3), "lambda": 0.7},
    "karcher": {},
    "multislerp": {"weight": (0.5, 0.2, 0.3)},
    "model_stock": {},
    "ties": {"weight": (0.5, 0.23, 0.37), "density": (0.3, 0.5, 0.7)},
    "breadcrumbs": {"weight": (0.5, 0.2, 0.3), "density": (0.3, 0.5, 0.7), "gamma": 0.1},
    "breadcrumbs_ties": {"weight": (0.5, 0.23, -0.37), "density": 0.5, "gamma": (0.0, 0.1, 0.2)},
    "sce": {"select_topk": 0.4},
    "ram": {"epsilon": 0.1},
    "ramplus_tl": {"epsilon": 0.1},
    "trajectory": {},
}
BY_ANGLE = ("karcher", "multislerp", "model_stock", "nuslerp", "slerp")


def draw(count, dtype, size=400, seed=0):
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((size // 20, 20))
    models = [(base + 0.2 * draw.standard_normal(base.shape)).astype(dtype) for _ in range(count)]
    return base.astype(dtype), models


def merge(name, models, base, **options):
    """One leaf, as files of torch have it."""
    base = None if METHODS[name].base == "none" else {"leaf": base}
    return merge_trees(METHODS[name], [{"leaf": model} for model in models], base, input_axis=-1, **options)["leaf"]


def as_bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


WHOLE = [
    ("linear", {}),
    ("linear", {"weight": 0.49}),
    ("karcher", {}),
    ("multislerp", {}),
    ("passthrough", {}),
    ("trajectory", {}),
    ("ema", {"decay": 0.3}),
    ("wise_ft", {"alpha": 1.0}),
    ("nearswap", {"t": 1e30}),
    ("sce", {}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"weight": 0.49, "normalize": True}),
    ("task_arithmetic", {"weight": 0.5, "lambda": 2.0}),
    *itertools.product(["dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"], [{}]),
    ("della", {"weight": 0.3}),
    ("ties", {}),
    ("ties", {"weight": 0.3}),
    ("ties", {"preset": "peft"}),
    ("ties", {"preset": "paper", "density": 1.0}),
    ("ties", {"preset": "fusionbench", "density": 1.0, "lambda": 1.0}),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "options"), WHOLE)
def test_one_task_vector_whole_is_the_model_bit_for_bit(name, options, dtype):
    base, (model,) = draw(1, dtype)
    # Where the base is much larger than the model, base + (model - base) has lost it.
    base.flat[:6], model.flat[:6] = (1, 100, -3, 0, 1, -0.0), (1e-6, -6e-8, -0.0, -0.0, 0, 6e-8)
    np.testing.assert_array_equal(as_bits(merge(name, [model], base, **options)), as_bits(model))


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_ties", "breadcrumbs", "della"])
def test_a_model_of_weight_zero_says_nothing(name):
    base, models = draw(2, np.float32)
    np.testing.assert_array_equal(merge(name, models, base, weight=(1.0, 0.0)), models[0])


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("name", [*SYMMETRIC, *RANDOM, "della_linear"])
def test_zero_task_vectors_are_the_base(name, dtype):
    base, _ = draw(1, dtype)
    options = {key: value for key, value in {**SYMMETRIC, **RANDOM}.get(name, {}).items() if key != "weight"}
    np.testing.assert_array_equal(merge(name, [base] * 3, base, **options), base)


# Of float64 nothing is rounded off: there sums are the same only in the same order.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, np.float32) for name in SYMMETRIC)]
    + [(name, np.float64) for name in ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")],
)
def test_the_order_of_models_is_without_meaning(name, dtype):
    base, models = draw(3, dtype, size=20_000)
    expected = merge(name, models, base, **SYMMETRIC[name])
    for order in itertools.permutations(range(3)):
        options = {
            option: tuple(value[k] for k in order) if isinstance(value, tuple) else value
            for option, value in SYMMETRIC[name].items()
        }
        found = merge(name, [models[k] for k in order], base, **options)
        np.testing.assert_array_equal(as_bits(found), as_bits(expected), err_msg=str(order))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [*SYMMETRIC, *RANDOM, "slerp", "nuslerp", "nearswap", "wise_ft", "ema"])
def test_results_are_those_of_float64_rounded_once(name, dtype):
    most = METHODS[name].num_models[1] or 3
    base, models = draw(most, dtype, size=100_000)
    options = {**SYMMETRIC, **RANDOM, "slerp": {"t": 0.3}, "nearswap": {"t": 0.1}, "ema": {"decay": 0.6}}.get(name, {})
    found = merge(name, models, base, **options)
    wide = merge(name, [model.astype(np.float64) for model in models], base.astype(np.float64), **options)
    differ = np.mean((as_bits(found) != as_bits(wide.astype(dtype))) & ~is_half(wide, dtype))
    assert differ < (5e-3 if name in BY_ANGLE else 2e-4)


def is_half(wide, dtype):
    """Where a result is half-way between two numbers of the dtype but for the last bits of float64."""
    narrow = wide.astype(dtype)
    spacing = np.abs(np.nextafter(narrow, dtype(np.inf)).astype(np.float64) - narrow.astype(np.float64))
    below = np.abs(np.nextafter(narrow, dtype(-np.inf)).astype(np.float64) - narrow.astype(np.float64))
    apart = np.abs(wide - narrow.astype(np.float64))
    return np.minimum(np.abs(apart - spacing / 2), np.abs(apart - below / 2)) < 1e-14 * np.abs(wide)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("wise_ft", "alpha", (0.0, 0.3, 1.0)),
        ("slerp", "t", (0.0, 0.3, 1.0)),
        ("nearswap", "t", (0.0, 1e-7, 0.3)),
        ("linear", "weight", (0.3, 1.0)),
        ("nuslerp", "weight", (0.3, 1.0)),
        ("multislerp", "weight", (0.3, 1.0)),
        ("passthrough", "scale", (0.3, 1.0)),
        ("ema", "decay", (0.0, 0.3, 1.0)),
        *(
            (name, "lambda", (0.0, 0.3, 1.0))
            for name in ("task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs")
        ),
        *((name, "weight", (0.3, 1.0)) for name in ("task_arithmetic", "ties", "dare_linear", "della_linear")),
        ("dare_linear", "density", (0.3, 0.5)),
        ("ram", "epsilon", (0.01, 0.1)),
    ],
)
def test_a_grid_of_values_is_one_vmap(name, option, values):
    base, models = draw(METHODS[name].num_models[1] or 2, np.float32)
    merge_one = jax.jit(jax.vmap(lambda value: merge(name, to_jax(models), to_jax(base), **{option: value})))
    for value, found in zip(values, merge_one(jnp.asarray(values, jnp.float32)), strict=True):
        expected = merge(name, to_jax(models), to_jax(base), **{option: value})
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6, err_msg=str(value))


def to_jax(arrays):
    return jax.tree.map(jnp.asarray, arrays)
