"""Units joined within and across models: exact where units repeat, pairs against a plain loop, depth."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_models import random_batch, random_params, run

from jaxtune import symmetry, tree
from jaxtune.align.zip import join_units, zip_models
from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.models import mlp, registry, vit
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Record

MLP = mlp.Config(image_shape=(4, 4, 1), widths=(8, 6), num_outputs=5, activation="gelu")  # ReLU leaves units dead
VIT = vit.Config(image_size=8, patch_size=4, width=16, depth=2, num_heads=2, mlp_width=20, num_outputs=5)


def sample_of(config, num):
    return Sample("images", random_batch(config, seed=5, size=num), Forward(config), Record(config))


def repeat_units(params, seed):
    """The same function with half of each layer's units, every one there twice, in an order drawn by chance."""
    draw = np.random.default_rng(seed)
    leaves = dict(tree.flatten(params))
    for index, width in enumerate(MLP.widths):
        kept = draw.permutation(np.repeat(np.arange(width // 2), 2))
        after = "head" if index == len(MLP.widths) - 1 else f"layer_{index + 1}"
        for name in ("kernel", "bias"):
            leaves[f"layer_{index}/{name}"] = leaves[f"layer_{index}/{name}"][..., kept]
        leaves[f"{after}/kernel"] = leaves[f"{after}/kernel"][kept] / 2
    return tree.unflatten(leaves)


def logits(config, params, batch):
    return np.asarray(run(config, params, batch))


def test_joined_within_where_units_repeat_both_functions_are_kept():
    """Two models whose units are all there twice: joined inside, each layer holds the units of both."""
    models = [repeat_units(random_params(MLP, seed=seed, dtype=np.float32), seed) for seed in (0, 1)]
    sample = sample_of(MLP, 200)
    zipped = zip_models(registry.symmetry_of(MLP), models, sample=sample)
    assert zipped.num_within == {"layer_0/hidden": 8, "layer_1/hidden": 6}
    assert all(value > 0.999 for value in zipped.correlation.values())
    # Behind the first layer the second model's units read the first one's as well, as ½ each reads both.
    first = zip_models(registry.symmetry_of(MLP), models, sample=sample, groups=["layer_0/hidden"], shared="layer_0/.*")
    batch = random_batch(MLP, seed=9, size=16)
    for own, model in zip(first.params, models, strict=True):
        np.testing.assert_allclose(logits(MLP, own, batch), logits(MLP, model, batch), atol=1e-5)


@pytest.mark.parametrize("config", [MLP, VIT], ids=["mlp", "vit"])
def test_a_copy_in_another_order_is_the_same_function(config):
    """All pairs lie across, and the joined network is either of the two."""
    spec, model = registry.symmetry_of(config), random_params(config, dtype=np.float32)
    planted = symmetry.random(jax.random.key(1), spec)
    element = symmetry.identity(spec) | {name: g for name, g in planted.items() if name.endswith("hidden")}
    models = [model, symmetry.apply(spec, element, model)]
    zipped = zip_models(spec, models, sample=sample_of(config, 100))
    assert set(zipped.num_within.values()) == {0}
    batch = random_batch(config, seed=9, size=8)
    for params in zipped.params:
        np.testing.assert_allclose(logits(config, params, batch), logits(config, model, batch), atol=1e-4)
    for path, leaf in tree.flatten(zipped.params[0]).items():
        np.testing.assert_array_equal(leaf, tree.flatten(zipped.params[1])[path])


def test_pairs_are_those_of_a_loop():
    draw = np.random.default_rng(0)
    features = [draw.normal(size=(50, 5)) for _ in range(2)]
    table = np.concatenate(features, axis=1)
    correlation = np.corrcoef(table.T)
    left, pairs = set(range(10)), []
    while left:
        best = max(((i, j) for i in left for j in left if i < j), key=lambda pair: correlation[pair])
        pairs.append(best)
        left -= set(best)
    labels, mean = join_units(features)
    flat = labels.ravel()
    assert {frozenset(np.flatnonzero(flat == unit)) for unit in range(5)} == {frozenset(pair) for pair in pairs}
    assert mean == pytest.approx(np.mean([correlation[pair] for pair in pairs]))
    across = join_units([features[0], features[0][:, ::-1]], within=0.0)[0]
    np.testing.assert_array_equal(np.sort(across[0]), np.arange(5))
    np.testing.assert_array_equal(across[0], across[1][::-1])


@pytest.mark.parametrize("num_models", [2, 3])
def test_within_none_no_two_units_of_one_model_alone_are_joined(num_models):
    """Units of two models that go against each other: 0 times any correlation would beat all of those across."""
    draw = np.random.default_rng(1)
    common = draw.normal(size=(200, 1))
    features = [common * sign + 0.3 * draw.normal(size=(200, 4)) for sign in (1, -1, 1)[:num_models]]
    labels, mean = join_units(features, within=0.0)
    for unit in range(4):
        rows = [int(np.sum(row == unit)) for row in labels]
        assert sum(rows) == max(rows) == 1 or np.count_nonzero(rows) > 1
    if num_models == 2:
        assert mean < -0.5
        assert all(sorted(row) == list(range(4)) for row in labels)


def test_a_factor_makes_no_pair_inside_a_model_better():
    """Across all are at -0.1, inside at -0.6: a tenth of that would pass for better."""
    correlation = np.full((4, 4), -0.1) + np.kron(np.eye(2), [[1.1, -0.5], [-0.5, 1.1]])
    drawn = np.random.default_rng(0).normal(size=(50, 4))
    features = np.linalg.qr(drawn - drawn.mean(0))[0] @ np.linalg.cholesky(correlation).T
    labels, mean = join_units([features[:, :2], features[:, 2:]], within=0.1)
    assert [sorted(row) for row in labels.tolist()] == [[0, 1], [0, 1]]
    assert mean == pytest.approx(-0.1)


def test_three_models_leave_as_many_units_as_one_has():
    spec = registry.symmetry_of(MLP)
    models = [random_params(MLP, seed=seed, dtype=np.float32) for seed in range(3)]
    zipped = zip_models(spec, models, sample=sample_of(MLP, 60))
    for name, labels in zipped.groups.items():
        assert set(labels.ravel()) == set(range(spec.groups[name].size))
    same = zip_models(spec, [models[0]] * 3, sample=sample_of(MLP, 60))
    batch = random_batch(MLP, seed=9, size=8)
    np.testing.assert_allclose(logits(MLP, same.params[0], batch), logits(MLP, models[0], batch), atol=1e-5)


def test_bad_input_is_refused():
    spec, params, sample = registry.symmetry_of(MLP), random_params(MLP, dtype=np.float32), sample_of(MLP, 20)
    with pytest.raises(ConfigError, match="1 models: there is nothing to join"):
        zip_models(spec, [params], sample=sample)
    with pytest.raises(UnknownNameError, match="Did you mean 'layer_0/hidden'"):
        zip_models(spec, [params, params], sample=sample, groups=["layer_0/hiden"])
    with pytest.raises(ConfigError, match="shares some of the leaves that write layer_0/hidden"):
        zip_models(spec, [params, params], sample=sample, shared="layer_0/kernel")
    with pytest.raises(ConfigError, match="cannot be recorded"):
        zip_models(spec, [params, params], sample=replace(sample, record=None))
    with pytest.raises(ConfigError, match="within is 2"):
        zip_models(spec, [params, params], sample=sample, within=2)
