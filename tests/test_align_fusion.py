"""Fusion by optimal transport: exact plans against linear programs, other widths, functions that must not change."""

import jax
import numpy as np
import pytest
from scipy.optimize import linprog
from small_models import random_batch, random_params, run

from jaxtune import symmetry, tree
from jaxtune.align.fusion import fuse_models, transport_plan
from jaxtune.errors import ConfigError, SpecError, UnknownNameError
from jaxtune.models import mlp, registry
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Record


def config_of(*widths):
    return mlp.Config(image_shape=(4, 4, 1), widths=widths, num_outputs=5)


def sample_of(config, num=120):
    return Sample("images", random_batch(config, seed=5, size=num), Forward(config), Record(config))


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (6, 3)])
def test_an_exact_plan_is_the_linear_programs(shape):
    cost = np.random.default_rng(0).uniform(size=shape)
    m, n = shape
    plan = transport_plan(cost)
    sums = [np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))]
    program = linprog(cost.ravel(), A_eq=np.concatenate(sums), b_eq=[1 / m] * m + [1 / n] * n, bounds=(0, None))
    assert np.sum(plan * cost) == pytest.approx(program.fun, abs=1e-9)
    np.testing.assert_allclose(plan.sum(1), 1 / m, atol=1e-12)
    np.testing.assert_allclose(plan.sum(0), 1 / n, atol=1e-12)
    soft = transport_plan(cost, regularisation=0.02)
    np.testing.assert_allclose(soft.sum(0), 1 / n, atol=1e-6)
    assert program.fun < np.sum(soft * cost) < program.fun + 0.05
    even = transport_plan(cost, regularisation=1e4)
    np.testing.assert_allclose(even, 1 / (m * n), rtol=1e-3)


@pytest.mark.parametrize("ground", ["activations", "weights"])
def test_a_copy_in_another_order_is_fused_to_itself(ground):
    config = config_of(7, 6)
    spec, target = registry.symmetry_of(config), random_params(config, dtype=np.float32)
    source = symmetry.apply(spec, symmetry.random(jax.random.key(1), spec), target)
    fused = fuse_models(spec, target, source, sample=sample_of(config), ground=ground)
    for path, leaf in tree.flatten(fused.params).items():
        np.testing.assert_allclose(leaf, tree.flatten(target)[path], atol=1e-6, err_msg=path)
    assert max(fused.costs.values()) < 1e-6


@pytest.mark.parametrize("ground", ["activations", "weights"])
@pytest.mark.parametrize("is_narrower", [True, False])
def test_units_that_are_there_twice_may_be_halved_and_doubled(ground, is_narrower):
    """A wide network that repeats a narrow one's units, carried onto the narrow one's widths, and the other way."""
    narrow, wide = config_of(5, 4), config_of(10, 8)
    small = random_params(narrow, dtype=np.float32)
    leaves, draw = dict(tree.flatten(small)), np.random.default_rng(0)
    for index, width in enumerate(narrow.widths):
        kept = draw.permutation(np.repeat(np.arange(width), 2))
        share = np.full(2 * width, 0.5, np.float32)
        if ground == "activations":  # readers need not be halves; weights that come in are compared elsewhere
            share[np.unique(kept, return_index=True)[1]] = 0.25
            share[share == 0.5] = 0.75
        after = "head" if index else "layer_1"
        for name in ("kernel", "bias"):
            leaves[f"layer_{index}/{name}"] = leaves[f"layer_{index}/{name}"][..., kept]
        leaves[f"{after}/kernel"] = leaves[f"{after}/kernel"][kept] * share[:, None]
    big = tree.unflatten(leaves)
    models = [(narrow, small), (wide, big)]
    (ours, target), (theirs, source) = models if is_narrower else models[::-1]
    fused = fuse_models(
        registry.symmetry_of(ours),
        target,
        source,
        source_spec=registry.symmetry_of(theirs),
        sample=sample_of(ours),
        source_sample=sample_of(theirs),
        ground=ground,
    )
    batch = random_batch(ours, seed=9, size=8)
    expected = np.asarray(run(ours, target, batch))
    np.testing.assert_allclose(run(ours, fused.moved, batch), expected, atol=1e-5)
    np.testing.assert_allclose(run(ours, fused.params, batch), expected, atol=1e-5)


def test_the_weight_goes_from_target_to_source():
    config = config_of(6)
    spec = registry.symmetry_of(config)
    target, source = (random_params(config, seed=seed, dtype=np.float32) for seed in (0, 1))
    ends = [fuse_models(spec, target, source, ground="weights", weight=weight) for weight in (0.0, 1.0)]
    for path, leaf in tree.flatten(target).items():
        np.testing.assert_array_equal(tree.flatten(ends[0].params)[path], leaf)
        np.testing.assert_allclose(tree.flatten(ends[1].params)[path], tree.flatten(ends[1].moved)[path], atol=1e-7)
    batch = random_batch(config, seed=9, size=8)
    np.testing.assert_allclose(run(config, ends[1].moved, batch), run(config, source, batch), atol=1e-5)


def test_bad_input_is_refused():
    config = config_of(6)
    spec, params = registry.symmetry_of(config), random_params(config, dtype=np.float32)
    with pytest.raises(UnknownNameError, match="Did you mean 'weights'"):
        fuse_models(spec, params, params, ground="weight")
    with pytest.raises(ConfigError, match="needs unlabelled inputs"):
        fuse_models(spec, params, params)
    with pytest.raises(ConfigError, match="weight is nan"):
        fuse_models(spec, params, params, ground="weights", weight=float("nan"))
    with pytest.raises(ConfigError, match="regularisation is -1"):
        fuse_models(spec, params, params, ground="weights", regularisation=-1)
    with pytest.raises(ConfigError, match=r"assignment of 10100; pass regularisation=0\.05"):
        transport_plan(np.ones((100, 101)))
    deep = config_of(6, 6)
    with pytest.raises(SpecError, match="other owners"):
        fuse_models(
            spec,
            params,
            random_params(deep, dtype=np.float32),
            source_spec=registry.symmetry_of(deep),
            ground="weights",
        )
