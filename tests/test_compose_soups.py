"""Soups beside loops in NumPy over the same models."""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from small_models import CONFIGS, random_params
from toy_tasks import Linear, add, draw, forward64, make_base, make_task, make_vectors, minimise, softmax, wide

from jaxtune.compose.learned_soup import build_soup, learned_soup
from jaxtune.compose.registry import compose
from jaxtune.compose.soups import Ingredient, cook_mixtures
from jaxtune.errors import ConfigError, DataError, NonFiniteError, UnknownNameError
from jaxtune.interpolate.repair import reset_statistics
from jaxtune.models import registry
from jaxtune.sample import Sample
from jaxtune.sampling import Forward
from jaxtune.train.checkpoints import StateSeries
from jaxtune.tree import flatten

BASE = make_base()
TRUTH = add(BASE, make_vectors(1, seed=10), [1.0])
# Fine-tunes on their way to one solution, each astray in a direction of its own; the last far off.
MODELS = [
    add(TRUTH, [noise], [strength])
    for noise, strength in zip(make_vectors(5, seed=40), (0.7, 0.9, 0.5, 0.8, 3.0), strict=True)
]
SAMPLE = make_task(TRUTH, size=120)


def accuracy(params, sample=SAMPLE):
    return float((np.asarray(Linear()(params, sample.batch)).argmax(-1) == sample.batch["label"]).mean())


def loss(params, sample=SAMPLE, scale=1.0):
    probabilities = softmax(scale * forward64(wide(params), sample.batch["image"]))
    return float(-np.log(probabilities[np.arange(len(sample)), sample.batch["label"]]).mean())


def mean_of(models):
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0).astype(np.float32), *models)


def assert_same(found, expected, **how):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-5, "atol": 1e-6, **how}), found, expected)


def greedy_in_numpy(models, metric, better):
    """The recipe of the paper: a running mean, one candidate at a time."""
    order = sorted(range(len(models)), key=lambda n: metric(models[n]), reverse=better(1, 0))
    chosen, soup, best = [order[0]], models[order[0]], metric(models[order[0]])
    for n in order[1:]:
        count = len(chosen)
        candidate = jax.tree.map(
            lambda a, b, c=count: (a * c / (c + 1) + b / (c + 1)).astype(np.float32), soup, models[n]
        )
        if better(metric(candidate), best):
            chosen, soup, best = [*chosen, n], candidate, metric(candidate)
    return order, chosen, soup


@pytest.mark.parametrize(
    ("name", "metric", "better"), [("accuracy", accuracy, lambda a, b: a > b), ("loss", loss, lambda a, b: a < b)]
)
def test_greedy_equals_the_papers_loop(name, metric, better):
    found = compose("greedy_soup", BASE, MODELS, SAMPLE, metric=name)
    order, chosen, soup = greedy_in_numpy(MODELS, metric, better)
    assert found.info["order"] == order
    assert found.info["accepted"] == chosen
    assert 1 < len(chosen) < len(MODELS)
    assert_same(found.params, soup)
    assert found.info["score"] == pytest.approx(metric(soup), rel=1e-4)
    np.testing.assert_allclose(found.coefficients[chosen], 1 / len(chosen))
    assert not better(
        max(found.info["scores"]) if name == "accuracy" else min(found.info["scores"]), found.info["score"]
    )


def test_uniform_is_the_mean_and_scores_are_the_models_own():
    found = compose("uniform_soup", BASE, MODELS, SAMPLE, include_base=True)
    assert_same(found.params, mean_of([*MODELS, BASE]))
    assert found.info["scores"] == pytest.approx([accuracy(params) for params in [*MODELS, BASE]])
    assert found.info["score"] == pytest.approx(accuracy(found.params))


def test_best_k_tries_every_k_and_takes_the_fewest_of_equals():
    scores = [accuracy(params) for params in MODELS]
    order = sorted(range(len(MODELS)), key=lambda n: -scores[n])
    tried = [accuracy(mean_of([MODELS[n] for n in order[:k]])) for k in range(1, len(MODELS) + 1)]
    found = compose("best_k_soup", BASE, MODELS, SAMPLE)
    assert found.info["scores_of_k"] == pytest.approx(tried)
    assert found.info["accepted"] == order[: 1 + int(np.argmax(tried))]
    two = compose("best_k_soup", BASE, MODELS, SAMPLE, k=2)
    assert_same(two.params, mean_of([MODELS[n] for n in order[:2]]))
    with pytest.raises(ConfigError, match="k is 6"):
        compose("best_k_soup", BASE, MODELS, SAMPLE, k=6)


def test_equal_models_keep_their_order_and_join_only_where_ties_do():
    twins = [MODELS[0], MODELS[2], MODELS[2], MODELS[0]]
    strict = compose("greedy_soup", BASE, twins, SAMPLE)
    assert strict.info["order"] in ([1, 2, 0, 3], [0, 3, 1, 2])
    first = strict.info["order"][0]
    assert strict.info["order"][1] not in strict.info["accepted"]
    ties = compose("greedy_soup", BASE, [twins[first]] * 3, SAMPLE, accept_ties=True)
    assert ties.info["accepted"] == [0, 1, 2]
    assert [step["joined"] for step in ties.info["steps"]] == [True, True]
    assert_same(ties.params, twins[first])


def test_one_model_is_its_own_soup():
    for method in ("uniform_soup", "greedy_soup", "best_k_soup"):
        found = compose(method, BASE, MODELS[:1], SAMPLE)
        jax.tree.map(np.testing.assert_array_equal, found.params, MODELS[0])


def test_leaves_that_are_no_floats_are_the_best_models():
    """And dtypes are the base's."""
    models = [{**model, "step": np.int32(n)} for n, model in enumerate(reversed(MODELS))]
    base = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), BASE)
    found = compose("uniform_soup", {**base, "step": np.int32(99)}, models, SAMPLE)
    assert int(found.params["step"]) == found.info["order"][0] != 0
    assert found.params["block_0"]["kernel"].dtype == jax.numpy.bfloat16


@dataclass(frozen=True)
class Bigram:
    """Logits of the next token from a table alone."""

    def __call__(self, params, batch):
        return params["table"][batch["text"][:, :-1]]


def test_language_models_are_chosen_by_perplexity():
    text = np.random.RandomState(0).randint(0, 4, (6, 5)).astype(np.int32)
    mask = np.arange(5)[None] < np.array([5, 5, 3, 2, 5, 4])[:, None]
    batch = {"text": text, "label": text[:, 1:], "valid": mask[:, 1:]}
    tables = [{"table": draw(4, 4, seed=seed)} for seed in (1, 2, 3)]

    def perplexity(params):
        log_probabilities = np.log(softmax(params["table"].astype(np.float64)))
        return np.exp(-log_probabilities[text[:, :-1], text[:, 1:]][mask[:, 1:]].mean())

    found = compose("greedy_soup", tables[0], tables, Sample("texts", batch, Bigram()), metric="perplexity")
    order, chosen, soup = greedy_in_numpy(tables, perplexity, lambda a, b: a < b)
    assert found.info["scores"] == pytest.approx([perplexity(table) for table in tables], rel=1e-5)
    assert (found.info["order"], found.info["accepted"]) == (order, chosen)
    assert_same(found.params, soup)
    with pytest.raises(UnknownNameError, match="perplexity"):
        compose("greedy_soup", tables[0], tables, Sample("texts", batch, Bigram()), metric="balanced_accuracy")


def test_mixtures_go_by_the_users_metric_and_tell_where_they_come_from():
    asked = []

    def distance(params):
        asked.append(params)
        return float(
            sum(np.square(np.asarray(x) - y).sum() for x, y in zip(*map(jax.tree.leaves, (params, TRUTH)), strict=True))
        )

    ingredients = [Ingredient(f"mixture {n}", model, {"sets": [n]}) for n, model in enumerate(MODELS)]
    found = cook_mixtures(ingredients, distance, mode="min")
    order, chosen, soup = greedy_in_numpy(MODELS, distance, lambda a, b: a < b)
    assert found.info["order"] == order
    assert found.info["accepted"] == chosen
    assert_same(found.params, soup)
    assert [one["metadata"] for one in found.info["ingredients"]] == [{"sets": [n]} for n in range(5)]
    assert [one["weight"] > 0 for one in found.info["ingredients"]] == [n in chosen for n in range(5)]
    assert_same(cook_mixtures(ingredients, distance, kind="uniform", mode="min").params, mean_of(MODELS))
    best = cook_mixtures(ingredients, distance, kind="best_k", k=1, mode="min")
    jax.tree.map(np.testing.assert_array_equal, best.params, MODELS[order[0]])
    with pytest.raises(ConfigError, match="names of their own"):
        cook_mixtures([ingredients[0]] * 2, distance)
    with pytest.raises(UnknownNameError, match="best_k, greedy, uniform"):
        cook_mixtures(ingredients, distance, kind="best-k")
    with pytest.raises(NonFiniteError, match="NaN"):
        cook_mixtures(ingredients, lambda params: np.nan)


def test_averaged_batch_norms_get_their_statistics_back():
    config = dataclasses.replace(CONFIGS["resnet"], depth=8)
    models = [random_params(config, seed=seed, dtype=np.float32) for seed in (0, 1)]
    image = draw(12, 8, 8, 3, seed=0)
    sample = Sample("images", {"image": image, "label": np.arange(12, dtype=np.int32) % 5}, Forward(config))
    found = compose("uniform_soup", models[0], models, sample)
    observe = jax.jit(registry.observe_norms, static_argnums=0, static_argnames="is_training")
    expected = reset_statistics(
        lambda *args, is_training: observe(config, *args, is_training=is_training), mean_of(models), [{"image": image}]
    )
    assert_same(found.params, expected, rtol=1e-4, atol=1e-4)
    alone = compose("best_k_soup", models[0], models, sample, k=1)
    jax.tree.map(np.testing.assert_array_equal, alone.params, models[alone.info["order"][0]])
    headless = dataclasses.replace(sample, forward=lambda params, batch: sample.forward(params, batch))
    with pytest.raises(ConfigError, match="need the config"):
        compose("uniform_soup", models[0], models, headless)


@pytest.mark.parametrize("per", ["model", "leaf"])
def test_a_learned_soup_equals_gradient_steps_by_differences(per):
    """Whole batches, so that nothing is drawn; the scale of the outputs is learned beside the weights."""
    paths = list(flatten(BASE))
    groups = [paths] if per == "model" else [[path] for path in paths]

    def unpack(numbers):
        return softmax(numbers[:-1].reshape(len(groups), len(MODELS))), numbers[-1]

    def loss_of(numbers):
        weights, scale = unpack(numbers)
        soup = {}
        for group, row in zip(groups, weights, strict=True):
            for path in group:
                block, name = path.split("/")
                leaves = [np.asarray(model[block][name], np.float64) for model in MODELS]
                soup.setdefault(block, {})[name] = np.tensordot(row, leaves, axes=1)
        return loss(soup, scale=scale)

    start = np.append(np.full(len(groups) * len(MODELS), 1 / len(MODELS)), 1.0)
    weights, scale = unpack(minimise(loss_of, start, 4, 0.05))
    found = learned_soup(BASE, MODELS, [SAMPLE], per=per, batch_size=len(SAMPLE), epochs=4)
    assert found.info["loss"][0][0] == pytest.approx(loss(mean_of(MODELS)), rel=1e-5)
    learned = found.coefficients["weights"]
    rows = [learned] if per == "model" else [learned[path] for path in paths]
    np.testing.assert_allclose(rows, weights, atol=1e-4)
    assert found.coefficients["output_scale"] == pytest.approx(scale, abs=1e-4)


def test_a_learned_soup_leaves_out_what_is_astray_and_is_better_than_the_mean():
    found = learned_soup(BASE, MODELS, [SAMPLE], per="model", epochs=40)
    weights = found.coefficients["weights"]
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    assert weights[4] < 0.05
    assert found.info["validation"]["learned"]["loss"] < found.info["validation"]["start"]["loss"] - 0.05
    assert_same(found.params, jax.tree.map(lambda *leaves: np.tensordot(weights, np.stack(leaves), axes=1), *MODELS))


def test_the_best_epoch_is_kept_by_examples_that_were_not_learned_on():
    found = learned_soup(BASE, MODELS, [SAMPLE], per="leaf", epochs=6, validation=0.25, learning_rate=3.0, seed=1)
    scores = found.info["score"]
    assert len(scores) == 7
    assert -found.info["validation"]["learned"]["loss"] == pytest.approx(max(scores), rel=1e-5)
    _, held = SAMPLE.split(0.25, seed=1)
    scale = found.coefficients["output_scale"]
    assert loss(found.params, held, scale) == pytest.approx(-max(scores), rel=1e-4)


def test_an_interrupted_soup_goes_on_bit_for_bit(tmp_path, monkeypatch):
    from jaxtune.compose import learning

    monkeypatch.setattr(learning, "SAVE_EVERY", 3)
    how = {"per": "model", "epochs": 2, "batch_size": 24}
    expected = learned_soup(BASE, MODELS, [SAMPLE], **how)
    calls, gradient = [], learning._gradient

    def break_off(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return gradient(*args)

    monkeypatch.setattr(learning, "_gradient", break_off)
    with StateSeries(tmp_path) as series, pytest.raises(KeyboardInterrupt):
        learned_soup(BASE, MODELS, [SAMPLE], series=series, **how)
    with StateSeries(tmp_path) as series:
        assert series.latest_step == 6
        found = learned_soup(BASE, MODELS, [SAMPLE], series=series, **how)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.info["loss"] == expected.info["loss"]
    assert len(calls) == 8 + 4


def test_soups_that_cannot_be_cooked_are_refused():
    with pytest.raises(UnknownNameError, match="loss"):
        compose("greedy_soup", BASE, MODELS, SAMPLE, metric="losses")
    with pytest.raises(UnknownNameError, match="max, min"):
        compose("greedy_soup", BASE, MODELS, SAMPLE, mode="least")
    with pytest.raises(DataError, match="needs labelled examples"):
        compose("greedy_soup", BASE, MODELS, SAMPLE.without_labels())
    with pytest.raises(DataError, match="have no labels"):
        compose("learned_soup", BASE, MODELS, SAMPLE.without_labels())
    with pytest.raises(UnknownNameError, match="leaf, model"):
        compose("learned_soup", BASE, MODELS, SAMPLE, per="layer")
    with pytest.raises(ConfigError, match="epochs is 0"):
        compose("learned_soup", BASE, MODELS, SAMPLE, epochs=0)
    with pytest.raises(ConfigError, match="no fine-tuned model"):
        compose("uniform_soup", BASE, [], SAMPLE)
    fixed = {"models": {"a": np.ones((2, 3), np.float32)}, "others": {}}
    made = build_soup(fixed, {"logits": np.zeros(2, np.float32), "output_scale": np.float32(1)})
    np.testing.assert_allclose(made["model"]["a"], 1)
