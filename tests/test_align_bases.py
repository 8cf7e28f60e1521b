"""Closed forms for changes of basis: planted maps, SciPy, random rivals, and heads that do little or nothing."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from jaxtune.align.bases import (
    RANK_TOLERANCE,
    balance,
    centred_polar_factor,
    inside_objective,
    make_sides,
    polar_factor,
    solve_inside,
)

NUM_HEADS, WIDTH, UNITS = 3, 40, 8


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def t(matrix):
    return np.swapaxes(matrix, -1, -2)


def draw_sides(draw, *, units=UNITS):
    """X and Y of every head: float64[heads, width, units] each."""
    return tuple(draw.normal(size=(NUM_HEADS, WIDTH, units)) for _ in range(2))


def draw_gauge(draw, condition, units=UNITS):
    """Invertible maps of a known condition: rotation, stretch, rotation."""
    left, right = (scipy.stats.ortho_group(units, seed=draw).rvs(NUM_HEADS) for _ in range(2))
    return (left * np.geomspace(condition**-0.5, condition**0.5, units)) @ right


def move(sides, gauge):
    """The same circuits in another basis."""
    return sides[0] @ gauge, sides[1] @ t(np.linalg.inv(gauge))


def problem_of(source, target):
    """(cross, source, target) as `solve_inside` takes them."""
    cross = tuple(t(ours) @ theirs for ours, theirs in zip(source, target, strict=True))
    return cross, *(make_sides(*(t(side) @ side for side in sides)) for sides in (source, target))


def squared_distance(source, target, maps):
    moved = move(source, maps)
    return sum(((ours - theirs) ** 2).sum(axis=(1, 2)) for ours, theirs in zip(moved, target, strict=True))


def identities(units=UNITS):
    return np.tile(np.eye(units), (NUM_HEADS, 1, 1))


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_the_polar_factor_is_scipys(size, draw):
    matrix = draw.normal(size=(size, size))
    wanted, rest = scipy.linalg.polar(matrix)
    np.testing.assert_allclose(polar_factor(matrix), wanted, atol=1e-12)
    assert np.trace(wanted.T @ matrix) == pytest.approx(np.linalg.svd(matrix)[1].sum())
    np.testing.assert_allclose(rest, rest.T, atol=1e-12)


def test_polar_factors_come_in_stacks_and_in_float64(draw):
    stack = draw.normal(size=(2, 3, 4, 4)).astype(np.float32)
    factors = polar_factor(stack)
    assert factors.dtype == np.float64
    assert factors.shape == stack.shape
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(factors[index], polar_factor(stack[index]))


def test_a_singular_matrix_has_a_polar_factor_too(draw):
    for matrix in (np.zeros((4, 4)), np.outer(np.arange(4.0), np.ones(4))):
        factor = polar_factor(matrix)
        np.testing.assert_allclose(factor.T @ factor, np.eye(4), atol=1e-12)
        assert np.trace(factor.T @ matrix) == pytest.approx(np.linalg.svd(matrix)[1].sum())


def test_the_polar_factor_beats_random_rotations(draw):
    matrix = draw.normal(size=(5, 5))
    best = np.trace(polar_factor(matrix).T @ matrix)
    rivals = scipy.stats.ortho_group(5, seed=draw).rvs(1000)
    assert np.einsum("rab,ab->r", rivals, matrix).max() <= best


def draw_centred_rotations(draw, size, number):
    """Rotations that keep the ones vector, made without the package: a basis of what is orthogonal to it."""
    rest = scipy.linalg.null_space(np.ones((1, size)))
    ones = np.full((size, size), 1 / size)
    inner = scipy.stats.ortho_group(size - 1, seed=draw).rvs(number).reshape(number, size - 1, size - 1)
    return ones + rest @ inner @ rest.T


@pytest.mark.parametrize("size", [3, 8])
def test_the_centred_factor_keeps_the_ones_and_beats_random_rivals(size, draw):
    for matrix in (draw.normal(size=(size, size)), 3 + draw.normal(size=(size, size))):
        best = centred_polar_factor(matrix)
        np.testing.assert_allclose(best.T @ best, np.eye(size), atol=1e-12)
        np.testing.assert_allclose(best @ np.ones(size), 1, atol=1e-12)
        np.testing.assert_allclose(best.sum(axis=0), 1, atol=1e-12)
        value = (best * matrix).sum()
        rivals = draw_centred_rotations(draw, size, 1000)
        np.testing.assert_allclose(rivals.sum(axis=1), 1, atol=1e-12)
        assert (rivals * matrix).sum(axis=(1, 2)).max() <= value
        near = rivals[0] - np.eye(size)  # and no step away from it gains: the product is stationary
        skew = near - near.T
        skew -= skew.mean(axis=0, keepdims=True)
        skew -= skew.mean(axis=1, keepdims=True)
        assert (scipy.linalg.expm(1e-3 * (skew - skew.T)) @ best * matrix).sum() <= value


def test_a_planted_centred_rotation_is_found(draw):
    for size in (2, 3, 9):
        planted = draw_centred_rotations(draw, size, 1)[0]
        points = draw.normal(size=(50, size))
        np.testing.assert_allclose(centred_polar_factor(points.T @ (points @ planted)), planted, atol=1e-10)


def test_one_unit_cannot_turn():
    np.testing.assert_array_equal(np.abs(centred_polar_factor(np.array([[-3.0]]))), 1)
    assert centred_polar_factor(np.array([[-3.0]])).item() == 1, "it must keep the ones vector"


@pytest.mark.parametrize("condition", [1, 100])
def test_balanced_sides_share_a_diagonal_gram_matrix(condition, draw):
    x, y = move(draw_sides(draw), draw_gauge(draw, condition))
    forward, backward = balance(t(x) @ x, t(y) @ y)
    np.testing.assert_allclose(forward @ backward, identities(), atol=1e-9)
    x_balanced, y_balanced = x @ forward, y @ t(backward)
    np.testing.assert_allclose(x_balanced @ t(y_balanced), x @ t(y), atol=1e-9 * np.abs(x @ t(y)).max())
    ours, theirs = t(x_balanced) @ x_balanced, t(y_balanced) @ y_balanced
    scale = np.abs(ours).max()
    np.testing.assert_allclose(ours, theirs, atol=1e-9 * scale)
    np.testing.assert_allclose(ours, ours * np.eye(UNITS), atol=1e-9 * scale)
    # The shared diagonal is the spectrum of the circuit itself.
    spectrum = np.linalg.svd(x @ t(y), compute_uv=False)[:, :UNITS]
    np.testing.assert_allclose(np.diagonal(ours, axis1=1, axis2=2), spectrum, rtol=1e-8)


def test_balancing_undoes_any_gauge_up_to_signs(draw):
    sides = draw_sides(draw)
    ours, theirs = (
        pair[0] @ balance(*(t(side) @ side for side in pair))[0] for pair in (sides, move(sides, draw_gauge(draw, 30)))
    )
    np.testing.assert_allclose(np.abs(t(ours) @ theirs), np.abs(t(ours) @ ours), atol=1e-8 * (ours**2).sum())


@pytest.mark.parametrize("condition", [1, 4, 100])
@pytest.mark.parametrize("units", [1, 2, UNITS])
def test_a_planted_map_is_found_exactly(units, condition, draw):
    source = draw_sides(draw, units=units)
    planted = draw_gauge(draw, condition, units)
    target = move(source, planted)
    maps, scores = solve_inside(*problem_of(source, target), identities(units))
    np.testing.assert_allclose(maps, planted, atol=1e-9 * condition)
    size = sum((side**2).sum(axis=(1, 2)) for side in target)
    assert (squared_distance(source, target, maps) < 1e-18 * condition * size).all()
    np.testing.assert_allclose(scores, size / 2, rtol=1e-9)  # the most that there is


def test_a_planted_map_is_found_through_float32_gram_matrices(draw):
    source = draw_sides(draw)
    planted = draw_gauge(draw, 100)
    cross, *sides = problem_of(source, move(source, planted))
    cross = tuple(product.astype(np.float32) for product in cross)
    sides = [make_sides(*(gram.astype(np.float32) for gram in side.grams)) for side in sides]
    maps, _ = solve_inside(cross, *sides, identities())
    # Gram matrices square the condition: 1e4 times the rounding of float32.
    np.testing.assert_allclose(maps, planted, atol=1e-2)


def test_a_common_map_of_both_networks_changes_nothing(draw):
    """Moving the target by h moves the answer by h: g -> g h."""
    source, target = draw_sides(draw), draw_sides(draw)
    target = tuple(ours + 0.1 * theirs for ours, theirs in zip(move(source, draw_gauge(draw, 4)), target, strict=True))
    turn = scipy.stats.ortho_group(UNITS, seed=draw).rvs(NUM_HEADS)
    maps, scores = solve_inside(*problem_of(source, target), identities())
    turned, turned_scores = solve_inside(*problem_of(source, move(target, turn)), identities())
    np.testing.assert_allclose(turned, maps @ turn, atol=1e-8)
    np.testing.assert_allclose(turned_scores, scores)


def candidates_by_hand(cross, current):
    """What the closed form chooses from, each made with SciPy."""
    rotation = np.stack([scipy.linalg.polar(x + y)[0] for x, y in zip(*cross, strict=True)])
    return [current, identities(), rotation]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 0.1, 10.0])
def test_the_answer_is_never_worse_than_a_candidate(noise, seed):
    draw = np.random.default_rng(seed)
    source, planted = draw_sides(draw), draw_gauge(draw, 10)
    target = tuple(side + noise * draw.normal(size=side.shape) for side in move(source, planted))
    problem = problem_of(source, target)
    for current in (identities(), planted, draw_gauge(draw, 3), 1.3 * planted):
        maps, scores = solve_inside(*problem, current)
        np.testing.assert_allclose(scores, inside_objective(maps, problem[0], problem[1].grams))
        distance = squared_distance(source, target, maps)
        for candidate in candidates_by_hand(problem[0], current):
            assert (distance <= squared_distance(source, target, candidate) * (1 + 1e-9) + 1e-9).all()


def test_every_head_gets_its_own_best(draw):
    source = draw_sides(draw)
    planted = draw_gauge(draw, 20)
    target = move(source, planted)
    target = tuple(np.concatenate([theirs[:1], ours[1:]]) for ours, theirs in zip(source, target, strict=True))
    maps, _ = solve_inside(*problem_of(source, target), identities())
    np.testing.assert_allclose(maps[0], planted[0], atol=1e-8)
    np.testing.assert_allclose(maps[1:], identities()[1:], atol=1e-8)


def test_a_better_current_map_is_kept(draw):
    """Off the orbit the closed forms are not optimal; what gradient steps have reached must not be lost."""
    source = draw_sides(draw)
    target = draw_sides(draw)
    problem = problem_of(source, target)
    maps, scores = solve_inside(*problem, identities())
    for _ in range(30):
        step = np.stack([1e-3 * draw.normal(size=maps.shape) for _ in range(20)])
        rivals = maps[None] @ (np.eye(UNITS) + step)
        values = np.stack([inside_objective(rival, problem[0], problem[1].grams) for rival in rivals])
        best = values.argmax(axis=0)
        improved = values.max(axis=0) > scores
        maps = np.where(improved[:, None, None], rivals[best, np.arange(NUM_HEADS)], maps)
        scores = np.maximum(scores, values.max(axis=0))
    kept, kept_scores = solve_inside(*problem, maps)
    np.testing.assert_array_equal(kept, maps)
    np.testing.assert_array_equal(kept_scores, scores)


@pytest.mark.parametrize("condition", [1, 30])
def test_the_objective_is_minus_half_the_distance(condition, draw):
    source, target, maps = draw_sides(draw), draw_sides(draw), draw_gauge(draw, condition)
    cross, own, _ = problem_of(source, target)
    own = own.grams
    size = sum((side**2).sum(axis=(1, 2)) for side in target)
    wanted = (size - squared_distance(source, target, maps)) / 2
    np.testing.assert_allclose(inside_objective(maps, cross, own), wanted, rtol=1e-10)
    for head in range(NUM_HEADS):  # term by term, as the docstring has it
        g, dual = maps[head], np.linalg.inv(maps[head]).T
        (x_a, y_a), (x_b, y_b) = ((side[head] for side in sides) for sides in (source, target))
        direct = np.vdot(x_b, x_a @ g) - np.sum((x_a @ g) ** 2) / 2
        direct += np.vdot(y_b, y_a @ dual) - np.sum((y_a @ dual) ** 2) / 2
        assert inside_objective(maps, cross, own)[head] == pytest.approx(direct)


def poor_heads(draw):
    """Name -> (source, target) of heads that leave directions unused, on one side or on both."""
    full, zero = draw.normal(size=(NUM_HEADS, WIDTH, UNITS)), np.zeros((NUM_HEADS, WIDTH, UNITS))
    low = draw.normal(size=(NUM_HEADS, WIDTH, 3)) @ draw.normal(size=(NUM_HEADS, 3, UNITS))
    fading = full * np.geomspace(1, 1e-9, UNITS)
    other = draw.normal(size=full.shape)
    return {
        "source of zeros": ((zero, zero), (full, other)),
        "target of zeros": ((full, other), (zero, zero)),
        "all zeros": ((zero, zero), (zero, zero)),
        "one side of zeros": ((zero, full), (other, full)),
        "opposite sides of zeros": ((zero, full), (full, zero)),
        "low rank": ((low, low[:, ::-1]), (low[:, ::2].repeat(2, axis=1), low)),
        "low rank on one side": ((low, full), (full, low)),
        "fading": ((fading, full), (full, other)),
        "fading on opposite sides": ((fading, full), (other, fading[:, ::-1])),
        "tiny": ((1e-12 * full, full), (full, other)),
    }


@pytest.mark.parametrize("name", list(poor_heads(np.random.default_rng(0))))
def test_heads_with_unused_directions_get_finite_maps(name, draw):
    source, target = poor_heads(draw)[name]
    cross, own, others = problem_of(source, target)
    for current in (identities(), -identities()):
        maps, scores = solve_inside(cross, own, others, current)
        assert np.isfinite(maps).all()
        assert np.isfinite(np.linalg.inv(maps)).all()
        np.testing.assert_allclose(scores, inside_objective(maps, cross, own.grams))
        assert (scores >= inside_objective(current, cross, own.grams)).all()


def test_a_circuit_of_low_rank_still_arrives(draw):
    """The map is free where the circuit does nothing; the circuit itself must come out."""
    used = draw.normal(size=(NUM_HEADS, 5, UNITS))
    x, y = draw_sides(draw, units=5)
    source = x @ used, y @ t(np.linalg.pinv(used))
    target = move(source, draw_gauge(draw, 10))
    maps, _ = solve_inside(*problem_of(source, target), identities())
    size = sum((side**2).sum(axis=(1, 2)) for side in target)
    # Silent directions are lifted to RANK_TOLERANCE of the strongest, which bends the others by no more.
    assert (squared_distance(source, target, maps) < RANK_TOLERANCE**2 * size).all()
