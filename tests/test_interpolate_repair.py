"""The statistics of averaged networks: they collapse, and are mended, on ends with a planted order between them."""

from functools import partial

import jax
import numpy as np
import pytest
from small_models import FAST, difference, random_batch, random_params, run

from jaxtune import symmetry
from jaxtune.align.registry import find_element
from jaxtune.align.universe import average_in_universe, match_universe, move_together
from jaxtune.errors import ConfigError, DataError, TreeMismatchError
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.interpolate.repair import find_norms, repair, repair_average, reset_statistics
from jaxtune.models import mlp, registry, resnet, resnet_imagenet
from jaxtune.tree import flatten, map_leaves, unflatten

CONFIGS = {
    "resnet": resnet.Config(num_outputs=5, depth=8),
    "resnet_imagenet": resnet_imagenet.Config(
        num_outputs=5, depths=(1, 1), widths=(24, 32), inner_widths=(12, 16), stem_width=16
    ),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


@partial(jax.jit, static_argnums=(0, 3), compiler_options=FAST)
def _observe(config, params, batch, is_training):
    return registry.observe_norms(config, params, batch, is_training=is_training)


train = jax.jit(registry.apply_train, static_argnums=0, compiler_options=FAST)


def observer(config):
    return lambda params, batch, *, is_training: _observe(config, params, batch, is_training)


def batch_of(config, seed, size=16):
    """Images large enough for statistics in the last stage."""
    image = random_batch(config, seed=seed, size=size)["image"]
    times = 3 if isinstance(config, resnet_imagenet.Config) else 1
    return {"image": np.repeat(np.repeat(image, times, axis=1), times, axis=2)}


def make_ends(config, batches):
    """Two networks that share a third of their variance, their statistics those of the data."""
    shared, own, other = (random_params(config, seed=seed, dtype=np.float32) for seed in (0, 1, 2))

    def mix(path, common, apart):
        mixed = (common + np.sqrt(2) * apart) / np.sqrt(3) if path.endswith("kernel") else common
        return mixed.astype(np.float32)

    ends = [map_leaves(mix, shared, apart) for apart in (own, other)]
    return [reset_statistics(observer(config), end, batches) for end in ends]


def outputs_of_norms(config, params, batches, eps=1e-5):
    """Norm -> (mean, deviation) behind it, measured by a loop of its own: moments over all batches."""
    seen = [flatten(_observe(config, params, batch, False)) for batch in batches]
    flat, found = flatten(params), {}
    for path in find_norms(params):
        first = np.mean([one[f"{path}/mean"] for one in seen], axis=0)
        second = np.mean([one[f"{path}/var"] + one[f"{path}/mean"] ** 2 for one in seen], axis=0)
        scale = flat[f"{path}/scale"] / np.sqrt(flat[f"{path}/var"] + eps)
        mean = scale * (first - flat[f"{path}/mean"]) + flat[f"{path}/bias"]
        found[path] = mean, np.abs(scale) * np.sqrt(second - first**2)
    return found


def deviations(config, params, batches):
    return {path: deviation.mean() for path, (_, deviation) in outputs_of_norms(config, params, batches).items()}


@EVERY
def test_the_variance_of_an_average_collapses_and_is_mended(name):
    """The ends have a planted order between them: aligned, averaged, and mended."""
    config = CONFIGS[name]
    batches = [batch_of(config, 0)]
    first, second = make_ends(config, batches)
    spec = registry.symmetry_of(config)
    moved = symmetry.apply(spec, symmetry.random(jax.random.key(1), spec), second)
    found = find_element(jax.random.key(2), spec, first, moved, method="weights").element
    planted, second = second, symmetry.apply(spec, found, moved)
    jax.tree.map(np.testing.assert_array_equal, second, planted)
    ends = [deviations(config, end, batches) for end in (first, second)]
    average = deviations(config, interpolate_linear(first, second, 0.5), batches)
    mended = deviations(config, repair(observer(config), first, second, 0.5, batches), batches)
    between = {path: (ends[0][path] + ends[1][path]) / 2 for path in average}
    assert np.mean([average[path] / between[path] for path in between]) < 0.87
    for path, want in between.items():
        assert mended[path] == pytest.approx(want, rel=1e-3), path


@EVERY
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_every_channel_has_mean_and_deviation_between_the_ends(name, weight):
    config = CONFIGS[name]
    batches = [batch_of(config, 0)]
    first, second = make_ends(config, [batch_of(config, 9)])  # of other data: what counts is how they run on these
    second = map_leaves(lambda path, x: -x if path.endswith("norm1/scale") else x, second)
    mended = repair(observer(config), first, second, weight, batches)
    ends = [outputs_of_norms(config, end, batches) for end in (first, second)]
    for path, (mean, deviation) in outputs_of_norms(config, mended, batches).items():
        wanted = [(1 - weight) * ends[0][path][k] + weight * ends[1][path][k] for k in (0, 1)]
        np.testing.assert_allclose(mean, wanted[0], rtol=1e-3, atol=1e-3, err_msg=path)
        np.testing.assert_allclose(deviation, wanted[1], rtol=1e-3, atol=1e-4, err_msg=path)


def test_an_average_of_three_matched_networks_is_mended():
    """Orders planted between three: matched jointly, averaged, and every channel has the mean of their moments."""
    config = CONFIGS["resnet"]
    batches, spec = [batch_of(config, 0)], registry.symmetry_of(config)
    ends = make_ends(config, batches)
    ends.append(reset_statistics(observer(config), interpolate_linear(*ends, 0.3), batches))
    models = [
        ends[0],
        *(symmetry.apply(spec, symmetry.random(jax.random.key(n), spec), end) for n, end in enumerate(ends[1:])),
    ]
    found = match_universe(jax.random.key(2), spec, models)
    together = move_together(spec, found, models)
    for model, end in zip(together, ends, strict=True):
        jax.tree.map(np.testing.assert_array_equal, model, end)
    average = average_in_universe(spec, found, models)
    mended = repair_average(observer(config), average, together, (1 / 3,) * 3, batches)
    measured = [outputs_of_norms(config, end, batches) for end in ends]
    for path, (mean, deviation) in outputs_of_norms(config, mended, batches).items():
        wanted = [np.mean([one[path][k] for one in measured], axis=0) for k in (0, 1)]
        np.testing.assert_allclose(mean, wanted[0], rtol=1e-3, atol=1e-3, err_msg=path)
        np.testing.assert_allclose(deviation, wanted[1], rtol=1e-3, atol=1e-4, err_msg=path)
    with pytest.raises(ValueError, match="one for each of 3 networks"):
        repair_average(observer(config), average, together, (0.5, 0.5), batches)


@EVERY
def test_an_end_whose_statistics_are_the_data_s_stays_as_it_is(name):
    config = CONFIGS[name]
    batches = [batch_of(config, 0)]
    first, second = make_ends(config, batches)
    for weight, end in ((0.0, first), (1.0, second)):
        mended = repair(observer(config), first, second, weight, batches)
        for path, leaf in flatten(mended).items():
            np.testing.assert_allclose(leaf, flatten(end)[path], rtol=1e-3, atol=1e-3, err_msg=path)
        assert difference(*(np.asarray(run(config, x, batches[0])) for x in (end, mended))) < 1e-2


@EVERY
def test_reset_statistics_are_those_of_all_batches(name):
    config = CONFIGS[name]
    params = random_params(config, dtype=np.float32)
    batches = [batch_of(config, 0, size=12), batch_of(config, 1, size=4)]
    found = flatten(reset_statistics(observer(config), params, batches))
    whole = {"image": np.concatenate([batch["image"] for batch in batches])}
    at_once = flatten(reset_statistics(observer(config), params, [whole]))
    for path in ("stem_norm/mean", "stem_norm/var"):  # nothing before it is normalised
        np.testing.assert_allclose(found[path], at_once[path], rtol=1e-5)
    for path, leaf in flatten(params).items():
        if registry.is_trainable(config, path):
            np.testing.assert_array_equal(found[path], leaf)
    # With one batch, running and batch statistics agree: both modes compute the same.
    settled = unflatten(at_once)
    trained, _ = train(config, settled, whole, jax.random.key(0))
    assert difference(np.asarray(trained), np.asarray(run(config, settled, whole))) < 1e-5


def test_dtypes_stay():
    config = CONFIGS["resnet"]
    first, second = (random_params(config, seed=seed, dtype=np.float16) for seed in (0, 1))
    mended = repair(observer(config), first, second, 0.5, [batch_of(config, 0)])
    assert {leaf.dtype for leaf in flatten(mended).values()} == {np.dtype(np.float16)}


def test_what_cannot_be_mended_says_so():
    config = CONFIGS["resnet"]
    params = random_params(config)
    with pytest.raises(DataError, match="no batches"):
        reset_statistics(observer(config), params, [])
    with pytest.raises(ValueError, match=r"within \[0, 1\], got 1.5"):
        repair(observer(config), params, params, 1.5, [batch_of(config, 0)])
    plain = mlp.Config(image_shape=(4, 4, 3), widths=(7,), num_outputs=5)
    with pytest.raises(TreeMismatchError, match="no batch norm in the tree"):
        repair(observer(plain), random_params(plain), random_params(plain), 0.5, [random_batch(plain)])
    with pytest.raises(ConfigError, match="jaxtune_mlp has no batch norms"):
        registry.observe_norms(plain, random_params(plain), random_batch(plain), is_training=False)
