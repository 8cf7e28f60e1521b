"""Short lists against SciPy's dense solver, and the prices that prove them."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxtune.align import assignment
from jaxtune.align.assignment import score_of, solve_assignment_from
from jaxtune.align.shortlist import solve_shortlist

SIZE = 300
KINDS = ("noise", "planted", "one_bias", "many_biases", "offsets", "heavy_tails")


def draw_score(kind, seed=0, size=SIZE, dtype=np.float32):
    draw = np.random.default_rng(seed)
    score = draw.normal(size=(size, size))
    if kind == "planted":
        score += 3 * np.eye(size)[draw.permutation(size)]
    for scale in {"one_bias": [16], "many_biases": [5, 3]}.get(kind, []):
        score += scale * np.outer(draw.normal(size=size), draw.normal(size=size))
    if kind == "offsets":
        score += 3 * (draw.normal(size=(size, 1)) + draw.normal(size=size))
    if kind == "heavy_tails":
        score += 3 * np.exp(draw.normal(size=(size, 1)) + draw.normal(size=size))
    return score.astype(dtype)


def best_of_scipy(score):
    return linear_sum_assignment(score, maximize=True)[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_short_lists_find_what_scipy_finds_and_their_prices_prove_it(kind, dtype):
    for seed in range(3):
        score = draw_score(kind, seed, dtype=dtype)
        solved = solve_shortlist(score)
        order, prices = solved
        np.testing.assert_array_equal(order, best_of_scipy(score))
        profits = score[np.arange(SIZE), order] - prices[order]
        # No entry is worth more than its row and its column ask: weak duality, so nothing beats `order`.
        assert (score - profits[:, None] - prices).max() <= 1e-5 * np.abs(score).max()


@pytest.mark.parametrize("share", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("kind", ["noise", "planted", "one_bias"])
def test_prices_of_a_similar_matrix_change_the_time_and_not_the_optimum(kind, share):
    score = draw_score(kind)
    standing = solve_shortlist(score)
    changed = score + share * np.random.default_rng(9).normal(size=score.shape).astype(np.float32)
    order, _ = solve_shortlist(changed, standing)
    np.testing.assert_array_equal(order, best_of_scipy(changed))


def test_many_equal_scores_are_left_to_the_dense_solver():
    assert solve_shortlist(np.zeros((SIZE, SIZE), np.float32)) is None
    few = np.random.default_rng(0).integers(0, 2, (SIZE, SIZE)).astype(np.float32)
    assert solve_shortlist(few) is None


def test_where_rows_want_the_same_few_columns_the_optimum_is_still_found(monkeypatch):
    """Short lists have no full matching here: SciPy is asked instead."""
    monkeypatch.setattr(assignment, "MIN_LISTED", 2)
    score = np.random.default_rng(1).normal(size=(SIZE, SIZE)).astype(np.float32)
    score[: SIZE // 2, : SIZE // 2 - 1] += 50
    order, _ = solve_assignment_from(score, None)
    assert score_of(score, order) == pytest.approx(score_of(score, best_of_scipy(score)), rel=1e-6)


def test_the_door_takes_what_stands_and_hands_it_back(monkeypatch):
    monkeypatch.setattr(assignment, "MIN_LISTED", 2)
    score, standing = draw_score("noise"), None
    for step in range(4):
        score = score + np.float32(0.1) * draw_score("noise", seed=step + 1)
        order, standing = solve_assignment_from(score, standing)
        np.testing.assert_array_equal(order, best_of_scipy(score))
        np.testing.assert_array_equal(order, standing[0])
    order, standing = solve_assignment_from(np.eye(SIZE), standing)  # row argmax: no column costs anything
    np.testing.assert_array_equal(order, np.arange(SIZE))
    np.testing.assert_array_equal(standing[1], np.zeros(SIZE))


def test_bands_of_near_ties_come_to_an_end():
    """A bias that outweighs everything else sorts rows and columns, and leaves a band of scores nearly equal.

    Without the known order in front, SciPy's check for a full matching does not return on these.
    """
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 3072))
    score = np.outer(x, y) + 3e-5 * draw.normal(size=(3072, 16)) @ draw.normal(size=(16, 3072)) / 4
    score = score.astype(np.float32)
    order, prices = solve_shortlist(score)
    profits = score[np.arange(3072), order] - prices[order]
    assert (score - profits[:, None] - prices).max() <= 1e-5 * np.abs(score).max()
