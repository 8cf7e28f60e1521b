"""Signs and scales of matched units: every order and NumPy's roots as oracles, and balancing."""

import itertools

import jax
import numpy as np
import pytest
from small_models import random_params

from jaxtune import symmetry, tree
from jaxtune.align.factors import MAX_SCALE, Pairing, best_scales, solve_order, solve_scales, solve_signs
from jaxtune.align.lengths import balance_units, unit_squares
from jaxtune.models import mlp, registry, resnet

SETTINGS = {
    "perceptron": mlp.Config(image_shape=(4, 4, 1), widths=(9, 8, 7), num_outputs=5),
    "resnet": resnet.Config(num_outputs=5, depth=8),
}


def gain(scale, plain, dual, own_plain, own_dual):
    return scale * plain + dual / scale - scale**2 * own_plain / 2 - own_dual / (2 * scale**2)


def best_by_roots(plain, dual, own_plain, own_dual):
    """Largest gain over all positive roots of the quartic and the two ends of what is allowed."""
    roots = np.roots([own_plain, -plain, 0.0, dual, -own_dual])
    real = roots[(np.abs(roots.imag) < 1e-6 * np.abs(roots)) & (roots.real > 0)].real
    scales = np.concatenate([np.clip(real, 1 / MAX_SCALE, MAX_SCALE), [1 / MAX_SCALE, MAX_SCALE]])
    return gain(scales, plain, dual, own_plain, own_dual).max()


def draw_pairing(seed, size, *, noise=1.0, negative=()):
    """Products of real vectors, so that Cauchy-Schwarz holds as it does between networks; some units may be turned."""
    draw = np.random.default_rng(seed)
    source = {name: draw.normal(size=(size, 6)) for name in ("plain", "dual", "fixed")}
    target = {name: rows[::-1] + noise * draw.normal(size=rows.shape) for name, rows in source.items()}
    for name in ("plain", "dual"):
        target[name][list(negative)] *= -1
    products = {name: target[name] @ source[name].T for name in source}
    own = {f"own_{name}": (source[name] ** 2).sum(axis=1) for name in ("plain", "dual")}
    return Pairing(**products, **own)


@pytest.mark.parametrize("name", ["any signs", "both positive", "two wells", "one side strong"])
def test_the_scale_is_the_best_root_of_the_quartic(name):
    draw, size = np.random.default_rng(0), 2000
    own = 10.0 ** draw.uniform(-2, 2, size=(2, size))
    cross = draw.normal(size=(2, size)) * np.sqrt(own)
    if name == "both positive":
        cross = 10 * np.abs(cross)
    elif name == "two wells":
        own = np.ones((2, size))
        cross = 10.0 ** draw.uniform(0, 1.2, size) * (1 + 0.1 * draw.normal(size=(2, size)))
    elif name == "one side strong":
        cross[0] *= 100
    found = best_scales(*cross, *own)
    reached = gain(found, *cross, *own)
    best = np.array([best_by_roots(*values) for values in np.concatenate([cross, own]).T])
    np.testing.assert_allclose(reached, best, rtol=1e-9, atol=1e-9)


def test_a_planted_scale_comes_back_and_what_nothing_determines_stays_at_one():
    # Target = 3 x source on the plain side, source / 3 on the dual one.
    np.testing.assert_allclose(best_scales(*np.array([[3 * 2.0], [5.0 / 3], [2.0], [5.0]])), 3, rtol=1e-9)
    np.testing.assert_allclose(best_scales(*np.array([[6.0], [0.0], [2.0], [0.0]])), 3, rtol=1e-9)  # one side alone
    np.testing.assert_allclose(best_scales(*np.array([[0.0], [2.0], [0.0], [6.0]])), 3, rtol=1e-9)
    np.testing.assert_array_equal(best_scales(*np.zeros((4, 1))), 1)
    assert best_scales(*np.array([[1.0], [0.0], [0.0], [0.0]])).item() == pytest.approx(MAX_SCALE)


@pytest.mark.parametrize("seed", range(5))
def test_signs_and_scales_beat_every_order(seed):
    pairing, size = draw_pairing(seed, 5, negative=[1, 3]), 5
    own = (np.tile(pairing.own_plain, (size, 1)), np.tile(pairing.own_dual, (size, 1)))
    tables = {"signs": np.abs(pairing.plain + pairing.dual) - (own[0] + own[1]) / 2}
    each = np.stack([pairing.plain, pairing.dual, *own]).reshape(4, -1).T
    tables["scales"] = np.array([best_by_roots(*values) for values in each]).reshape(size, size)
    for name, solve in (("signs", solve_signs), ("scales", solve_scales)):
        table = tables[name] + pairing.fixed
        orders = itertools.permutations(range(size))
        best = max(table[np.arange(size), list(order)].sum() for order in orders)
        found = solve(pairing)
        assert pairing.objective(found) == pytest.approx(best, rel=1e-9)
        kind = {"signs": "signed_permutation", "scales": "scaled_permutation"}[name]
        assert symmetry.KINDS[kind].check(found, size, None) is None
        for rival in range(20):
            drawn = symmetry.KINDS[kind].draw(jax.random.key(rival), size, None)
            assert pairing.objective(drawn) <= pairing.objective(found)


def test_known_scales_leave_the_order_alone_to_be_found():
    pairing = draw_pairing(0, 6, noise=0.1)
    found = solve_order(pairing, np.full(6, 0.5), np.full(6, 2.0))
    np.testing.assert_array_equal(found, [np.arange(6)[::-1], np.full(6, 4.0)])


@pytest.mark.parametrize("name", SETTINGS)
def test_balancing_makes_both_sides_equal_and_forgets_every_scale(name):
    config = SETTINGS[name]
    spec, params = registry.symmetry_of(config, scales="free"), random_params(config)
    weights = {path: 1.0 + 0.1 * n for n, path in enumerate(spec.axes) if path not in spec.unmatched}

    def balance(params):
        scales = balance_units(spec, tree.flatten(params), weights)
        element = {group: np.stack([np.arange(len(s)), s]) for group, s in scales.items()}
        return symmetry.apply(spec, element, params)

    balanced, still = balance(params), symmetry.identity(spec)
    for group in spec.groups:
        sides = {False: 0.0, True: 0.0}
        for path, position in spec.leaves_of(group):
            axis = spec.axes[path][position]
            if path in weights and not axis.order_only:
                leaf = tree.flatten(balanced)[path]
                by_hand = [np.vdot(unit, unit) for unit in np.moveaxis(leaf, position, 0)]
                np.testing.assert_allclose(unit_squares(spec, still, path, position, leaf), by_hand)
                sides[axis.dual] = sides[axis.dual] + weights[path] * np.array(by_hand)
        np.testing.assert_allclose(sides[False], sides[True], rtol=1e-6, err_msg=group)
    element = symmetry.random(jax.random.key(0), spec)
    orders = {group: np.stack([value[0], np.ones_like(value[1])]) for group, value in element.items()}
    moved = tree.flatten(balance(symmetry.apply(spec, element, params)))
    for path, leaf in tree.flatten(symmetry.apply(spec, orders, balanced)).items():
        np.testing.assert_allclose(moved[path], leaf, rtol=1e-6, atol=1e-9, err_msg=path)


def test_a_unit_with_a_dead_side_keeps_its_scale():
    config = SETTINGS["perceptron"]
    spec, params = registry.symmetry_of(config, scales="free"), random_params(config)
    params["layer_1"]["kernel"][:, 2], params["layer_1"]["bias"][2] = 0, 0
    params["head"]["kernel"][4] = 0
    scales = balance_units(spec, tree.flatten(params), dict.fromkeys(spec.axes, 1.0))
    assert scales["layer_1/hidden"][2] == scales["layer_2/hidden"][4] == 1
    assert all(np.isfinite(values).all() for values in scales.values())
