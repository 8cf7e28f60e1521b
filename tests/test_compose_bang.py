"""BANG: less sure of itself, the same average, and a report that is counted by hand."""

import jax
import linear_task as task
import numpy as np
import pytest
from kills import kill_behind

from jaxtune.compose.bang import Smoothed, bang, report_confidence
from jaxtune.compose.fitting import Recipe, fit, join, split, supervised
from jaxtune.errors import ConfigError, DataError
from jaxtune.interpolate.line import interpolate_linear
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.step import mix_images

BASE, SAMPLE, OTHER = (
    task.draw_params(seed=1, scale=0.1),
    task.draw_sample(60),
    task.draw_sample(60, seed=9, name="far"),
)
RECIPE = Recipe(60, 0.1, 20)


def test_without_either_it_is_a_plain_fine_tune_averaged():
    found = bang(BASE, SAMPLE, label_smoothing=0.0, weight=0.3, recipe=RECIPE)
    plain = fit(supervised, *split(BASE, SAMPLE), SAMPLE, recipe=RECIPE)
    expected = interpolate_linear(BASE, join(plain.numbers, {}), 0.3)
    np.testing.assert_allclose(task.to_vector(found.params), task.to_vector(expected), atol=1e-5)


def test_smoothing_and_mixing_make_it_less_sure():
    options = {"recipe": RECIPE, "reports": [SAMPLE, OTHER]}
    ways = [bang(BASE, SAMPLE, label_smoothing=s, mixup=m, **options) for s, m in ((0.0, 0.0), (0.3, 0.0), (0.0, 1.0))]
    sure, smoothed, mixed = (way.info["reports"]["far"]["finetuned"]["confidence"] for way in ways)
    assert smoothed < sure - 0.02
    assert mixed < sure - 0.02
    found = ways[1]
    assert set(found.info["reports"]) == {"planes", "far"}
    for name, params in (("base", BASE), ("finetuned", found.coefficients), ("average", found.params)):
        logits = task.forward(params, OTHER.batch).astype(np.float64)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        report = found.info["reports"]["far"][name]
        assert report["confidence"] == pytest.approx(p.max(1).mean(), rel=1e-5)
        assert report["accuracy"] == pytest.approx((p.argmax(1) == OTHER.batch["label"]).mean())
        assert report["loss"] == pytest.approx(task.loss_of(task.to_vector(params), OTHER)[0], rel=1e-5)
        assert 0 <= report["calibration_error"] <= 1


def test_the_loss_is_that_of_both_ends_of_each_mixture():
    key, moving = jax.random.key(3), split(BASE, SAMPLE)[0]
    batch, others, share = mix_images(key, SAMPLE.batch, 0.7)
    logits = np.asarray(batch["image"]) @ BASE["head"]["kernel"] + BASE["head"]["bias"]
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ends = [
        -(0.8 * logs[np.arange(60), np.asarray(labels)] + 0.2 * logs.mean(1)).mean()
        for labels in (SAMPLE.batch["label"], others)
    ]
    value = Smoothed(0.2, 0.7)(task.forward, moving, {}, SAMPLE.batch, key)
    assert value == pytest.approx(float(share) * ends[0] + (1 - float(share)) * ends[1], rel=1e-5)


def next_token(params, batch):
    return params["table"][batch["text"][:, :-1]]


def test_of_texts_every_token_that_counts_is_smoothed():
    """The loss of a table of bigrams, by hand: padding takes no part, whatever stands there."""
    draw = np.random.default_rng(0)
    text, mask = draw.integers(0, 5, (3, 4)).astype(np.int32), np.arange(4)[None] < np.array([[4], [2], [3]])
    table = draw.normal(size=(5, 5)).astype(np.float32)
    batch = {"text": text, "mask": mask, "label": text[:, 1:], "valid": mask[:, 1:]}
    sample = Sample("texts", batch, next_token)
    logs = table - np.log(np.exp(table).sum(1, keepdims=True))
    each = [
        np.mean(
            [-(0.8 * logs[a, b] + 0.2 * logs[a].mean()) for a, b, ok in zip(row, row[1:], v[1:], strict=False) if ok]
        )
        for row, v in zip(text, mask, strict=True)
    ]
    value = Smoothed(0.2, 0.0)(next_token, {"table": table}, {}, batch, jax.random.key(0))
    assert value == pytest.approx(np.mean(each), rel=1e-5)
    found = bang({"table": table}, sample, label_smoothing=0.2, recipe=Recipe(30, 0.1, 3), weight=1.0)
    assert found.info["loss"][0] == pytest.approx(np.mean(each), rel=1e-5)
    assert found.info["loss"][-1] < found.info["loss"][0]
    with pytest.raises(DataError, match="mixup mixes images"):
        bang({"table": table}, sample, mixup=1.0, recipe=Recipe(1))


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.compose.fitting.SAVE_EVERY", 4)
    options = {"mixup": 0.5, "recipe": Recipe(10, 0.1, 20), "reports": [OTHER], "seed": 3}
    whole = bang(BASE, SAMPLE, **options)

    def run(**others):
        with StateSeries(tmp_path / "states") as series:
            return bang(BASE, SAMPLE, series=series, **options | others), series.latest_step

    kill_behind(1, run)
    found, step = run()
    assert step == 10
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.coefficients), (found.params, found.coefficients))
    assert whole.info == found.info
    with pytest.raises(ConfigError, match="the saved states are of a run with seed 3; this one has seed 4"):
        run(seed=4)


def test_refusals():
    with pytest.raises(ConfigError, match=r"label_smoothing 1\.0 must lie in"):
        bang(BASE, SAMPLE, label_smoothing=1.0)
    with pytest.raises(DataError, match="planes: bang needs labelled"):
        bang(BASE, SAMPLE.without_labels())
    assert report_confidence({"base": BASE}, []) == {}
