"""The line between two models: its ends, its rounding, its sweep, and the barrier on it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtune import tree
from jaxtune.errors import TreeMismatchError
from jaxtune.interpolate.barrier import measure_barrier
from jaxtune.interpolate.line import interpolate_linear

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def draw_leaf(seed, dtype=np.float32, shape=(5, 3)):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_same_bits(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.dtype == wanted.dtype
    assert got.tobytes() == wanted.tobytes()


@pytest.fixture
def ends():
    """Two models with every value that arithmetic would change: -0, subnormals, Inf, NaN."""
    odd = [-0.0, 0.0, np.inf, -np.inf, np.nan, 1e-40, 1.0, -2.5]
    first = {"odd": np.array(odd, np.float32), "block": {"kernel": draw_leaf(0)}, "empty": np.zeros((0, 3), np.float32)}
    second = {"odd": first["odd"][::-1].copy(), "block": {"kernel": draw_leaf(1)}, "empty": first["empty"].copy()}
    return first, second


@pytest.mark.parametrize("as_jax", [False, True])
@pytest.mark.parametrize("number", [int, float, np.float32, np.float64, np.asarray, jnp.float32])
def test_the_ends_are_the_models_bit_for_bit(number, as_jax, ends):
    first, second = jax.tree.map(jnp.asarray, ends) if as_jax else ends
    with np.errstate(invalid="ignore"):  # a weight on the device is only looked at after the arithmetic
        for weight, end in ((0, first), (1, second)):
            jax.tree.map(assert_same_bits, interpolate_linear(first, second, number(weight)), end)


def test_the_ends_of_a_traced_line_are_the_models_too(ends):
    line = jax.vmap(lambda weight: interpolate_linear(*jax.tree.map(jnp.asarray, ends), weight))
    points = line(jnp.array([0.0, 0.5, 1.0], jnp.float32))
    jax.tree.map(lambda point, end: assert_same_bits(point[0], end), points, ends[0])
    jax.tree.map(lambda point, end: assert_same_bits(point[2], end), points, ends[1])


@pytest.mark.parametrize("as_jax", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_half_precision_is_rounded_once(dtype, as_jax):
    first, second, weight = draw_leaf(0, dtype, (400,)), draw_leaf(1, dtype, (400,)), 0.25
    wanted = (0.75 * first.astype(np.float64) + 0.25 * second.astype(np.float64)).astype(dtype)  # exact before it
    share = np.asarray(weight, dtype)
    narrow = (1 - share) * first + share * second
    assert narrow.dtype == dtype
    assert (narrow != wanted).any(), "the test cannot tell one rounding from three"
    if as_jax:
        first, second = jnp.asarray(first), jnp.asarray(second)
    assert_same_bits(interpolate_linear({"w": first}, {"w": second}, weight)["w"], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [0.3, -0.7, 2.0, 3])
def test_between_and_beyond_the_ends(weight, dtype):
    first, second = draw_leaf(0, dtype), draw_leaf(1, dtype)
    got = interpolate_linear({"w": first}, {"w": second}, weight)["w"]
    assert got.dtype == dtype
    for position in np.ndindex(first.shape):
        a, b = float(first[position]), float(second[position])
        wanted = a + weight * (b - a)
        # One rounding to the dtype, and that of float32 or float64 before it.
        size = (abs(1 - weight) * abs(a) + abs(weight) * abs(b)) * float(ml_dtypes.finfo(dtype).eps)
        assert abs(float(got[position]) - wanted) <= size


def test_the_dtypes_of_the_first_model_come_out():
    first, second = {"w": draw_leaf(0, np.float16)}, {"w": draw_leaf(1, np.float32)}
    assert interpolate_linear(first, second, 0.5)["w"].dtype == np.float16
    assert interpolate_linear(second, first, 0.5)["w"].dtype == np.float32
    assert_same_bits(interpolate_linear(first, second, 1)["w"], second["w"].astype(np.float16))


def test_float64_is_not_narrowed_on_the_way():
    first, second = draw_leaf(0, np.float64), draw_leaf(1, np.float64)
    got = interpolate_linear({"w": first}, {"w": second}, 0.3)["w"]
    np.testing.assert_allclose(got, 0.7 * first + 0.3 * second, rtol=1e-14)
    assert np.abs(got - got.astype(np.float32)).max() > 0


def test_counters_and_masks_are_the_first_models():
    first = {"step": np.array(7, np.int32), "mask": np.array([True, False]), "w": draw_leaf(0)}
    second = {"step": np.array(9, np.int32), "mask": np.array([False, True]), "w": draw_leaf(1)}
    for weight in (0, 0.5, 1):
        middle = interpolate_linear(first, second, weight)
        assert_same_bits(middle["step"], first["step"])
        assert_same_bits(middle["mask"], first["mask"])


def test_a_whole_line_is_one_vmap():
    first, second = {"w": jnp.asarray(draw_leaf(0))}, {"w": jnp.asarray(draw_leaf(1))}
    weights, num_traces = jnp.linspace(-0.5, 1.5, 9), []

    @jax.jit
    def line(weights):
        num_traces.append(1)
        return jax.vmap(lambda weight: interpolate_linear(first, second, weight))(weights)

    swept = line(weights)["w"]
    line(weights + 1)
    assert len(num_traces) == 1
    assert swept.shape == (9, 5, 3)
    for n, weight in enumerate(weights):
        # A compiler may fuse the product and the sum: one rounding less.
        np.testing.assert_allclose(swept[n], interpolate_linear(first, second, float(weight))["w"], atol=3e-7)


def test_walking_from_the_other_end_meets_the_same_models():
    first, second = {"w": draw_leaf(0)}, {"w": draw_leaf(1)}
    for weight in (0.25, 0.5, 0.125):  # both shares are exact
        forth, back = interpolate_linear(first, second, weight), interpolate_linear(second, first, 1 - weight)
        jax.tree.map(assert_same_bits, forth, back)


def test_results_are_new_arrays(ends):
    for weight in (0, 0.5, 1):
        with np.errstate(invalid="ignore"):
            middle = interpolate_linear(*ends, weight)
        for end in ends:
            assert not np.shares_memory(middle["block"]["kernel"], end["block"]["kernel"])


def test_models_that_do_not_fit_are_named():
    first = {"a": draw_leaf(0), "b": draw_leaf(1), "c": draw_leaf(2)}
    second = {"a": draw_leaf(0, shape=(3, 5)), "b": draw_leaf(1), "d": draw_leaf(2)}
    with pytest.raises(TreeMismatchError, match=r"3 leaves.*\n.*a: first .*5, 3.*second .*3, 5.*\n.*c.*\n.*d"):
        interpolate_linear(first, second, 0.5)
    with pytest.raises(TreeMismatchError, match="w: first float32"):
        interpolate_linear({"w": draw_leaf(0)}, {"w": np.zeros((5, 3), np.int32)}, 0)


def slow_barrier(weights, losses):
    height, where = 0.0, 0.0
    for weight, loss in zip(weights, losses, strict=True):
        excess = loss - ((1 - weight) * losses[0] + weight * losses[-1])
        if excess > height:
            height, where = excess, weight
    return height, where


@pytest.mark.parametrize("seed", range(5))
def test_the_barrier_equals_a_loop(seed):
    draw = np.random.default_rng(seed)
    weights = np.concatenate([[0.0], np.sort(draw.uniform(size=8)), [1.0]])
    losses = draw.normal(size=10)
    barrier = measure_barrier(weights, losses)
    height, where = slow_barrier(weights.tolist(), losses.tolist())
    assert height > 0
    assert barrier.height == pytest.approx(height, rel=1e-12)
    assert barrier.weight == where
    assert barrier.weights == tuple(weights)
    assert barrier.losses == tuple(losses)


def test_the_worst_point_counts_and_not_the_middle():
    # Between losses 1 and 3; the highest loss is at 0.75, the highest above the ends' own line at 0.25.
    barrier = measure_barrier([0, 0.25, 0.5, 0.75, 1], [1, 3, 2, 3.25, 3])
    assert (barrier.height, barrier.weight) == (1.5, 0.25)


def test_a_valley_is_no_barrier():
    weights = np.linspace(0, 1, 7)
    assert measure_barrier(weights, (weights - 0.4) ** 2).height == 0
    assert measure_barrier(weights, np.full(7, 2.0)).height == 0


def test_a_double_well_has_the_barrier_that_it_must():
    first, second = {"x": np.full(1, -1.0)}, {"x": np.full(1, 1.0)}
    weights = np.linspace(0, 1, 25)
    losses = [float((interpolate_linear(first, second, w)["x"][0] ** 2 - 1) ** 2) for w in weights]
    barrier = measure_barrier(weights, losses)
    assert barrier.height == pytest.approx(1.0)
    assert barrier.weight == 0.5


def test_a_diverged_model_on_the_line_is_not_hidden():
    assert np.isnan(measure_barrier([0, 0.5, 1], [1, np.nan, 1]).height)
    assert measure_barrier([0, 0.5, 1], [1, np.inf, 1]).height == np.inf


@pytest.mark.parametrize(
    ("weights", "losses", "words"),
    [
        ([0, 1], [1, 1], "three or more"),
        ([0, 0.5, 1], [1, 1], "one loss per weight"),
        ([[0, 0.5, 1]], [[1, 1, 1]], "three or more"),
        ([0, 0.5, 0.9], [1, 1, 1], "from 0 to 1"),
        ([0.1, 0.5, 1], [1, 1, 1], "from 0 to 1"),
        ([0, 0.5, 0.5, 1], [1, 1, 1, 1], "increase"),
        ([0, 0.6, 0.5, 1], [1, 1, 1, 1], "increase"),
        ([0, np.nan, 1], [1, 1, 1], "increase"),
    ],
)
def test_a_line_that_is_none_is_refused(weights, losses, words):
    with pytest.raises(ValueError, match=words):
        measure_barrier(weights, losses)


def test_a_weight_of_any_kind_gives_the_same_model():
    first, second = {"w": draw_leaf(0)}, {"w": draw_leaf(1)}
    wanted = tree.flatten(interpolate_linear(first, second, 0.25))["w"]
    for weight in (np.float32(0.25), np.float64(0.25), np.asarray(0.25), jnp.float32(0.25)):
        assert_same_bits(interpolate_linear(first, second, weight)["w"], wanted)
