"""Closed forms for rotary planes: planted numbers, a fine grid of rivals, planes that do little or nothing."""

import numpy as np
import pytest

from jaxtune.align.planes import planes_objective, solve_plane_signs, solve_planes

NUM_HEADS, WIDTH, PLANES = 3, 20, 4


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def draw_sides(draw):
    """Complex columns of both sides, one a plane: complex[heads, width, planes] each."""
    shape = (NUM_HEADS, WIDTH, PLANES)
    return tuple(draw.normal(size=shape) + 1j * draw.normal(size=shape) for _ in range(2))


def draw_numbers(draw, largest=4.0):
    modulus = largest ** draw.uniform(-1, 1, size=(NUM_HEADS, PLANES))
    return modulus * np.exp(2j * np.pi * draw.uniform(size=modulus.shape))


def move(sides, numbers):
    return sides[0] * numbers[:, None], sides[1] / np.conj(numbers)[:, None]


def problem_of(source, target):
    cross = tuple(np.sum(np.conj(b) * a, axis=1) for a, b in zip(source, target, strict=True))
    return cross, *(tuple(np.sum(np.abs(side) ** 2, axis=1) for side in sides) for sides in (source, target))


def squared_distance(source, target, numbers):
    return sum(np.sum(np.abs(a - b) ** 2, axis=1) for a, b in zip(move(source, numbers), target, strict=True))


@pytest.mark.parametrize("largest", [1.0, 4.0, 30.0])
def test_planted_numbers_are_found_exactly(largest, draw):
    source, planted = draw_sides(draw), draw_numbers(draw, largest)
    cross, own, others = problem_of(source, move(source, planted))
    found, scores = solve_planes(cross, own, others, np.ones_like(planted))
    np.testing.assert_allclose(found, planted, rtol=1e-9)
    np.testing.assert_allclose(scores, sum(side.sum(axis=1) for side in others) / 2)


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_no_number_of_a_fine_grid_is_better(noise, draw):
    source, planted = draw_sides(draw), draw_numbers(draw)
    target = tuple(side + noise * a for side, a in zip(move(source, planted), draw_sides(draw), strict=True))
    cross, own, others = problem_of(source, target)
    found, scores = solve_planes(cross, own, others, np.ones_like(planted))
    np.testing.assert_allclose(scores, planes_objective(found, cross, own))
    reached = squared_distance(source, target, found)
    for modulus in np.geomspace(0.05, 20, 120):
        for phase in np.linspace(0, 2 * np.pi, 60, endpoint=False):
            rival = np.full(planted.shape, modulus * np.exp(1j * phase))
            assert (reached <= squared_distance(source, target, rival) * (1 + 1e-6)).all()


def test_the_objective_is_minus_half_the_distance(draw):
    source, target, numbers = draw_sides(draw), draw_sides(draw), draw_numbers(draw)
    cross, own, others = problem_of(source, target)
    wanted = (sum(others) - squared_distance(source, target, numbers)).sum(axis=1) / 2
    np.testing.assert_allclose(planes_objective(numbers, cross, own), wanted)


def test_planes_that_do_nothing_keep_finite_numbers_and_the_current_one_where_nothing_is_better(draw):
    source, zero = draw_sides(draw), tuple(np.zeros((NUM_HEADS, WIDTH, PLANES), complex) for _ in range(2))
    for a, b in ((source, zero), (zero, source), (zero, zero), ((zero[0], source[1]), source)):
        cross, own, others = problem_of(a, b)
        found, scores = solve_planes(cross, own, others, np.ones((NUM_HEADS, PLANES)))
        assert np.isfinite(found).all()
        assert (np.abs(found) > 0).all()
        assert (scores >= planes_objective(np.ones_like(found), cross, own)).all()
    current = draw_numbers(draw)
    cross, own, others = problem_of(source, move(source, current))
    np.testing.assert_allclose(solve_planes(cross, own, others, current)[0], current)


def test_signs_are_those_of_the_products_and_stay_where_nothing_speaks(draw):
    cross = (draw.normal(size=(2, 5)) + 0j, draw.normal(size=(2, 5)) + 1j)
    cross[0][0, 0] = -cross[1][0, 0]
    current = -np.ones((2, 5))
    signs, scores = solve_plane_signs(cross, current)
    product = (cross[0] + cross[1]).real
    assert signs[0, 0] == -1
    for rival in np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T:
        assert ((product * rival).sum(axis=1) <= scores + 1e-12).all()
    np.testing.assert_allclose((product * signs).sum(axis=1), scores)
