"""Methods that are given more than weights: Fisher information and Gram matrices, one tree a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.merge.arrays import RUN, ArrayView, merge_trees
from jaxtune.merge.registry import METHODS

SHAPES = {"a": (6, 5), "b": (7,)}


def draw(count=3, seed=0, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return [{path: random.standard_normal(shape) for path, shape in shapes.items()} for _ in range(count)]


def square(trees):
    return [{path: leaf**2 for path, leaf in tree.items()} for tree in trees]


def merge(name, models, extras, **options):
    return merge_trees(METHODS[name], models, extras=extras, **options)


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("favor_target", [True, False])
def test_fisher_equals_a_loop(scope, normalize, favor_target):
    models, fishers, weight = draw(), square(draw(seed=1)), [0.2, 0.5, 0.3]
    fishers[1]["a"][0] = fishers[0]["b"][0] = 0.0
    merged = merge(
        "fisher", models, fishers, weight=weight, normalize=normalize, favor_target=favor_target, scope=scope, floor=0.1
    )
    for path, shape in SHAPES.items():
        for at in np.ndindex(shape):
            above = below = 0.0
            for k, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
                over = [path] if scope == "leaf" else list(SHAPES)
                length = np.sqrt(sum(np.sum(fisher[p] ** 2) for p in over)) if normalize else 1.0
                value = max(fisher[path][at], 0.1) if k == 0 or not favor_target else fisher[path][at]
                above += weight[k] / length * value * model[path][at]
                below += weight[k] / length * value
            np.testing.assert_allclose(merged[path][at], above / below, rtol=1e-12)


def test_equal_fishers_give_the_plain_average():
    models, fishers = draw(), square(draw(1)) * 3
    merged = merge("fisher", models, fishers, floor=0.0)
    for path in SHAPES:
        np.testing.assert_allclose(merged[path], sum(model[path] for model in models) / 3, rtol=1e-12, atol=1e-14)


def test_a_corner_of_the_simplex_is_that_model_but_where_nothing_is_known():
    models, fishers = draw(), square(draw(seed=1))
    fishers[2]["a"][0] = 0.0
    merged = merge("fisher", models, fishers, weight=[0.0, 0.0, 1.0])
    np.testing.assert_allclose(merged["b"], models[2]["b"], rtol=1e-12)
    np.testing.assert_allclose(merged["a"][1:], models[2]["a"][1:], rtol=1e-12)
    mean = sum(model["a"][0] for model in models) / 3  # 0 / 0 in the release
    np.testing.assert_allclose(merged["a"][0], mean, rtol=1e-12)
    first = merge("fisher", models, fishers, weight=[1.0, 0.0, 0.0])
    np.testing.assert_allclose(first["a"], models[0]["a"], rtol=1e-12)


def test_the_floor_gives_the_first_model_what_no_other_cares_about():
    models, fishers = draw(), square(draw(seed=1))
    for fisher in fishers:
        fisher["a"][0] = 0.0
    np.testing.assert_allclose(merge("fisher", models, fishers)["a"][0], models[0]["a"][0], rtol=1e-12)
    both = merge("fisher", models, fishers, favor_target=False, normalize=False)["a"][0]
    np.testing.assert_allclose(both, sum(model["a"][0] for model in models) / 3, rtol=1e-12)


def test_a_leaf_without_fishers_is_averaged():
    models, fishers = draw(), square(draw(seed=1))
    merged = merge("fisher", models, [{"a": fisher["a"]} for fisher in fishers])
    np.testing.assert_allclose(merged["a"], merge("fisher", [{"a": model["a"]} for model in models],
                                                  [{"a": fisher["a"]} for fisher in fishers])["a"])  # fmt: skip
    np.testing.assert_allclose(merged["b"], sum(model["b"] for model in models) / 3, rtol=1e-12)


def test_fishers_are_cut_in_runs_with_their_leaves():
    shapes = {"a": (RUN + 77,)}
    models, fishers = draw(2, shapes=shapes), square(draw(2, seed=1, shapes=shapes))
    above = sum(m["a"] * f["a"] / np.linalg.norm(f["a"]) for m, f in zip(models, fishers, strict=True))
    below = sum(f["a"] / np.linalg.norm(f["a"]) for f in fishers)
    merged = merge("fisher", models, fishers, floor=0.0)["a"]
    np.testing.assert_allclose(merged, above / below, rtol=1e-9)


def test_a_run_carries_its_own_part_of_the_extras():
    leaf = np.arange(2.0 * RUN)
    view = ArrayView(["a"], [[leaf]], [None], unit="element", extras=[[leaf]])
    assert view.extra_shapes == ((2 * RUN,),)
    runs = list(view.runs(0))
    assert len(runs) == 2
    for run in runs:
        np.testing.assert_array_equal(run.extras[0], run.models[0])


def draw_regressions(seed=0, inputs=6, outputs=5):
    """Inputs, exact answers' weights (outputs by inputs) and Grams of three tasks."""
    random = np.random.default_rng(seed)
    data = [random.standard_normal((40, inputs)) @ np.diag(np.linspace(0.5, 2, inputs)) for _ in range(3)]
    targets = [random.standard_normal((40, outputs)) for _ in range(3)]
    solutions = [np.linalg.lstsq(x, y, rcond=None)[0].T for x, y in zip(data, targets, strict=True)]
    return data, targets, solutions, [{"w": x.T @ x} for x in data]


@pytest.mark.parametrize("input_axis", [0, -1])
def test_regmean_of_solutions_is_the_pooled_solution(input_axis):
    data, targets, solutions, grams = draw_regressions()
    models = [{"w": w.T if input_axis == 0 else w} for w in solutions]
    merged = merge("regmean", models, grams, off_diagonal=1.0, input_axis=input_axis)["w"]
    pooled = np.linalg.lstsq(np.concatenate(data), np.concatenate(targets), rcond=None)[0]
    # The ridge of 1e-10 moves it by about as much.
    np.testing.assert_allclose(merged if input_axis == 0 else merged.T, pooled, rtol=1e-8, atol=1e-9)


def test_regmean_of_diagonals_is_a_weighted_mean_of_columns():
    _, _, solutions, grams = draw_regressions()
    diagonals = [np.diag(gram["w"]) for gram in grams]
    expected = sum(w * d for w, d in zip(solutions, diagonals, strict=True)) / sum(diagonals)
    models = [{"w": w} for w in solutions]
    merged = merge("regmean", models, grams, off_diagonal=0.0, input_axis=-1)["w"]
    np.testing.assert_allclose(merged, expected, rtol=1e-8)


def test_regmean_scales_what_is_off_the_diagonal_and_weighs_tasks():
    _, _, solutions, grams = draw_regressions()
    above = below = 0.0
    for w, gram, factor in zip(solutions, grams, (1.0, 2.0, 0.5), strict=True):
        scaled = 0.95 * gram["w"] + 0.05 * np.diag(np.diag(gram["w"]))
        above, below = above + factor * w @ scaled, below + factor * scaled
    models = [{"w": w} for w in solutions]
    merged = merge("regmean", models, grams, weight=[1.0, 2.0, 0.5], input_axis=-1)["w"]
    np.testing.assert_allclose(merged, above @ np.linalg.inv(below), rtol=1e-8)


def test_inputs_that_are_always_zero_keep_the_mean():
    _, _, solutions, grams = draw_regressions()
    for gram in grams:
        gram["w"][2], gram["w"][:, 2] = 0.0, 0.0
    models = [{"w": w} for w in solutions]
    merged = merge("regmean", models, grams, input_axis=-1)["w"]
    assert np.isfinite(merged).all()
    np.testing.assert_allclose(merged[:, 2], sum(solutions)[:, 2] / 3, rtol=1e-6)


def test_regmean_averages_leaves_without_a_gram():
    _, _, solutions, grams = draw_regressions()
    biases = draw(3, shapes={"b": (5,)})
    models = [{"w": w, **bias} for w, bias in zip(solutions, biases, strict=True)]
    merged = merge("regmean", models, grams, input_axis=-1, weight=[1.0, 1.0, 2.0])
    expected = (biases[0]["b"] + biases[1]["b"] + 2 * biases[2]["b"]) / 4
    np.testing.assert_allclose(merged["b"], expected, rtol=1e-12)


def test_extras_are_arguments_under_jit():
    models, fishers = draw(), square(draw(seed=1))
    to_jax = lambda trees: [{p: jnp.asarray(x, jnp.float32) for p, x in tree.items()} for tree in trees]  # noqa: E731
    found = jax.jit(lambda m, f: merge("fisher", m, f))(to_jax(models), to_jax(fishers))
    for path, leaf in merge("fisher", models, fishers).items():
        np.testing.assert_allclose(np.asarray(found[path]), leaf, rtol=1e-4, atol=1e-5)


def test_what_is_missing_too_much_or_misshapen_is_said():
    models, fishers = draw(), square(draw(seed=1))
    with pytest.raises(ConfigError, match="needs fishers"):
        merge_trees(METHODS["fisher"], models)
    with pytest.raises(ConfigError, match="needs nothing beside weights"):
        merge("linear", models, fishers)
    with pytest.raises(ConfigError, match="expected 3 trees of fishers, got 2"):
        merge("fisher", models, fishers[:2])
    with pytest.raises(TreeMismatchError, match="of leaves that no model has: c"):
        merge("fisher", models, [{**fisher, "c": np.ones(3)} for fisher in fishers])
    with pytest.raises(TreeMismatchError, match="Fisher"):
        merge("fisher", models, [{**fisher, "b": np.ones(3)} for fisher in fishers])
    with pytest.raises(TreeMismatchError, match=r"expected \(5, 5\)"):
        merge("regmean", [{"a": model["a"]} for model in models], [{"a": np.eye(6)}] * 3, input_axis=-1)
    with pytest.raises(TreeMismatchError, match="no matrix"):
        merge("regmean", [{"b": model["b"]} for model in models], [{"b": np.eye(7)}] * 3, input_axis=-1)
    with pytest.raises(ConfigError, match="'off_diagonal'"):
        merge("regmean", models, [{"a": np.eye(6)}] * 3, off_diagonal=1.5)
