"""The search for coefficients of a Fisher-weighted average: its candidates, the choice, and what it refuses."""

import jax
import numpy as np
import pytest
from toy_tasks import add, make_base, make_task, make_vectors

from jaxtune.compose.fisher import draw_coefficients, fisher_candidates, fisher_search
from jaxtune.compose.registry import compose
from jaxtune.errors import ConfigError, DataError
from jaxtune.evaluate.fisher import estimate_fisher
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS
from jaxtune.sample import Sample
from jaxtune.tree import flatten


def make_case(count):
    """(base, fine-tunes, samples labelled by them)."""
    base = make_base()
    finetuned = [add(base, [vector], [1.0]) for vector in make_vectors(count, scale=1.5)]
    return base, finetuned, [make_task(model, seed=n, name=f"task {n}") for n, model in enumerate(finetuned)]


@pytest.fixture(scope="module")
def case():
    return make_case(2)


@pytest.mark.parametrize("options", [{}, {"normalize": False, "floor": 0.05}, {"favor_target": False}])
def test_candidates_are_what_the_merge_makes(case, options):
    _, finetuned, samples = case
    fishers = [estimate_fisher(model, sample) for model, sample in zip(finetuned, samples, strict=True)]
    fishers[1]["block_1"]["kernel"][0] = fishers[0]["block_1"]["kernel"][0] = 0.0
    weights = draw_coefficients(2, 5)
    candidates = fisher_candidates(finetuned, fishers, weights, **options)
    for n, weight in enumerate(weights):
        merged = merge_trees(METHODS["fisher"], finetuned, extras=fishers, weight=weight.tolist(), **options)
        for path, leaf in flatten(merged).items():
            np.testing.assert_allclose(flatten(candidates.take(n))[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_grid_has_both_ends_and_draws_are_weights():
    grid = draw_coefficients(2, 51)
    np.testing.assert_allclose(grid[:, 0], 1 - np.arange(51) / 50)
    np.testing.assert_allclose(grid.sum(1), 1)
    drawn = draw_coefficients(4, 400)
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(drawn[0], 0.25)
    # Dirichlet(1): the mean of each weight is 1/4, its variance 3/80.
    np.testing.assert_allclose(drawn.mean(0), 0.25, atol=0.04)
    np.testing.assert_allclose(drawn.var(0), 3 / 80, rtol=0.35)


@pytest.mark.parametrize("count", [2, 3])
def test_the_best_on_the_held_out_part_is_chosen(count):
    base, finetuned, samples = make_case(count)
    found = compose("fisher", base, finetuned, samples, num_candidates=11)
    rows = found.info["candidates"]
    means = [(-np.mean(row["accuracy"]), np.mean(row["loss"])) for row in rows]
    assert len(rows) == 11
    assert means[found.info["chosen"]] == min(means)
    np.testing.assert_array_equal(found.coefficients, rows[found.info["chosen"]]["coefficients"])
    held = [sample.split(0.5, seed=0)[1] for sample in samples]
    hits = [np.mean(np.argmax(one.forward(found.params, one.batch), -1) == one.batch["label"]) for one in held]
    np.testing.assert_allclose(hits, rows[found.info["chosen"]]["accuracy"])
    assert np.mean(hits) >= np.mean(rows[0 if count > 2 else 5]["accuracy"])
    assert jax.tree.structure(found.params) == jax.tree.structure(base)


def next_token(params, batch):
    return params["table"][batch["text"][:, :-1]]


def test_language_models_are_searched_by_their_tokens():
    draw = np.random.default_rng(0)
    tables = [{"table": draw.normal(size=(4, 4)).astype(np.float32)} for _ in range(2)]
    text, mask = draw.integers(0, 4, (8, 5)).astype(np.int32), np.arange(5)[None] < draw.integers(2, 6, (8, 1))
    sample = Sample("texts", {"text": text, "mask": mask, "label": text[:, 1:], "valid": mask[:, 1:]}, next_token)
    found = fisher_search(tables[0], tables, [sample, sample], num_candidates=3)
    held = sample.split(0.5)[1]
    hits = np.argmax(next_token(found.params, held.batch), -1) == held.batch["label"]
    chosen = found.info["candidates"][found.info["chosen"]]
    assert chosen["accuracy"] == pytest.approx([hits[held.batch["valid"]].mean()] * 2)


def test_what_cannot_be_searched_is_refused(case):
    base, finetuned, samples = case
    with pytest.raises(ConfigError, match="nothing to choose among"):
        fisher_search(base, finetuned[:1], samples[:1])
    with pytest.raises(DataError, match="no labels"):
        fisher_search(base, finetuned, [samples[0], samples[1].without_labels()])
    with pytest.raises(DataError, match="leaves none on one side"):
        fisher_search(base, finetuned, [samples[0], samples[1].take([0])])
