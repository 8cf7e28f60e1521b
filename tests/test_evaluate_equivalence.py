"""Whether two sets of weights compute the same function: the numbers against NumPy and SciPy, and the inputs."""

import dataclasses
import functools
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.special
import scipy.stats
from small_models import CONFIGS, random_params, run

from jaxtune import symmetry, tree
from jaxtune.errors import ConfigError
from jaxtune.evaluate.equivalence import check_equivalence, compare_outputs
from jaxtune.evaluate.example import _apply_jitted, apply_to_matrix, example_batch
from jaxtune.models import registry


def draw_outputs(seed, dtype=np.float64, shape=(7, 5)):
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (1, 3), (4, 1)])
def test_the_numbers_equal_a_loop(shape, dtype):
    first, second = draw_outputs(0, dtype, shape), draw_outputs(1, dtype, shape)
    got = compare_outputs(first, second)
    pairs = list(zip(first.astype(np.float64).tolist(), second.astype(np.float64).tolist(), strict=True))
    rms = math.sqrt(sum(x * x for ours, _ in pairs for x in ours) / first.size)
    gaps = [abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
    kl = [scipy.stats.entropy(scipy.special.softmax(ours), scipy.special.softmax(theirs)) for ours, theirs in pairs]
    agreement = [ours.index(max(ours)) == theirs.index(max(theirs)) for ours, theirs in pairs]
    assert got.max_relative == pytest.approx(max(gaps) / rms, rel=1e-12)
    assert got.mean_relative == pytest.approx(sum(gaps) / len(gaps) / rms, rel=1e-12)
    assert got.kl == pytest.approx(np.mean(kl), rel=1e-9, abs=1e-15)
    assert got.argmax_agreement == np.mean(agreement)
    assert got.num_examples == shape[0]
    assert not got.is_exact


def test_the_divergence_goes_from_the_first_to_the_second():
    first, second = np.array([[4.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 0.0]])
    p = scipy.special.softmax(first[0])
    assert compare_outputs(first, second).kl == pytest.approx(math.log(3) - scipy.stats.entropy(p))
    assert compare_outputs(second, first).kl != pytest.approx(compare_outputs(first, second).kl, rel=0.1)


def test_a_constant_on_all_logits_is_no_divergence_but_a_difference():
    first = draw_outputs(0)
    got = compare_outputs(first, first + 5)
    assert got.kl == pytest.approx(0, abs=1e-15)
    assert got.argmax_agreement == 1
    assert not got.is_exact


def test_the_numbers_have_no_unit():
    first, second = draw_outputs(0), draw_outputs(1)
    small, large = compare_outputs(first, second), compare_outputs(1e6 * first, 1e6 * second)
    assert small.max_relative == pytest.approx(large.max_relative)
    assert small.mean_relative == pytest.approx(large.mean_relative)


def test_huge_logits_stay_finite():
    got = compare_outputs(np.array([[1e4, -1e4]]), np.array([[-1e4, 1e4]]))
    assert got.kl == pytest.approx(2e4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-10)])
def test_rounding_is_exact_and_more_is_not(dtype, tolerance):
    first = np.ones((4, 4), dtype)  # root mean square 1
    for factor, is_exact in ((0.5, True), (2.0, False)):
        second = first.copy()
        second[2, 1] += dtype(factor * tolerance)
        assert compare_outputs(first, second).is_exact == is_exact


def test_outputs_of_zeros():
    zeros = np.zeros((2, 3), np.float32)
    assert compare_outputs(zeros, zeros).is_exact
    assert not compare_outputs(zeros, zeros + 1e-6).is_exact
    assert not compare_outputs(zeros, zeros + 1e6).is_exact


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_nan_and_inf_are_never_exact(value, where):
    first = draw_outputs(0, np.float32)
    broken = first.copy()
    broken[1, 2] = value
    got = compare_outputs(broken if where != "second" else first, broken if where != "first" else first)
    assert got.is_exact is False
    assert not got.max_relative <= 1
    if np.isnan(value):
        assert got.argmax_agreement == 6 / 7, "an input whose outputs are NaN has no largest output"


@pytest.mark.parametrize(
    ("first", "second"),
    [(np.ones((2, 3)), np.ones((3, 2))), (np.ones(3), np.ones(3)), (np.ones((0, 3)), np.ones((0, 3)))],
)
def test_what_is_no_batch_is_refused(first, second):
    with pytest.raises(ValueError, match="two batches of one shape"):
        compare_outputs(first, second)


def test_plain_values_for_the_report():
    got = compare_outputs(draw_outputs(0), draw_outputs(1))
    assert got.as_dict() == {field.name: getattr(got, field.name) for field in dataclasses.fields(got)}
    assert {type(value) for value in got.as_dict().values()} == {float, bool, int}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_a_reordered_network_is_the_same_and_a_tuned_one_is_not(name, dtype):
    config = CONFIGS[name]
    params, spec = random_params(config, dtype=dtype), registry.symmetry_of(config)
    moved = symmetry.apply(spec, symmetry.random(jax.random.key(1), spec), params)
    apply, batch = functools.partial(apply_to_matrix, config), example_batch(jax.random.key(0), config, 32)
    same = check_equivalence(apply, params, moved, batch)
    assert same.is_exact
    assert same.num_examples == 32
    tuned = tree.map_leaves(lambda _, leaf: (leaf.astype(np.float32) * np.float32(1.01)).astype(dtype), params)
    other = check_equivalence(apply, params, tuned, batch)
    assert not other.is_exact
    assert other.max_relative > 1e-3


def test_broken_weights_are_never_the_same():
    config = CONFIGS["mlp"]
    params = random_params(config, dtype=np.float32)
    broken = tree.map_leaves(lambda _, leaf: leaf * np.float32(np.nan), params)
    apply, batch = functools.partial(apply_to_matrix, config), example_batch(jax.random.key(0), config, 4)
    for pair in ((params, broken), (broken, params), (broken, broken)):
        assert not check_equivalence(apply, *pair, batch).is_exact


def test_weights_are_compared_again_and_again_with_one_compilation():
    config = dataclasses.replace(CONFIGS["mlp"], widths=(6, 5))  # of no other test
    batch, before = example_batch(jax.random.key(0), config, 4), _apply_jitted._cache_size()
    for seed in range(3):
        first, second = (random_params(config, seed=seed + n, dtype=np.float32) for n in (0, 10))
        check_equivalence(functools.partial(apply_to_matrix, config), first, second, batch)
    assert _apply_jitted._cache_size() == before + 1


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_family_gets_inputs_that_fit(name):
    config = CONFIGS[name]
    batch = example_batch(jax.random.key(0), config, 6)
    assert batch["image"].dtype == np.float32
    assert 0 <= batch["image"].min() < 0.3
    assert 0.7 < batch["image"].max() <= 1
    if name == "clip":
        assert batch["text"].dtype == np.int32
        assert batch["text"].shape == (6, config.text.context_length)
        assert batch["text"].min() >= 0
        assert batch["text"].max() < config.text.vocab_size
    outputs = np.asarray(apply_to_matrix(config, random_params(config, dtype=np.float32), batch))
    assert outputs.shape == ((6, 6) if name == "clip" else (6, 5))
    assert np.isfinite(outputs).all()
    # Inputs that a network can tell apart: no column of outputs is the same for all.
    assert outputs.std(axis=0).min() > 1e-4 * np.abs(outputs).max()


def test_inputs_depend_on_the_key_alone():
    config = CONFIGS["clip"]
    first, again, other = (example_batch(jax.random.key(seed), config, 3) for seed in (0, 0, 1))
    for name in ("image", "text"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (np.asarray(first[name]) != np.asarray(other[name])).mean() > 0.5


def test_neighbouring_pixels_agree_as_in_pictures():
    config = dataclasses.replace(CONFIGS["vit"], image_size=32)
    image = np.asarray(example_batch(jax.random.key(0), config, 16)["image"])
    near = np.abs(np.diff(image, axis=2)).mean()
    far = np.abs(image[:, :, 16:] - image[:, :, :16]).mean()
    assert near < 0.5 * far


def test_what_is_no_config_is_named():
    with pytest.raises(ConfigError, match="is no model config"):
        example_batch(jax.random.key(0), {"model_type": "jaxtune_vit"}, 2)


def test_clip_gives_the_logits_of_images_against_texts():
    config = CONFIGS["clip"]
    params, batch = random_params(config, dtype=np.float32), example_batch(jax.random.key(0), config, 4)
    outputs = jax.tree.map(np.asarray, run(config, params, batch))
    factor = math.exp(params["logit_scale"])
    wanted = np.array(
        [[factor * sum(a * b for a, b in zip(image, text, strict=True)) for text in outputs["text_features"].tolist()]
         for image in outputs["image_features"].tolist()]
    )  # fmt: skip
    got = np.asarray(apply_to_matrix(config, params, batch))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * factor)  # float32 features of length 1
    assert np.abs(got).max() <= factor * (1 + 1e-5)
