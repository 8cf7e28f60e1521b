"""Activation matching: tables of what units do, against loops; planted elements come back from a handful of inputs."""

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from small_models import FAST, random_params

from jaxtune import symmetry, tree
from jaxtune.align.activations import match_activations, record_tables
from jaxtune.align.registry import find_element
from jaxtune.errors import ConfigError, DataError
from jaxtune.models import mlp, registry, vit
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Record
from jaxtune.symmetry import canonical

KEY = jax.random.key(0)
MLP = mlp.Config(image_shape=(4, 4, 1), widths=(10, 12), num_outputs=5)
VIT = vit.Config(image_size=8, patch_size=4, width=16, depth=1, num_heads=2, mlp_width=20, num_outputs=5, channels=1)


def sample_of(config, num, seed=0):
    size = config.image_shape[:2] if isinstance(config, mlp.Config) else (config.image_size,) * 2
    images = np.random.default_rng(seed).uniform(size=(num, *size, 1)).astype(np.float32)
    return Sample("images", {"image": images}, Forward(config), Record(config))


def test_orders_of_a_perceptron_are_those_of_a_loop_over_correlations():
    target, source = (random_params(MLP, seed=seed, dtype=np.float32) for seed in (0, 1))
    sample = sample_of(MLP, 40)
    found = match_activations(KEY, registry.symmetry_of(MLP), target, source, sample=sample)
    x = sample.batch["image"].reshape(40, -1)
    layers = []
    for params in (target, source):
        hidden, tables = x, []
        for layer in ("layer_0", "layer_1"):
            made = hidden @ params[layer]["kernel"]
            hidden = np.maximum(made + params[layer]["bias"], 0)
            tables.append((made, hidden))
        layers.append(tables)
    for index in range(2):
        score = np.zeros((MLP.widths[index],) * 2)
        for ours, theirs in zip(layers[0][index], layers[1][index], strict=True):
            table = np.zeros_like(score)
            for i, j in np.ndindex(*score.shape):
                a, b = ours[:, i] - ours[:, i].mean(), theirs[:, j] - theirs[:, j].mean()
                if a.std() > 0 and b.std() > 0:
                    table[i, j] = np.mean(a * b) / a.std() / b.std()
            # Each table counts by its cosine, so by the units that are not dead.
            alive = [np.sum(t.std(axis=0) > 0) for t in (ours, theirs)]
            score += table / np.sqrt(np.prod(alive))
        expected = linear_sum_assignment(score, maximize=True)[1]
        np.testing.assert_array_equal(found.element[f"layer_{index}/hidden"], expected)


@pytest.mark.parametrize("is_folded", [False, True])
def test_a_planted_element_comes_back_from_eight_images(is_folded):
    source, spec = random_params(VIT, dtype=np.float32), registry.symmetry_of(VIT)
    if is_folded:
        source, spec = canonical.fold(spec, source), canonical.canonical_spec(spec)
    planted = symmetry.random(jax.random.key(3), spec)
    target = symmetry.apply(spec, planted, source)
    method = "activations_full" if is_folded else "activations"
    found = find_element(KEY, spec, target, source, method=method, sample=sample_of(VIT, 8))
    moved = symmetry.apply(spec, found.element, source)
    for path, leaf in tree.flatten(moved).items():
        if not path.endswith("k/bias"):
            np.testing.assert_allclose(leaf, tree.flatten(target)[path], atol=2e-3, err_msg=path)


def test_what_is_recorded_is_what_the_network_computes():
    params, spec = random_params(VIT, dtype=np.float32), registry.symmetry_of(VIT)
    sample = sample_of(VIT, 6)
    tables = record_tables(spec, params, sample, num_rows=10**6)
    logits = jax.jit(registry.apply, static_argnums=0, compiler_options=FAST)(VIT, params, sample.batch)
    inputs, outputs, in_axes = tables["head/kernel"]
    assert in_axes == (0,)
    assert len(inputs) == 6
    np.testing.assert_allclose(outputs + params["head"]["bias"], logits, atol=1e-5)
    hidden = tables["block_0/mlp/up/kernel"][1]
    assert hidden.shape == (6 * 5, 20)
    few = record_tables(spec, params, sample, num_rows=7)["block_0/mlp/up/kernel"][1]
    assert few.shape == (7, 20)
    assert all((hidden == row).all(axis=1).any() for row in few)


def test_a_method_that_looks_at_data_asks_for_it():
    params, spec = random_params(MLP, dtype=np.float32), registry.symmetry_of(MLP)
    with pytest.raises(ConfigError, match=r"'activations' needs unlabelled inputs: pass sample=.*--data"):
        find_element(KEY, spec, params, params, method="activations")
    blind = Sample("words", sample_of(MLP, 4).batch, Forward(MLP))
    with pytest.raises(ConfigError, match="words: what this family computes inside cannot be recorded"):
        find_element(KEY, spec, params, params, method="activations", sample=blind)
    with pytest.raises(ConfigError, match="num_rows is 1"):
        match_activations(KEY, spec, params, params, sample=sample_of(MLP, 4), num_rows=1)
    with pytest.raises(DataError, match="there are no examples"):
        match_activations(KEY, spec, params, params, sample=sample_of(MLP, 4).take([]))
