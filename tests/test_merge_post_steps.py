"""Post-steps: LiNeS by depth, and the spectrum of what was merged."""

import numpy as np
import pytest

from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.post_steps import Place, apply_post_steps, balance_norms, find_places
from jaxtune.merge.registry import METHODS
from jaxtune.tree import flatten, unflatten

PATHS = {"embed": (5, 4), **{f"block_{n}/mlp/kernel": (4, 6) for n in range(12)}, "norm/scale": (4,)}


def draw(seed):
    random = np.random.default_rng(seed)
    return unflatten({path: random.standard_normal(shape) for path, shape in PATHS.items()})


def test_lines_scales_by_depth():
    base, merged = draw(0), draw(1)
    stepped = flatten(apply_post_steps(merged, base, [("lines", {"alpha": 0.25})]))
    base, merged = flatten(base), flatten(merged)
    for path in PATHS:
        scale = 0.25
        if path.startswith("block"):
            scale += 0.75 * int(path.split("/")[0].removeprefix("block_")) / 11
        np.testing.assert_allclose(stepped[path], base[path] + scale * (merged[path] - base[path]), rtol=1e-12)
    np.testing.assert_allclose(stepped["block_11/mlp/kernel"], merged["block_11/mlp/kernel"], rtol=1e-12)


def test_lines_treats_what_is_outside_the_layers_as_told():
    base, merged = draw(0), draw(1)
    stepped = flatten(apply_post_steps(merged, base, [("lines", {"alpha": 0.2, "beta": 0.5, "outside": 1.0})]))
    np.testing.assert_allclose(stepped["embed"], flatten(merged)["embed"], rtol=1e-12)


def test_lines_of_one_layer_scales_by_both():
    base, merged = draw(0), draw(1)
    places = dict.fromkeys(PATHS, Place(0, 1))
    stepped = flatten(apply_post_steps(merged, base, [("lines", {"alpha": 0.2, "beta": 0.5})], places=places))
    expected = flatten(base)["embed"] + 0.7 * (flatten(merged)["embed"] - flatten(base)["embed"])
    np.testing.assert_allclose(stepped["embed"], expected, rtol=1e-12)


def test_places_are_numbers_and_not_substrings():
    places = find_places(PATHS)
    assert places["block_1/mlp/kernel"] == Place(1, 12)
    assert places["block_11/mlp/kernel"] == Place(11, 12)
    assert places["embed"].layer is places["norm/scale"].layer is None


def test_two_towers_are_two_stacks_and_a_gap_is_none():
    names = [f"text.layers.{n}.fc.weight" for n in range(4)] + [f"vision.layers.{n}.fc.weight" for n in range(6)]
    places = find_places([*names, "heads.0.weight", "heads.2.weight", "proj.0.weight"])
    assert places["text.layers.3.fc.weight"] == Place(3, 4)
    assert places["vision.layers.3.fc.weight"] == Place(3, 6)
    assert places["heads.2.weight"].layer is None  # an activation stands between
    assert places["proj.0.weight"].layer is None  # one is no stack


def test_experts_within_layers_count_by_layer():
    names = [f"model.layers.{n}.experts.{k}.w1.weight" for n in range(3) for k in range(4)]
    assert find_places(names)["model.layers.2.experts.3.w1.weight"] == Place(2, 3)


def test_alpha_for_several_tasks_balances_norms():
    base, models = draw(0), [draw(1), draw(2), draw(3)]
    merged = merge_trees(METHODS["ties"], models, base, density=0.2)
    flats = [flatten(model) for model in models]
    start = flatten(base)
    above = sum(np.abs(sum(flat[path] - start[path] for flat in flats)).sum() for path in PATHS)
    below = sum(np.abs(flatten(merged)[path] - start[path]).sum() for path in PATHS)
    np.testing.assert_allclose(balance_norms(models, merged, base), above / below / 3, rtol=1e-12)
    summed = merge_trees(METHODS["task_arithmetic"], models, base)
    np.testing.assert_allclose(balance_norms(models, summed, base), 1 / 3, rtol=1e-9)
    assert balance_norms(models, base, base) == 1.0


def test_steps_run_one_after_another():
    base, merged = draw(0), draw(1)
    steps = [("subspace_boosting", {"beta": 0.5}), ("lines", {"alpha": 0.5, "beta": 0.0})]
    stepped = flatten(apply_post_steps(merged, base, steps))
    path = "block_3/mlp/kernel"
    left, values, right = np.linalg.svd(flatten(merged)[path] - flatten(base)[path], full_matrices=False)
    place = int(np.argmax(np.cumsum(values) >= 0.5 * values.sum()))
    boosted = left * np.maximum(values, values[place]) @ right
    np.testing.assert_allclose(stepped[path], flatten(base)[path] + 0.5 * boosted, rtol=1e-9, atol=1e-11)
    halved = (flatten(base)["norm/scale"] + flatten(merged)["norm/scale"]) / 2
    np.testing.assert_allclose(stepped["norm/scale"], halved, rtol=1e-12)  # a vector has no spectrum


def test_names_and_values_are_checked():
    base, merged = draw(0), draw(1)
    with pytest.raises(UnknownNameError, match="post-step 'line'"):
        apply_post_steps(merged, base, [("line", {})])
    with pytest.raises(ConfigError, match="'alpha'"):
        apply_post_steps(merged, base, [("lines", {})])
    with pytest.raises(ConfigError, match="'alpha'"):
        apply_post_steps(merged, base, [("lines", {"alpha": -1.0})])
    with pytest.raises(ConfigError, match="has no place"):
        apply_post_steps(merged, base, [("lines", {"alpha": 0.5})], places={})
