"""Many models at once: cycles close, planted elements come back, small cases against every combination of orders."""

import itertools

import jax
import numpy as np
import pytest
from toys import add_noise, residual_mlp, toy_transformer

from jaxtune import symmetry, tree
from jaxtune.align.frank_wolfe import best_corner, best_step, joint_objective, value_of
from jaxtune.align.universe import average_in_universe, match_mean, match_universe
from jaxtune.errors import ConfigError, TreeMismatchError, UnknownNameError
from jaxtune.symmetry import Group, canonical, make_spec

KEY = jax.random.key(0)


def assert_same_element(spec, first, second, *, atol=0.0):
    for name in spec.groups:
        np.testing.assert_allclose(np.asarray(first[name]), np.asarray(second[name]), atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def crowd():
    """(spec, planted elements, models): one residual perceptron in four coordinate systems, with noise of its own."""
    spec, base = residual_mlp(0, 12, depth=2)
    planted = [symmetry.random(jax.random.key(n), spec) for n in range(4)]
    models = [symmetry.apply(spec, g, add_noise(base, 0.1, 10 + n)) for n, g in enumerate(planted)]
    return spec, planted, models


@pytest.mark.parametrize("match", [match_universe, match_mean])
def test_maps_between_planted_models_are_the_planted_ones(match, crowd):
    spec, planted, models = crowd
    found = match(KEY, spec, models)
    for source, target in itertools.permutations(range(4), 2):
        expected = symmetry.compose(spec, planted[target], symmetry.invert(spec, planted[source]))
        assert_same_element(spec, found.between(spec, source, target), expected)
    assert found.objective > found.objective_of_identity
    assert found.is_converged


def test_maps_around_a_cycle_close_whatever_was_found():
    spec, _ = residual_mlp(0, 6)
    models = [residual_mlp(seed, 6)[1] for seed in range(3)]  # nothing in common
    found = match_universe(KEY, spec, models, start="identity")
    around = found.between(spec, 0, 1)
    around = symmetry.compose(spec, found.between(spec, 1, 2), around)
    around = symmetry.compose(spec, found.between(spec, 2, 0), around)
    assert_same_element(spec, around, symmetry.identity(spec))
    assert (np.diff(found.relaxed) >= -1e-6 * abs(found.relaxed[-1])).all()
    assert (np.diff(found.history) >= -1e-6).all()
    assert found.num_steps > 0
    moved = [symmetry.apply(spec, g, model) for g, model in zip(found.elements, models, strict=True)]
    total = sum(
        np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64))
        for one, other in itertools.combinations(moved, 2)
        for a, b in zip(tree.flatten(one).values(), tree.flatten(other).values(), strict=True)
    )
    assert found.objective == pytest.approx(total, rel=1e-6)


def test_three_small_models_against_every_combination_of_orders():
    """One hidden layer of four units: the best of all 24 x 24 combinations, by a loop."""
    spec = make_spec([Group("hidden", 4)], {"in": (None, "hidden"), "out": ("hidden", None)})
    reached = []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        shapes = {"in": (5, 4), "out": (4, 3)}
        models = [{p: draw.normal(size=s).astype(np.float32) for p, s in shapes.items()} for _ in range(3)]
        best = -np.inf
        for orders in itertools.product(itertools.permutations(range(4)), repeat=2):
            moved = [models[0]] + [
                {"in": m["in"][:, list(order)], "out": m["out"][list(order)]}
                for m, order in zip(models[1:], orders, strict=True)
            ]
            value = sum(float(np.vdot(a[p], b[p])) for a, b in itertools.combinations(moved, 2) for p in shapes)
            best = max(best, value)
        found = match_universe(KEY, spec, models)
        assert found.objective <= best + 1e-4
        reached.append(found.objective / best)
    assert np.mean(reached) > 0.97
    assert max(reached) == pytest.approx(1, abs=1e-5)


def test_rotations_and_heads_of_folded_weights_are_matched_too():
    plain, base = toy_transformer(0, width=16, depth=1, heads=2, hidden=20)
    spec, folded = canonical.canonical_spec(plain), canonical.fold(plain, base)
    models = [folded] + [symmetry.apply(spec, symmetry.random(jax.random.key(n), spec), folded) for n in (1, 2)]
    found = match_universe(KEY, spec, models)
    first, *others = (symmetry.apply(spec, g, model) for g, model in zip(found.elements, models, strict=True))
    for path, leaf in tree.flatten(first).items():
        for other in others:
            np.testing.assert_allclose(tree.flatten(other)[path], leaf, atol=2e-3, err_msg=path)


def test_a_step_goes_to_the_element_that_the_gradient_favours():
    """Against every order of four units, and as the element acts."""
    spec = make_spec([Group("hidden", 4)], {"in": (None, "hidden")})
    scores = np.random.default_rng(0).normal(size=(4, 4))
    corner = best_corner("permutation", scores)
    best = max(sum(scores[order[t], t] for t in range(4)) for order in itertools.permutations(range(4)))
    assert np.vdot(corner, scores) == pytest.approx(best)
    leaf = np.arange(12, dtype=np.float32).reshape(3, 4)
    moved = symmetry.apply(spec, {"hidden": value_of("permutation", corner)}, {"in": leaf})["in"]
    np.testing.assert_array_equal(moved, leaf @ corner)
    turned = best_corner("orthogonal", scores)
    assert np.vdot(turned, scores) == pytest.approx(np.linalg.svd(scores)[1].sum(), rel=1e-6)


def test_the_line_search_finds_the_highest_point_of_a_quartic():
    draw = np.random.default_rng(0)
    steps = (1 - np.cos(np.pi * np.arange(5) / 4)) / 2
    for _ in range(20):
        quartic = np.polynomial.Polynomial(draw.normal(size=5))
        step, value = best_step(steps, quartic(steps))
        grid = quartic(np.linspace(0, 1, 10001))
        assert value == pytest.approx(grid.max(), abs=1e-6)
        assert quartic(step) == pytest.approx(value, abs=1e-9)


def test_the_average_stands_in_the_coordinates_of_the_reference(crowd):
    spec, planted, models = crowd
    found = match_universe(KEY, spec, models)
    for reference in (0, 2):
        mean = average_in_universe(spec, found, models, reference=reference)
        back = [
            symmetry.apply(spec, symmetry.compose(spec, planted[reference], symmetry.invert(spec, g)), model)
            for g, model in zip(planted, models, strict=True)
        ]
        for path, leaf in tree.flatten(mean).items():
            np.testing.assert_allclose(leaf, np.mean([tree.flatten(b)[path] for b in back], axis=0), atol=1e-6)
    alone = average_in_universe(spec, found, models, weights=[0, 0, 3, 0], reference=2)
    for path, leaf in tree.flatten(alone).items():
        np.testing.assert_allclose(leaf, tree.flatten(models[2])[path], atol=1e-7)
    with pytest.raises(ConfigError, match="one finite number for each of 4 models"):
        average_in_universe(spec, found, models, weights=[1, 2])


def test_bad_input_is_refused_at_the_door(crowd):
    spec, _, models = crowd
    with pytest.raises(ConfigError, match="1 models: there is nothing to match"):
        match_universe(KEY, spec, models[:1])
    with pytest.raises(UnknownNameError, match="Did you mean 'first'"):
        match_universe(KEY, spec, models, start="fist")
    with pytest.raises(TreeMismatchError, match="model 1 float32"):
        match_universe(KEY, spec, [models[0], residual_mlp(0, 13, depth=2)[1]])
    assert joint_objective(spec, models[:2]) == pytest.approx(joint_objective(spec, models[1::-1]))
