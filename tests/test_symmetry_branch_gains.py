"""Folding where branches have gains of their own (layer scale), gates, registers, two heads, or no query biases."""

import jax
import numpy as np
import pytest
from hub_vision import EXACT64, change, images
from small_models import random_params

from jaxtune import symmetry, tree
from jaxtune.models import registry, vit
from jaxtune.symmetry import canonical

SMALL = {
    "image_size": 8, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 4, "mlp_width": 40, "num_outputs": 5,
    "channels": 2,
}  # fmt: skip
CONFIGS = {
    "layer_scale": vit.Config(**SMALL, layer_scale=True),
    "dinov2": vit.Config(
        **SMALL, layer_scale=True, is_gated=True, activation="silu", pooling="class_and_patches", mask_token=True,
        num_registers=2, positions="class_and_patches",
    ),
    "no_qkv_bias": vit.Config(**SMALL, layer_scale=True, qkv_bias=False, pooling="mean"),
    "norm_behind_the_mean": vit.Config(**SMALL, pooling="patches", norm_after_pooling=True, positions="patches"),
    "two_heads": vit.Config(**SMALL, pooling="class_and_distillation", distillation_token=True, head="tanh"),
    "attention": vit.Config(**SMALL, layer_scale=True, pooling="attention"),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CONFIGS)


def params_of(config, seed):
    """Random weights whose gains stay away from zero."""
    params = random_params(config, seed=seed)
    return tree.map_leaves(lambda path, leaf: np.abs(leaf) + 0.3 if path.endswith("scale") else leaf, params)


@EVERY
def test_folding_and_every_element_of_the_whole_group_keep_the_function(name):
    config = CONFIGS[name]
    spec, params, batch = registry.symmetry_of(config), params_of(config, 0), {"image": images(config)}
    whole, folded = canonical.canonical_spec(spec), canonical.fold(spec, params)
    whole.check(folded)
    with jax.enable_x64(True):
        assert change(config, params, canonical.realise(spec, folded, params), batch) < EXACT64
        moved = symmetry.apply(whole, symmetry.random(jax.random.key(1), whole), folded)
        assert change(config, params, canonical.realise(spec, moved, params), batch) < EXACT64
        # The same rotation on weights whose gains stayed where they were is none.
        element = dict(symmetry.random(jax.random.key(1), whole))
        turned = tree.map_leaves(
            lambda path, leaf: (
                symmetry.element.apply_to_leaf(whole, element, path, leaf) if path in whole.axes else leaf
            ),
            params,
        )
        assert change(config, params, turned, batch) > 1e-3


@EVERY
def test_unfolding_undoes_folding_for_any_base(name):
    config = CONFIGS[name]
    spec = registry.symmetry_of(config)
    source, tuned, base = (params_of(config, seed) for seed in range(3))
    vector = tree.task_vector(canonical.fold(spec, source), canonical.fold(spec, tuned))
    unfolded = canonical.unfold(spec, vector, base)
    assert unfolded.lost == {}
    result = canonical.fold(spec, tree.apply_task_vector(base, unfolded.task_vector))
    wanted = tree.apply_task_vector(canonical.fold(spec, base), vector)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), result, wanted)


def test_a_gain_near_zero_loses_what_lies_behind_it_and_says_so():
    config = CONFIGS["layer_scale"]
    spec = registry.symmetry_of(config)
    source, tuned, base = (params_of(config, seed) for seed in range(3))
    base["block_1"]["layer_scale2"]["scale"][5] = 0.0
    vector = tree.task_vector(canonical.fold(spec, source), canonical.fold(spec, tuned))
    unfolded = canonical.unfold(spec, vector, base)
    kernel, bias = (f"block_1/mlp/down/{name}" for name in ("kernel", "bias"))
    assert set(unfolded.lost) == {kernel, bias}
    wanted = tree.flatten(vector)[kernel]
    assert unfolded.lost[kernel] == pytest.approx(np.linalg.norm(wanted[:, 5]) / np.linalg.norm(wanted))
    assert not unfolded.task_vector["block_1"]["mlp"]["down"]["kernel"][:, 5].any()
