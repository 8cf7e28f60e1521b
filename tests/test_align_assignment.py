"""Assignment against every permutation, SciPy, and ties."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxtune.align.assignment import score_of, solve_assignment, solve_assignments


@pytest.mark.parametrize("n", [1, 2, 4, 6])
@pytest.mark.parametrize("integers", [False, True])
def test_small_problems_reach_the_best_of_all_permutations(n, integers):
    draw = np.random.default_rng(n)
    for _ in range(10):
        score = draw.integers(0, 3, (n, n)).astype(float) if integers else draw.normal(size=(n, n))
        best = max(sum(score[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
        order = solve_assignment(score)
        assert sorted(order) == list(range(n))
        assert score_of(score, order) == pytest.approx(best)


@pytest.mark.parametrize("kind", ["planted", "random", "rank_one"])
def test_large_problems_equal_scipy(kind):
    draw = np.random.default_rng(0)
    score = draw.normal(size=(200, 200))
    if kind == "planted":
        score += 20 * np.eye(200)[draw.permutation(200)]
    if kind == "rank_one":
        score += 5 * np.outer(draw.normal(size=200), draw.normal(size=200))
    rows, columns = linear_sum_assignment(score, maximize=True)
    assert score_of(score, solve_assignment(score)) == pytest.approx(score[rows, columns].sum())


def test_a_stack_is_solved_one_by_one():
    scores = np.random.default_rng(1).normal(size=(2, 3, 5, 5))
    orders = solve_assignments(scores)
    assert orders.shape == (2, 3, 5)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(orders[index], solve_assignment(scores[index]))


def test_nan_and_oblong_scores_are_refused():
    with pytest.raises(ValueError, match="NaN or Inf"):
        solve_assignment(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="square"):
        solve_assignment(np.zeros((2, 3)))
