"""Least squares with covariances: of the task vectors (WUDI, ACE), against plain NumPy."""

import numpy as np
import pytest

from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS


def draw(count=3, shape=(32, 48), seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)))


def merge(name, deltas, **options):
    base = {"w": np.zeros_like(deltas[0])}
    return merge_trees(METHODS[name], [{"w": delta} for delta in deltas], base, input_axis=-1, **options)["w"]


def wudi_loss(merged, deltas):
    return sum(np.sum(((merged - delta) @ delta.T) ** 2) / np.sum(delta**2) for delta in deltas)


def test_wudi_in_closed_form():
    deltas = draw()
    grams = [delta.T @ delta / np.sum(delta**2) for delta in deltas]
    pull = 1e-3 * np.trace(sum(grams)) / 48
    above = sum(delta @ gram for delta, gram in zip(deltas, grams, strict=True)) + pull * sum(deltas)
    expected = above @ np.linalg.inv(sum(grams) + pull * np.eye(48))
    np.testing.assert_allclose(merge("wudi", deltas, ridge=1e-3), expected, rtol=1e-9, atol=1e-11)


def test_without_a_ridge_the_closed_form_is_the_minimum():
    deltas = draw()
    merged, best = merge("wudi", deltas, ridge=0.0), wudi_loss(merge("wudi", deltas, ridge=0.0), deltas)
    for move in draw(5, seed=3):
        assert wudi_loss(merged + 1e-3 * move, deltas) > best
        assert wudi_loss(merged - 1e-3 * move, deltas) > best


def test_tasks_of_low_rank_keep_their_answers():
    random = np.random.default_rng(0)
    deltas = [random.standard_normal((32, 3)) @ random.standard_normal((3, 48)) for _ in range(3)]
    merged = merge("wudi", deltas, ridge=1e-10)
    for delta in deltas:
        inputs = np.linalg.svd(delta)[2][:3]
        np.testing.assert_allclose(merged @ inputs.T, delta @ inputs.T, atol=1e-6)


def test_wudi_by_adam_is_the_release_step_by_step():
    deltas = [0.01 * delta for delta in draw()]
    merged = sum(deltas)
    mean, square = np.zeros_like(merged), np.zeros_like(merged)
    for step in range(1, 31):
        gradient = sum(2 * (merged - delta) @ delta.T @ delta / np.sum(delta**2) for delta in deltas)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        merged = merged - 1e-4 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    found = merge("wudi", deltas, solver="iterative", num_steps=30, learning_rate=1e-4)
    np.testing.assert_allclose(found, merged, rtol=1e-7, atol=1e-10)


def test_wudi_by_adam_approaches_the_closed_form():
    deltas = draw()
    exact = merge("wudi", deltas, ridge=0.0)
    gaps = []
    for num_steps in (0, 300, 3000):
        found = merge("wudi", deltas, solver="iterative", num_steps=num_steps, learning_rate=1e-2)
        gaps.append(wudi_loss(found, deltas) - wudi_loss(exact, deltas))
    assert gaps[0] > gaps[1] > gaps[2] >= 0
    assert gaps[2] < 1e-3 * gaps[0]


def test_equal_norms_keep_a_long_task_from_taking_all():
    deltas = draw(2)
    one = merge("wudi", [deltas[0], 10 * deltas[1]], equal_norms=True)
    other = merge("wudi", [10 * deltas[0], deltas[1]], equal_norms=True)
    np.testing.assert_allclose(one / np.linalg.norm(one), other / np.linalg.norm(other), atol=1e-3)


def ace_by_loop(deltas, *, centre, epsilon=1e-2, share=0.3):
    """As the release has it."""
    count, size = len(deltas), deltas[0].shape[1]
    traces = np.array([np.sum(delta**2) for delta in deltas])
    logs = np.log(traces + 1e-12)
    is_unlike = logs.var(ddof=1) / (logs.mean() ** 2 + 1e-12) > 0.3
    spreads, above, below = [], 0.0, 0.0
    for delta in deltas:
        moved = delta - delta.mean(axis=0, keepdims=True)
        spread = moved.T @ moved
        trace = np.trace(spread) + 1e-12 if is_unlike else 1.0
        spreads.append(spread / trace)
        gram = spread / trace + epsilon / trace * np.eye(size)
        above, below = above + (moved if centre else delta) @ gram, below + gram
    common = np.mean(sum(spreads), axis=0, keepdims=True)
    if is_unlike:
        common = common / traces.mean()
    merged = above @ np.linalg.inv(below + common)
    if is_unlike:
        rest = merged + sum(delta @ (spread - below / count) for delta, spread in zip(deltas, spreads, strict=True))
        left, values, right = np.linalg.svd(rest, full_matrices=False)
        kept = int(len(values) * share)
        merged = merged + values[:kept].mean() * left[:, :kept] @ right[:kept]
    return merged, is_unlike


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("lengths", [(1.0, 1.0, 1.0), (0.02, 0.05, 1.0)])
def test_ace_equals_a_loop(lengths, centre):
    deltas = [length * delta for length, delta in zip(lengths, draw(), strict=True)]
    expected, is_unlike = ace_by_loop(deltas, centre=centre)
    assert is_unlike == (lengths[0] != 1)  # both branches are met
    options = {"preset": "release"} if centre else {}
    np.testing.assert_allclose(merge("ace", deltas, **options), expected, rtol=1e-6, atol=1e-9)


def test_ace_takes_the_variance_of_a_sample():
    deltas = [length * delta / np.linalg.norm(delta) for length, delta in zip((2.0, 2.0, 10.0), draw(), strict=True)]
    logs = np.log([4.0, 4.0, 100.0])
    assert logs.var() / logs.mean() ** 2 < 0.4 < logs.var(ddof=1) / logs.mean() ** 2 < 0.6
    unlike = merge("ace", deltas, heterogeneity=0.4)
    assert np.abs(unlike - merge("ace", deltas, heterogeneity=0.6)).max() > 1e-3


def test_ace_by_adam_lowers_its_objective():
    deltas = draw()

    def loss(merged):
        total = 0.0
        for delta in deltas:
            moved = delta - delta.mean(axis=0, keepdims=True)
            gap = merged - delta
            total += np.sum((gap @ (moved.T @ moved + 1e-2 * np.eye(48))) * gap)
        return total

    losses = [
        loss(merge("ace", deltas, solver="iterative", num_steps=steps, learning_rate=1e-2)) for steps in (0, 50, 500)
    ]
    assert losses[0] > losses[1] > losses[2]
