"""Learned grafts: the mask's gradient by hand, a skill that is planted in few coordinates, laws and refusals."""

import jax
import linear_task as task
import numpy as np
import pytest
from kills import kill_behind

from jaxtune.compose.grafting import SHIFT, apply_masks, graft, mask_loss
from jaxtune.compose.masks import count_true, largest, overlaps
from jaxtune.compose.registry import compose
from jaxtune.errors import ConfigError, DataError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS
from jaxtune.train.checkpoints import StateSeries
from jaxtune.tree import flatten

BASE, TRUTH = task.draw_params(seed=1, scale=0.1), task.draw_params(seed=100)
SAMPLE = task.draw_sample(200, truth=TRUTH)


def test_the_largest_are_those_of_a_sort_and_of_equal_ones_the_first():
    draw = np.random.default_rng(0)
    values = {"a": draw.integers(0, 4, (3, 5)).astype(np.float32), "b": draw.integers(0, 4, 6).astype(np.float32)}
    flat = np.concatenate([leaf.ravel() for leaf in values.values()])
    for count in range(flat.size + 1):
        wanted = np.zeros(flat.size, bool)
        wanted[sorted(range(flat.size), key=lambda i: (-flat[i], i))[:count]] = True
        found = largest(values, count)
        np.testing.assert_array_equal(np.concatenate([leaf.ravel() for leaf in found.values()]), wanted)
    assert largest({}, 0) == {}


def test_overlaps_are_of_the_smaller():
    masks = [{"a": np.array([1, 1, 0, 0], bool)}, {"a": np.array([0, 1, 1, 1], bool)}, {"a": np.zeros(4, bool)}]
    assert overlaps(masks) == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]]


def test_the_step_of_a_logit_is_the_gradient_of_its_mask():
    draw = np.random.default_rng(3)
    first = {path: draw.integers(0, 2, leaf.shape).astype(np.float32) for path, leaf in flatten(BASE).items()}
    vector = {path: draw.normal(size=leaf.shape).astype(np.float32) for path, leaf in flatten(BASE).items()}
    logits = {path: draw.normal(SHIFT, 2, leaf.shape).astype(np.float32) for path, leaf in flatten(BASE).items()}
    fixed = {"still": {}, "base": flatten(BASE), "vector": vector, "first": first}
    fixed |= {"penalty": np.float32(0.3), "unit": np.float32(2.0)}
    loss, gradient = jax.jit(jax.value_and_grad(lambda s: mask_loss(task.forward, s, fixed, SAMPLE.batch, None)))(
        logits
    )
    mask = {
        path: np.where(first[path] > 0, 1 - sigma, sigma)
        for path, s in logits.items()
        for sigma in [1 / (1 + np.exp(-(s.astype(np.float64) - SHIFT)))]
    }
    grafted = {path: leaf + mask[path] * vector[path] for path, leaf in flatten(BASE).items()}
    value, slope = task.loss_of(np.concatenate([leaf.ravel() for leaf in grafted.values()]), SAMPLE)
    kept = np.concatenate([leaf.ravel() for leaf in mask.values()])
    signs = 1 - 2 * np.concatenate([leaf.ravel() for leaf in first.values()])
    tau = np.concatenate([leaf.ravel() for leaf in vector.values()])
    np.testing.assert_allclose(loss, value + 0.3 * kept.mean(), rtol=1e-5)
    found = np.concatenate([np.ravel(leaf) for leaf in gradient.values()])
    np.testing.assert_allclose(found, 2 * signs * (slope * tau + 0.3 / kept.size), rtol=1e-4, atol=1e-6)


def plant():
    """A fine-tune that knows the truth in a third of its entries and hides it below larger noise in the others."""
    draw = np.random.default_rng(5)
    kernel, planted = BASE["head"]["kernel"].copy(), np.zeros((task.NUM_INPUTS, task.NUM_CLASSES), bool)
    planted[:2] = True
    kernel[planted] = TRUTH["head"]["kernel"][planted]
    kernel[~planted] += 4 * draw.choice([-1, 1], (~planted).sum()) * TRUTH["head"]["kernel"][~planted].std()
    truth = {
        "head": {
            "kernel": np.where(planted, TRUTH["head"]["kernel"], BASE["head"]["kernel"]),
            "bias": BASE["head"]["bias"],
        }
    }
    return {"head": {"kernel": kernel.astype(np.float32), "bias": BASE["head"]["bias"]}}, planted, truth


@pytest.mark.parametrize("keeps_share", [True, False])
def test_it_finds_the_planted_coordinates_where_magnitude_is_wrong(keeps_share):
    model, planted, truth = plant()
    sample = task.draw_sample(400, truth=truth)
    found = graft(BASE, [model], [sample], share=0.42, num_passes=20, exclude="head/bias", keeps_share=keeps_share)
    (report,), (mask,) = found.info["tasks"], found.coefficients
    assert set(mask) == {"head/kernel"}
    assert report["graft"]["accuracy"] > 0.93
    assert report["graft"]["accuracy"] > report["magnitude"]["accuracy"] + 0.2
    assert mask["head/kernel"][planted].mean() > 0.8  # one of the six hardly differs from the base
    assert not mask["head/kernel"][~planted].any()
    assert report["share"] == pytest.approx(5 / 12)
    assert report["retained"] == report["graft"]["accuracy"] / report["finetuned"]["accuracy"]
    assert len(report["scores"]) == 21
    assert report["scores"][report["pass"]] == max(report["scores"])


def test_it_is_never_behind_magnitude_which_is_that_of_the_merge():
    model = jax.tree.map(np.asarray, task.draw_params(seed=7))
    for share in (0.0, 0.2, 1.0):
        found = graft(BASE, [model], [SAMPLE], share=share, num_passes=2)
        report = found.info["tasks"][0]
        assert report["graft"]["accuracy"] >= report["magnitude"]["accuracy"]
        assert report["share_at_start"] == pytest.approx(np.floor(share * 15) / 15)
    frozen = graft(BASE, [model], [SAMPLE], share=0.3, num_passes=2, learning_rate=1e-9)
    merged = merge_trees(METHODS["graft"], [model], BASE, share=0.3)
    jax.tree.map(np.testing.assert_array_equal, frozen.params, merged)
    assert count_true(frozen.coefficients[0]) == 4
    whole = graft(BASE, [model], [SAMPLE], share=1.0, num_passes=2, learning_rate=1e-9)
    jax.tree.map(np.testing.assert_array_equal, whole.params, model)


def test_grafts_of_tasks_add_up():
    models = [task.draw_params(seed=7), task.draw_params(seed=8)]
    both = graft(
        BASE, models, [SAMPLE, SAMPLE], share=0.5, num_passes=2, learning_rate=1e-9, weight=0.5, whole="head/bias"
    )
    assert both.coefficients[0]["head/bias"].all()
    expected = BASE["head"]["kernel"] + 0.5 * sum(
        mask["head/kernel"] * (model["head"]["kernel"] - BASE["head"]["kernel"])
        for mask, model in zip(both.coefficients, models, strict=True)
    )
    np.testing.assert_allclose(both.params["head"]["kernel"], expected, rtol=1e-6)
    assert np.array(both.info["overlap"]).shape == (2, 2)
    jax.tree.map(np.testing.assert_array_equal, apply_masks(BASE, [BASE], [both.coefficients[0]]), BASE)


def test_a_search_that_was_killed_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.compose.fitting.SAVE_EVERY", 5)
    options = {"share": 0.3, "num_passes": 3, "seed": 2}
    models, samples = [TRUTH, task.draw_params(seed=7)], [SAMPLE, SAMPLE]
    whole = graft(BASE, models, samples, **options)

    def run():
        with StateSeries(tmp_path / "0") as first, StateSeries(tmp_path / "1") as second:
            found = compose("learned_graft", BASE, models, samples, states=[first, second], **options)
            return found, (first.latest_step, second.latest_step)

    kill_behind(2, run)  # within the first search
    kill_behind(2, run)  # which goes on to its end, and the second has begun
    found, steps = run()
    assert steps == (12, 12)
    jax.tree.map(np.testing.assert_array_equal, (found.params, found.coefficients), (whole.params, whole.coefficients))
    assert found.info == whole.info
    again, _ = run()  # both are found finished
    assert again.info == whole.info
    options["learning_rate"] = 2.0
    with pytest.raises(ConfigError, match=r"states are of a run with learning_rate 1\.0; this one has .*2\.0"):
        run()


def test_without_validation_all_examples_do_both():
    found = graft(BASE, [TRUTH], [SAMPLE], share=0.3, num_passes=2, validation=0)
    oracle = float((task.forward(found.params, SAMPLE.batch).argmax(-1) == SAMPLE.batch["label"]).mean())
    assert found.info["tasks"][0]["graft"]["accuracy"] == pytest.approx(oracle)
    assert len(found.info["tasks"][0]["loss"]) == 2 * (200 // 32)


def test_refusals():
    with pytest.raises(ConfigError, match=r"share 1\.5 must lie in \[0, 1\]"):
        graft(BASE, [TRUTH], [SAMPLE], share=1.5)
    with pytest.raises(ConfigError, match=r"penalty -1 must not be negative"):
        graft(BASE, [TRUTH], [SAMPLE], penalty=-1)
    with pytest.raises(ConfigError, match="batch_size is 0; it must be at least 1"):
        graft(BASE, [TRUTH], [SAMPLE], batch_size=0)
    with pytest.raises(ConfigError, match="learning_rate -1; all must be positive"):
        graft(BASE, [TRUTH], [SAMPLE], learning_rate=-1)
    with pytest.raises(ConfigError, match=r"exclude='\(' is no regular expression: missing \)"):
        graft(BASE, [TRUTH], [SAMPLE], exclude="(")
    with pytest.raises(ConfigError, match="1 models, and series of states for 0"):
        graft(BASE, [TRUTH], [SAMPLE], states=[])
    with pytest.raises(ConfigError, match="leave no leaf to learn a mask for"):
        graft(BASE, [TRUTH], [SAMPLE], exclude=".*")
    with pytest.raises(DataError, match="planes: the examples have no labels"):
        graft(BASE, [TRUTH], [SAMPLE.without_labels()])
