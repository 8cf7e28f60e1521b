"""Differences carried over releases: the chain by hand, vocabularies that grow, lines between releases, refusals."""

import jax
import linear_task as task
import ml_dtypes
import numpy as np
import pytest

from jaxtune.compose.versions import check_connection, recycle, transfer_difference
from jaxtune.errors import ConfigError, DataError, TreeMismatchError

RELEASES = [task.draw_params(seed=n) for n in range(3)]
SAMPLE = task.draw_sample(60)


def tune(params, number):
    """A fine-tune that pulls half-way to a fixed target, one other for each release."""
    goal = task.draw_params(seed=50 + number)
    return jax.tree.map(lambda a, b: np.float32(0.5) * (a + b), params, goal)


def test_a_chain_is_the_formula_one_release_after_the_other():
    seen = []

    def noted(params, number):
        seen.append(number)
        return tune(params, number)

    versions = recycle(RELEASES, noted, samples=[SAMPLE], scale=0.7)
    assert seen == [0, 1, 2]
    difference = 0.0
    for number, (release, version) in enumerate(zip(RELEASES, versions, strict=True)):
        base = task.to_vector(release)
        start = base + 0.7 * difference
        tuned = 0.5 * (start + task.to_vector(task.draw_params(seed=50 + number)))
        np.testing.assert_allclose(task.to_vector(version.start), start, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(task.to_vector(version.tuned), tuned, rtol=1e-6, atol=1e-7)
        given, difference = start - base, tuned - base
        assert version.info["norm"] == pytest.approx(np.linalg.norm(difference), rel=1e-5)
        if number:
            cosine = given @ difference / np.linalg.norm(given) / np.linalg.norm(difference)
            assert version.info["cosine"] == pytest.approx(cosine, rel=1e-4)
    assert versions[0].lines == {}
    assert np.isnan(versions[0].info["cosine"])


def test_the_line_between_releases_is_measured_at_25_points():
    line = check_connection(RELEASES[0], RELEASES[1], [SAMPLE])["planes"]
    ends = [task.to_vector(release) for release in RELEASES[:2]]
    weights = np.linspace(0, 1, 25)
    losses = [task.loss_of((1 - w) * ends[0] + w * ends[1], SAMPLE)[0] for w in weights]
    np.testing.assert_allclose(line.barrier.losses, losses, rtol=1e-5)
    assert line.barrier.height < 1e-6  # the loss is convex
    hits = [
        (np.argmax(SAMPLE.batch["image"] @ p[3:].reshape(4, 3) + p[:3], 1) == SAMPLE.batch["label"]).mean()
        for p in ends
    ]
    np.testing.assert_allclose([line.metrics[0].accuracy, line.metrics[-1].accuracy], hits, rtol=1e-6)


def test_the_same_release_again_takes_the_whole_difference():
    tuned = tune(RELEASES[0], 0)
    jax.tree.map(np.testing.assert_array_equal, transfer_difference(RELEASES[0], tuned, RELEASES[0]), tuned)
    none = transfer_difference(RELEASES[0], RELEASES[0], RELEASES[1])
    jax.tree.map(np.testing.assert_array_equal, none, RELEASES[1])
    half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), RELEASES[1])
    assert transfer_difference(RELEASES[0], tuned, half)["head"]["bias"].dtype == ml_dtypes.bfloat16


def vocabulary(rows, seed):
    draw = np.random.default_rng(seed)
    return {
        "embed": {"token": draw.normal(size=(rows, 3)).astype(np.float32)},
        "head": {"kernel": draw.normal(size=(3, rows)).astype(np.float32)},
        "step": np.int32(rows),
    }


def test_new_rows_of_a_vocabulary_are_zero_padded():
    axes = {"embed/token": 0, "head/kernel": 1}
    old, new = vocabulary(4, 0), vocabulary(6, 1)
    tuned = vocabulary(5, 2)  # the fine-tune added a token of its own
    moved = transfer_difference(old, tuned, new, vocabulary=axes)
    for path, axis in (("embed", 0), ("head", 1)):
        rows = [np.moveaxis(next(iter(params[path].values())), axis, 0) for params in (old, tuned, new, moved)]
        np.testing.assert_allclose(rows[3][:4], rows[2][:4] + rows[1][:4] - rows[0], rtol=1e-6)
        np.testing.assert_allclose(rows[3][4], rows[2][4] + rows[1][4], rtol=1e-6)
        np.testing.assert_array_equal(rows[3][5], rows[2][5])
    assert moved["step"] == 6
    same = transfer_difference(old, tuned, vocabulary(4, 1), vocabulary=axes)
    np.testing.assert_array_equal(same["embed"]["token"][4], tuned["embed"]["token"][4])
    with pytest.raises(
        TreeMismatchError, match=r"(?s)vocabulary of new is smaller.*embed/token: old float32\[4, 3\], new "
    ):
        transfer_difference(old, tuned, vocabulary(3, 1), vocabulary=axes)
    with pytest.raises(TreeMismatchError, match="differ in 2 leaves"):
        transfer_difference(old, old, new)


def test_refusals():
    with pytest.raises(ConfigError, match="no release"):
        recycle([], tune)
    with pytest.raises(ConfigError, match="max_barrier needs samples"):
        recycle(RELEASES, tune, max_barrier=0.1)
    with pytest.raises(DataError, match="planes: a loss needs labelled examples"):
        recycle(RELEASES, tune, samples=[SAMPLE.without_labels()])
    with pytest.raises(TreeMismatchError, match="release and fine-tune differ"):
        recycle(RELEASES, lambda params, number: {"other": np.zeros(3, np.float32)})


def test_a_barrier_stops_the_chain_before_anything_is_tuned():
    asked = []

    def noted(params, number):
        asked.append(number)
        return params

    with pytest.raises(ConfigError, match=r"release 1: on planes a barrier of .* more than max_barrier"):
        recycle(RELEASES, noted, samples=[SAMPLE], max_barrier=-1.0)
    assert asked == [0]
